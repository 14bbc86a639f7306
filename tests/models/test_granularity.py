"""Eq. 2 and CA2: the formulas, the residual's effect, which tokens read which, and distinct positions of frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.granularity import CA2, GranularityFusion, PromptGuidedFusion, add_positions
from favchat_jax.models.umt import sinusoid_table
from tests.models.tiny_parts import drawn

FORMS = {"printed": GranularityFusion(width=6, heads=3, residual=False), "residual": GranularityFusion(6, heads=3)}

fuse = {form: jax.jit(model.apply) for form, model in FORMS.items()}


@pytest.fixture(scope="module")
def inputs():
    """Two clips of three frames: e_g of 4 tokens, e_1 of 5 tokens, e_2 of 2."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((4, 6), (5, 3), (2, 7))
    general, *facial = (jax.random.normal(key, (2, 3, *size)) for key, size in zip(keys, sizes, strict=True))
    return general, tuple(facial)


@pytest.fixture(scope="module")
def weights(inputs):
    shapes = {form: jax.eval_shape(model.init, jax.random.key(0), *inputs) for form, model in FORMS.items()}
    return {form: drawn(shape, spread=0.7) for form, shape in shapes.items()}


def layer_norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def linear(x, params):
    return x @ params["kernel"] + params["bias"]


def naive_step(params, facial, fused, heads):
    """Computes one line of Eq. 2 for a frame, or half a module of CA2 for a question, head by head in float64."""
    values = fused
    if "skip" in params:
        facial, values = layer_norm(facial, params["query_norm"]), layer_norm(fused, params["value_norm"])
    query, key, value = linear(facial, params["query"]), linear(values, params["key"]), linear(values, params["value"])
    attended = []
    for columns in np.split(np.arange(query.shape[-1]), heads):
        scores = np.exp(query[:, columns] @ key[:, columns].T / np.sqrt(len(columns)))
        attended.append(scores / scores.sum(-1, keepdims=True) @ value[:, columns])
    attended = np.concatenate(attended, axis=-1)
    if "skip" not in params:
        return attended
    return linear(facial, params["skip"]) + linear(attended, params["out"])


@pytest.mark.parametrize("form", FORMS)
def test_the_fusion_is_equation_2_over_two_granularities(inputs, weights, form):
    general, facial = (jax.tree.map(lambda x: np.asarray(x, np.float64), part) for part in inputs)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), weights[form])["params"]
    result = fuse[form](weights[form], *inputs)
    assert result.shape == (2, 3, 2, 6)
    for clip, frame in np.ndindex(2, 3):
        first = naive_step(params["step_1"], facial[0][clip, frame], general[clip, frame], heads=3)
        expected = naive_step(params["step_2"], facial[1][clip, frame], first, heads=3)
        np.testing.assert_allclose(result[clip, frame], expected, atol=1e-4)


def test_with_one_head_the_scores_are_divided_by_the_root_of_the_width(inputs, weights):
    model = GranularityFusion(width=6, heads=1, residual=False)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), weights["printed"])["params"]
    general, facial = inputs
    result = jax.jit(model.apply)(weights["printed"], general, facial[:1])
    expected = naive_step(params["step_1"], np.float64(facial[0][0, 0]), np.float64(general[0, 0]), heads=1)
    np.testing.assert_allclose(result[0, 0], expected, atol=1e-4)


def test_the_printed_form_has_only_the_weights_of_three_projections(weights):
    assert set(weights["printed"]["params"]["step_1"]) == {"query", "key", "value"}


def test_where_all_general_tokens_are_equal_the_face_passes_only_with_the_residual(inputs, weights):
    general, facial = inputs
    alike = jnp.broadcast_to(general[:, :, :1], general.shape)
    other = tuple(-x for x in facial)
    change = {
        form: np.abs(run(weights[form], alike, facial) - run(weights[form], alike, other)).max()
        for form, run in fuse.items()
    }
    assert change["printed"] < 1e-5
    assert change["residual"] > 0.1


@pytest.mark.parametrize("changed", ["general", "e_1", "e_2"])
def test_a_frame_reads_its_own_frame_and_every_granularity_of_it(inputs, weights, changed):
    general, facial = inputs
    parts = {"general": general, "e_1": facial[0], "e_2": facial[1]}
    parts[changed] = parts[changed].at[1, 1, 0].multiply(-2)
    before = fuse["residual"](weights["residual"], *inputs)
    after = fuse["residual"](weights["residual"], parts["general"], (parts["e_1"], parts["e_2"]))
    moved = np.abs(before - after).max((2, 3))
    assert moved[1, 1] > 1e-3
    moved[1, 1] = 0
    np.testing.assert_allclose(moved, 0, atol=1e-6)


def test_add_positions_tells_equal_frames_and_places_apart_and_lays_frames_one_after_another():
    tokens = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (2, 1, 1, 6)), (2, 3, 4, 6))
    laid = add_positions(tokens).reshape(2, 3, 4, 6)
    for frame in range(3):
        for place in range(4):
            added = np.concatenate([sinusoid_table(3, 3)[frame], sinusoid_table(4, 3)[place]])
            np.testing.assert_allclose(laid[:, frame, place], tokens[:, frame, place] + added, atol=1e-6)
    distances = np.abs(laid[0].reshape(12, 1, 6) - laid[0].reshape(1, 12, 6)).max(-1)
    assert distances[~np.eye(12, dtype=bool)].min() > 0.1


