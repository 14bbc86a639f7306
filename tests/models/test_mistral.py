"""Mistral: the published size and formulas, decoding with a cache, the sliding window, padding, and config.json."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.checkpoints.mistral_folder import read_config, weight_shapes
from favchat_jax.errors import UserError
from favchat_jax.models.mistral import LoRA, Mistral, MistralConfig, rotate
from favchat_jax.models.mistral_decoding import DecodingMistral, decoding_form
from tests.models.tiny_parts import MISTRAL, MISTRAL_7B, drawn, mistral_shapes

WINDOWED = dataclasses.replace(MISTRAL, sliding_window=3)
ONE_LAYER = dataclasses.replace(MISTRAL, num_hidden_layers=1)
LENGTH = 7


def naive(weights, embeddings, config):
    """Hidden states of one sequence in float64, by the published formulas: one layer, head, query and key at a time."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    x = np.asarray(embeddings, np.float64)
    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def norm(x, params):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * params["scale"]

    def rotated(vector, position):
        pairs = vector[: width // 2] + 1j * vector[width // 2 :]
        angles = [position / config.rope_theta ** (2 * i / width) for i in range(width // 2)]
        pairs = pairs * np.exp(1j * np.array(angles))
        return np.concatenate([pairs.real, pairs.imag])

    for i in range(config.num_hidden_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], weights["layers"])
        normed = norm(x, layer["input_layernorm"])
        query, key, value = (normed @ layer["self_attn"][f"{name}_proj"]["kernel"] for name in "qkv")
        attended = np.zeros_like(query)
        for h, t in np.ndindex(config.num_attention_heads, len(x)):
            own, shared = np.arange(width) + h * width, np.arange(width) + h // group * width
            seen = range(max(0, t - config.sliding_window + 1) if config.sliding_window else 0, t + 1)
            turned = rotated(query[t, own], t)
            scores = np.array([turned @ rotated(key[s, shared], s) / math.sqrt(width) for s in seen])
            shares = np.exp(scores - scores.max())
            attended[t, own] = shares / shares.sum() @ value[seen][:, shared]
        x = x + attended @ layer["self_attn"]["o_proj"]["kernel"]
        normed = norm(x, layer["post_attention_layernorm"])
        gate, up = (normed @ layer["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"]
    return norm(x, weights["norm"])


@pytest.fixture(scope="module")
def weights():
    return drawn(mistral_shapes(Mistral(MISTRAL)), spread=0.3)


@pytest.fixture(scope="module")
def for_decoding(weights):
    """The same weights in the decoding form."""
    return decoding_form(weights, MISTRAL, alpha=1.0)


@pytest.fixture(scope="module")
def one_layer(weights):
    """The weights of a model that has only the first layer."""
    return {**weights, "layers": jax.tree.map(lambda leaf: leaf[:1], weights["layers"])}


@pytest.fixture(scope="module")
def embeddings():
    return jax.random.normal(jax.random.key(0), (2, LENGTH, MISTRAL.hidden_size))


def hidden(model):
    """Compiles the forward pass without a cache."""
    return jax.jit(lambda weights, x, **where: model.apply({"params": weights}, x, **where))


forward = hidden(Mistral(MISTRAL))


def test_the_config_of_mistral_7b_has_its_published_number_of_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))
    shapes = weight_shapes(read_config(tmp_path))
    assert sum(math.prod(shape) for shape in shapes.values()) == 7_241_732_096


@pytest.mark.parametrize("config", [MISTRAL, WINDOWED], ids=["full", "windowed"])
def test_hidden_states_are_the_published_formulas_computed_one_head_and_token_at_a_time(config, weights, embeddings):
    result = hidden(Mistral(config))(weights, embeddings)
    for row in range(2):
        np.testing.assert_allclose(result[row], naive(weights, embeddings[row], config), atol=1e-4)


@pytest.mark.parametrize("config", [MISTRAL, WINDOWED], ids=["full", "windowed"])
def test_the_decoding_form_computes_what_the_training_form_does(config, weights, for_decoding, embeddings):
    result = hidden(DecodingMistral(config))(for_decoding, embeddings)
    np.testing.assert_allclose(result, hidden(Mistral(config))(weights, embeddings), atol=1e-5)


@pytest.mark.parametrize("decoding", [False, True])
def test_logits_are_the_hidden_states_times_the_output_layer(decoding, weights, for_decoding, embeddings):
    model, params = (DecodingMistral(MISTRAL), for_decoding) if decoding else (Mistral(MISTRAL), weights)
    scores = model.apply({"params": params}, embeddings, method="logits")
    np.testing.assert_allclose(scores, embeddings @ weights["lm_head"]["kernel"], atol=1e-5)


def test_read_returns_the_scores_of_a_texts_embedded_tokens(weights):
    tokens = jnp.array([[3, 1, 4]])
    states = forward(weights, weights["embed_tokens"]["embedding"][tokens])
    scores = Mistral(MISTRAL).apply({"params": weights}, tokens, method="read")
    np.testing.assert_allclose(scores, states @ weights["lm_head"]["kernel"], atol=1e-5)


@pytest.mark.parametrize("form", [DecodingMistral, Mistral])
@pytest.mark.parametrize("config", [MISTRAL, WINDOWED], ids=["full", "windowed"])
def test_decoding_with_a_cache_after_padded_prompts_equals_the_full_forward_pass(
    config, form, weights, for_decoding, embeddings
):
    model, params = form(config), {"params": for_decoding if form is DecodingMistral else weights}
    run = jax.jit(lambda params, *args: model.apply(params, *args, method="extend"))
    prompts = np.array([2, 4])  # the first prompt has two tokens of padding, whose slots are overwritten
    padded = embeddings[:, :4].at[0, 2:].set(9)
    start = jnp.broadcast_to(jnp.arange(4), (2, 4))
    states, cache = run(params, padded, model.empty_cache(2, LENGTH + 1), start)
    rows = [[states[row, i] for i in range(prompts[row])] for row in range(2)]
    for step in range(3):
        positions = prompts + step
        states, cache = run(params, embeddings[np.arange(2), positions][:, None], cache, positions[:, None])
        for row in range(2):
            rows[row].append(states[row, 0])
    for row in range(2):
        expected = naive(weights, embeddings[row, : prompts[row] + 3], config)
        np.testing.assert_allclose(np.stack(rows[row]), expected, atol=1e-4)


def test_a_token_influences_only_tokens_within_the_window(one_layer, embeddings):
    run = hidden(Mistral(dataclasses.replace(ONE_LAYER, sliding_window=3)))
    moved = np.abs(run(one_layer, embeddings.at[:, 2].add(1)) - run(one_layer, embeddings)).max((0, 2))
    assert (moved[2:5] > 1e-3).all()
    np.testing.assert_array_equal(np.delete(moved, [2, 3, 4]), 0)


def test_with_a_window_of_one_a_token_reads_only_itself(one_layer, embeddings):
    run = hidden(Mistral(dataclasses.replace(ONE_LAYER, sliding_window=1)))
    alone = run(one_layer, embeddings[:, 3:4])
    np.testing.assert_allclose(run(one_layer, embeddings)[:, 3:4], alone, atol=1e-5)


def test_padding_on_the_left_with_valid_and_positions_changes_nothing(weights, embeddings):
    shift = 2
    padded = embeddings.at[:, :shift].set(9)
    positions = jnp.broadcast_to(jnp.maximum(jnp.arange(LENGTH) - shift, 0), (2, LENGTH))
    valid = jnp.broadcast_to(jnp.arange(LENGTH) >= shift, (2, LENGTH))
    result = forward(weights, padded, positions=positions, valid=valid)
    for row in range(2):
        expected = naive(weights, embeddings[row, shift:], MISTRAL)
        np.testing.assert_allclose(result[row, shift:], expected, atol=1e-4)
    assert np.isfinite(result).all()


def test_padding_on_the_right_never_reaches_earlier_tokens(weights, embeddings):
    moved = np.abs(forward(weights, embeddings.at[:, 4:].set(9)) - forward(weights, embeddings)).max((0, 2))
    np.testing.assert_array_equal(moved[:4], 0)
    assert (moved[4:] > 1e-3).all()


def test_grouped_heads_are_full_heads_whose_keys_and_values_are_repeated(one_layer, embeddings):
    def repeat(kernel):
        heads = kernel.reshape(1, MISTRAL.hidden_size, MISTRAL.num_key_value_heads, MISTRAL.head_dim)
        return jnp.repeat(heads, 2, axis=2).reshape(1, MISTRAL.hidden_size, -1)

    attention = dict(one_layer["layers"]["self_attn"])
    attention |= {name: {"kernel": repeat(attention[name]["kernel"])} for name in ("k_proj", "v_proj")}
    weights = {**one_layer, "layers": {**one_layer["layers"], "self_attn": attention}}
    full = dataclasses.replace(ONE_LAYER, num_key_value_heads=MISTRAL.num_attention_heads)
    expected = hidden(Mistral(ONE_LAYER))(one_layer, embeddings)
    np.testing.assert_allclose(hidden(Mistral(full))(weights, embeddings), expected, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_of_positions_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(at, other):
        turned = (rotate(x, jnp.array([[p]]), 100.0) for x, p in ((query, at), (key, other)))
        return float(jnp.sum(next(turned) * next(turned)))

    assert score(3, 1) == pytest.approx(score(30, 28), abs=1e-4)
    assert score(5, 5) == pytest.approx(float(jnp.sum(query * key)), abs=1e-4)
    assert abs(score(3, 1) - score(1, 3)) > 1e-2
    assert abs(score(3, 1) - score(4, 1)) > 1e-2


def test_rotation_is_computed_in_float32_for_bfloat16_inputs():
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    turned = rotate(x, jnp.array([[1001]]), 100.0)  # bfloat16 would round the position to 1000
    assert turned.dtype == jnp.bfloat16
    expected = [math.cos(1001) - math.sin(1001), math.cos(1001) + math.sin(1001)]
    np.testing.assert_allclose(np.asarray(turned, np.float32).ravel(), expected, atol=0.01)


@pytest.mark.parametrize("policy", ["block", "products"])
def test_rematerialisation_changes_no_gradient(weights, embeddings, policy):
    def gradient(remat):
        model = Mistral(MISTRAL, LoRA(), remat=remat)
        return jax.jit(jax.grad(lambda weights: jnp.sum(model.apply({"params": weights}, embeddings) ** 3)))(weights)

    kept, recomputed = gradient(""), gradient(policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), kept, recomputed)


def test_in_bfloat16_the_computation_is_bfloat16_and_the_weights_stay_float32():
    model = Mistral(MISTRAL, LoRA(rank=2), dtype=jnp.bfloat16, remat="block")
    shapes = mistral_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    states = jax.eval_shape(model.apply, {"params": shapes}, jax.ShapeDtypeStruct((1, 3, 16), jnp.float32))
    assert states.dtype == jnp.bfloat16


def test_from_json_reads_the_published_config_whose_sizes_are_the_defaults():
    assert MistralConfig.from_json(MISTRAL_7B) == MistralConfig()


def test_from_json_reads_the_rotary_base_in_its_old_and_its_new_place():
    old = {name: value for name, value in MISTRAL_7B.items() if name != "rope_theta"}
    assert MistralConfig.from_json({**old, "rope_theta": 5e5}).rope_theta == 5e5
    assert MistralConfig.from_json({**old, "rope_theta": 5e5, "rope_scaling": None}).rope_theta == 5e5
    new = {"rope_theta": 7e5, "rope_type": "default"}
    assert MistralConfig.from_json({**old, "rope_parameters": new}).rope_theta == 7e5


def test_from_json_takes_the_head_width_and_the_window_that_are_given():
    config = MistralConfig.from_json({**MISTRAL_7B, "head_dim": 64, "sliding_window": 4096})
    assert (config.head_dim, config.sliding_window) == (64, 4096)
    assert MistralConfig.from_json({**MISTRAL_7B, "head_dim": None}).head_dim == 128


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": None}, "model_type"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantised already .gptq.. Name the folder",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
    ids=[
        "other model",
        "no model",
        "tied embeddings",
        "quantised",
        "scaled rope",
        "oldest scaled rope",
        "newest scaled rope",
    ],
)
def test_from_json_rejects_other_models_in_one_line(change, named):
    with pytest.raises(UserError, match=named) as caught:
        MistralConfig.from_json({**MISTRAL_7B, **change})
    assert "\n" not in str(caught.value)
