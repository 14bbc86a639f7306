"""Q-Former: the published size, the inputs that change its output, and several questions about one clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.qformer import Attention, QFormer
from tests.models.tiny_parts import drawn_for

TINY = QFormer(width=16, depth=3, heads=2, mlp=24, queries=3, extra_queries=2, vocabulary=11, positions=8)


@pytest.fixture(scope="module")
def inputs():
    visual = jax.random.normal(jax.random.key(0), (2, 7, 12))
    prompt = jax.random.randint(jax.random.key(1), (2, 3, 6), 0, 11)
    mask = np.arange(6) < np.array([[2, 6, 4], [3, 1, 5]])[..., None]
    return visual, prompt, jnp.asarray(mask)


@pytest.fixture(scope="module")
def weights(inputs):
    return drawn_for(TINY, *inputs)


apply = jax.jit(TINY.apply)


def test_the_bert_base_q_former_with_its_text_branch_has_the_published_number_of_weights():
    width, hidden, visual = 768, 3072, 1024
    norm = 2 * width
    self_attention = 4 * (width * width + width) + norm
    cross_attention = 2 * (width * width + width) + 2 * (visual * width + width) + norm
    mlp = width * hidden + hidden + hidden * width + width + norm
    embeddings = (30523 + 512) * width + norm
    expected = embeddings + 12 * (self_attention + 2 * mlp) + 6 * cross_attention + (32 + 64) * width
    shapes = jax.eval_shape(
        QFormer().init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 9, visual), jnp.float32),
        jax.ShapeDtypeStruct((1, 2, 5), jnp.int32),
        jax.ShapeDtypeStruct((1, 2, 5), bool),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected == 182_194_944


def test_without_a_prompt_the_text_branch_does_not_exist(inputs):
    visual, prompt, mask = inputs
    model = TINY.clone(prompt=False)
    weights = drawn_for(model, visual, prompt, mask)
    assert not {"word_embeddings", "position_embeddings"} & set(weights["params"])
    assert set(weights["params"]["layer_1"]) == {"attention", "mlp_query"}
    alone = model.apply(weights, visual)
    assert alone.shape == (2, 1, 5, 16)
    shared = model.apply(weights, visual, prompt, mask)
    np.testing.assert_array_equal(shared, np.broadcast_to(alone, (2, 3, 5, 16)))


def test_the_questions_of_a_clip_do_not_influence_each_other(inputs, weights):
    visual, prompt, mask = inputs
    together = apply(weights, *inputs)
    assert together.shape == (2, 3, 5, 16)
    for question in range(3):
        alone = apply(weights, visual, prompt[:, question : question + 1], mask[:, question : question + 1])
        np.testing.assert_allclose(together[:, question], alone[:, 0], atol=1e-5)


def test_clips_do_not_influence_each_other(inputs, weights):
    alone = apply(weights, *(x[1:] for x in inputs))
    np.testing.assert_allclose(apply(weights, *inputs)[1:], alone, atol=1e-5)


def test_padding_of_the_prompt_changes_nothing(inputs, weights):
    visual, prompt, mask = inputs
    other_padding = jnp.where(mask, prompt, (prompt + 1) % 11)
    longer = (jnp.pad(prompt, ((0, 0), (0, 0), (0, 2))), jnp.pad(mask, ((0, 0), (0, 0), (0, 2))))
    expected = apply(weights, *inputs)
    np.testing.assert_allclose(apply(weights, visual, other_padding, mask), expected, atol=1e-5)
    np.testing.assert_allclose(apply(weights, visual, *longer), expected, atol=1e-5)


def test_every_word_and_its_place_change_the_output(inputs, weights):
    visual, prompt, mask = inputs
    expected = apply(weights, *inputs)
    assert np.abs(apply(weights, visual, prompt.at[0, 1, 5].add(1) % 11, mask)[0, 1] - expected[0, 1]).max() > 1e-3
    swapped = prompt.at[0, 1, :2].set(jnp.array([3, 4])), prompt.at[0, 1, :2].set(jnp.array([4, 3]))
    first, second = (apply(weights, visual, words, mask)[0, 1] for words in swapped)
    assert np.abs(first - second).max() > 1e-3


def test_a_prompt_of_only_padding_is_no_prompt(inputs, weights):
    visual, prompt, mask = inputs
    nothing = apply(weights, visual, prompt, jnp.zeros_like(mask))
    np.testing.assert_allclose(nothing, np.repeat(apply(weights, visual), 3, axis=1), atol=1e-5)


def test_every_second_layer_reads_the_visual_tokens(inputs, weights):
    assert [("crossattention" in weights["params"][f"layer_{i}"]) for i in range(3)] == [True, False, True]
    visual, prompt, mask = inputs
    permuted = apply(weights, visual[:, ::-1], prompt, mask)
    np.testing.assert_allclose(permuted, apply(weights, *inputs), atol=1e-5)
    assert np.abs(apply(weights, visual.at[:, 3].add(1), prompt, mask) - permuted).max() > 1e-3


def test_the_text_has_separate_mlps_and_the_last_one_has_no_effect(inputs, weights):
    gradient = jax.jit(jax.grad(lambda weights: (TINY.apply(weights, *inputs) ** 3).mean()))(weights)["params"]
    for layer, reaches in (("layer_0", True), ("layer_1", True), ("layer_2", False)):
        sizes = [np.abs(leaf).max() for leaf in jax.tree.leaves(gradient[layer]["mlp"])]
        assert all(sizes) if reaches else not any(sizes)
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient[layer]["mlp_query"]))


def test_embedded_prompts_are_normed_words_at_their_places(inputs, weights):
    params = weights["params"]
    embedded = TINY.apply(weights, inputs[1], method=QFormer.embed_prompt)
    row = params["word_embeddings"]["embedding"][inputs[1][1, 2, 4]] + params["position_embeddings"]["embedding"][4]
    row = (row - row.mean()) / np.sqrt(row.var() + 1e-12)
    row = row * params["embeddings_norm"]["scale"] + params["embeddings_norm"]["bias"]
    np.testing.assert_allclose(embedded[1, 2, 4], row, atol=1e-5)


def test_dropout_is_drawn_only_when_asked_for(inputs):
    model = TINY.clone(depth=1)
    weights = drawn_for(model, *inputs)
    draw = jax.jit(lambda key: model.apply(weights, *inputs, deterministic=False, rngs={"dropout": key}))
    # This generator compiles much faster than the default one.
    noisy = [draw(jax.random.key(seed, impl="rbg")) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 1e-3
    assert np.abs(noisy[0] - jax.jit(model.apply)(weights, *inputs)).max() > 1e-3


def test_stochastic_depth_drops_or_doubles_a_questions_complete_branch():
    tokens = jax.random.normal(jax.random.key(0), (2, 16, 4, 8))
    attention = Attention(dropout=0.0, drop_path=0.5, heads=2)
    weights = drawn_for(attention, tokens, deterministic=True)
    without = jax.tree.map(jnp.copy, weights)
    without["params"]["output"] = jax.tree.map(jnp.zeros_like, weights["params"]["output"])
    doubled = jax.tree.map(jnp.copy, weights)
    doubled["params"]["output"] = jax.tree.map(lambda leaf: 2 * leaf, weights["params"]["output"])
    run = jax.jit(attention.apply, static_argnames="deterministic")
    kept_out, kept_in = (run(w, tokens, deterministic=True) for w in (without, doubled))
    drawn = run(weights, tokens, deterministic=False, rngs={"dropout": jax.random.key(2, impl="rbg")})
    is_out = np.isclose(drawn, kept_out, atol=1e-5).all((2, 3))
    is_in = np.isclose(drawn, kept_in, atol=1e-5).all((2, 3))
    assert (is_out ^ is_in).all()
    assert 4 < is_out.sum() < 28


def test_rematerialisation_changes_no_gradient(inputs):
    model = TINY.clone(depth=1, drop_path=0.2, prompt=False)
    weights = drawn_for(model, *inputs)

    def loss(weights, model):
        rngs = {"dropout": jax.random.key(0, impl="rbg")}
        return (model.apply(weights, *inputs, deterministic=False, rngs=rngs) ** 3).mean()

    kept, recomputed = (
        jax.jit(jax.grad(loss), static_argnums=1)(weights, model.clone(remat=remat)) for remat in ("", "block")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), kept, recomputed)


def test_a_prompt_longer_than_the_position_table_is_refused(inputs, weights):
    visual, _, _ = inputs
    with pytest.raises(ValueError, match="9 word pieces"):
        TINY.apply(weights, visual, jnp.zeros((2, 1, 9), int), jnp.ones((2, 1, 9), bool))


def test_a_q_former_that_reads_prompts_cannot_be_initialised_without_one(inputs):
    with pytest.raises(ValueError, match="prompt"):
        jax.eval_shape(TINY.init, jax.random.key(0), inputs[0])


def test_each_question_can_read_separate_visual_tokens_with_a_mask(inputs, weights):
    visual, prompt, mask = inputs
    own = jnp.stack([visual, -visual, 2 * visual], axis=1)
    seen = np.arange(7) < np.array([[3, 7, 5], [1, 6, 4]])[..., None]
    together = apply(weights, own, prompt, mask, visual_mask=seen)
    for clip, question in np.ndindex(2, 3):
        one = slice(question, question + 1)
        read = own[clip, question, : seen[clip, question].sum()]
        alone = TINY.apply(weights, read[None], prompt[clip : clip + 1, one], mask[clip : clip + 1, one])
        np.testing.assert_allclose(together[clip, question], alone[0, 0], atol=1e-5)


def test_equal_visual_tokens_for_each_question_give_the_result_of_shared_ones(inputs, weights):
    visual, prompt, mask = inputs
    repeated = jnp.repeat(visual[:, None], 3, axis=1)
    np.testing.assert_allclose(apply(weights, repeated, prompt, mask), apply(weights, *inputs), atol=1e-5)