GUIDED = {"drawn": PromptGuidedFusion(6, 3, residual=False, blocks=2), "residual": PromptGuidedFusion(6, 3, blocks=2)}
guide = {form: jax.jit(lambda w, b, p, m, model=model: model.apply(w, b, p, m)) for form, model in GUIDED.items()}


@pytest.fixture(scope="module")
def asked():
    """Words of three questions about each of two clips, of which some are padding."""
    words = jax.random.normal(jax.random.key(1), (2, 3, 4, 5))
    return words, np.arange(4) < np.array([[4, 2, 1], [3, 4, 2]])[..., None]


@pytest.fixture(scope="module")
def guided(inputs, asked):
    """Weights of both forms of v2's fusion, and the W_i of the second."""

    def both_steps(model, facial, words, mask):
        return model(model.read_blocks(facial), words, mask)

    def start(model):
        return jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, method=both_steps), inputs[1], *asked)

    weights = {form: drawn(start(model), spread=0.7) for form, model in GUIDED.items()}
    blocks = GUIDED["residual"].apply(weights["residual"], inputs[1], method="read_blocks")
    return weights, blocks


def test_w_i_is_a_blocks_mlp_with_the_positions_of_all_frames(inputs, guided):
    weights, blocks = guided
    assert [block.shape for block in blocks] == [(2, 15, 6), (2, 6, 6)]
    for i, (features, block) in enumerate(zip(inputs[1], blocks, strict=True)):
        params = weights["residual"]["params"][f"mlp_{i}"]
        normed = layer_norm(features, params["norm"])
        mlp = linear(jax.nn.gelu(linear(normed, params["in"])), params["out"]) + linear(normed, params["skip"])
        np.testing.assert_allclose(block, add_positions(mlp), atol=1e-4)


@pytest.mark.parametrize("form", GUIDED)
def test_the_guided_fusion_is_two_modules_of_ca2_as_drawn(form, asked, guided):
    weights, blocks = guided
    words, mask = asked
    found = guide[form](weights[form], blocks, words, mask)
    assert found.shape == (2, 3, 4, 6)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), weights[form])["params"]
    for clip, question in np.ndindex(2, 3):
        known = mask[clip, question]
        text = np.float64(words[clip, question])[known]
        expected = text  # the first module's query is the prompt
        for i, block in enumerate(blocks):
            module = params[f"ca2_{i}"]
            read = linear(naive_step(module["visual"], expected, np.float64(block[clip]), heads=3), module["linear"])
            expected = naive_step(module["text"], text, read, heads=3)
        np.testing.assert_allclose(found[clip, question][known], expected, atol=2e-4)


def test_padding_of_a_prompt_changes_nothing_for_its_words(asked, guided):
    weights, blocks = guided
    words, mask = asked
    found = guide["residual"](weights["residual"], blocks, words, mask)
    other = guide["residual"](weights["residual"], blocks, jnp.where(mask[..., None], words, 9.0), mask)
    np.testing.assert_allclose(found[mask], other[mask], atol=1e-6)
    longer = jnp.pad(words, [(0, 0), (0, 0), (0, 3), (0, 0)]), jnp.pad(mask, [(0, 0), (0, 0), (0, 3)])
    longest = guide["residual"](weights["residual"], blocks, *longer)
    np.testing.assert_allclose(longest[:, :, :4][mask], found[mask], atol=1e-5)


def test_a_question_gives_the_same_result_alone_and_another_question_gives_another(asked, guided):
    weights, blocks = guided
    words, mask = asked
    found = guide["residual"](weights["residual"], blocks, words, mask)
    for question in range(3):
        one = slice(question, question + 1)
        alone = guide["residual"](weights["residual"], blocks, words[:, one], mask[:, one])
        np.testing.assert_allclose(found[:, one], alone, atol=1e-5)
    other = guide["residual"](weights["residual"], blocks, words.at[1, 2, 0].multiply(-2), mask)
    moved = np.abs(found - other).max((2, 3))
    assert moved[1, 2] > 1e-3
    moved[1, 2] = 0
    np.testing.assert_array_equal(moved, 0)


def test_where_all_tokens_of_the_last_block_are_equal_the_first_block_passes_only_with_the_residual(asked, guided):
    weights, blocks = guided
    alike = jnp.broadcast_to(blocks[1][:, :1], blocks[1].shape)
    change = {
        form: np.abs(run(weights[form], (blocks[0], alike), *asked) - run(weights[form], (-blocks[0], alike), *asked))
        for form, run in guide.items()
    }
    assert change["drawn"].max() < 1e-5
    assert change["residual"].max() > 0.1


def test_the_guided_fusion_tells_the_order_of_a_clips_frames(inputs, asked, guided):
    weights, _ = guided

    def find(facial):
        model = GUIDED["residual"]
        return model.apply(weights["residual"], facial, *asked, method=lambda m, f, *a: m(m.read_blocks(f), *a))

    backwards = tuple(features[:, ::-1] for features in inputs[1])
    assert np.abs(find(inputs[1]) - find(backwards)).max() > 1e-2


def test_a_module_as_drawn_has_only_two_attentions_and_a_linear_layer(asked):
    model = CA2(width=6, heads=3, residual=False)
    words, mask = asked
    shapes = jax.eval_shape(model.init, jax.random.key(0), words, jnp.ones((2, 7, 6)), words, mask)["params"]
    assert {name: set(part) for name, part in shapes.items()} == {
        "visual": {"query", "key", "value"},
        "linear": {"kernel", "bias"},
        "text": {"query", "key", "value"},
    }
