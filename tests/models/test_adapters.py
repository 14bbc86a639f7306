"""Mixture adapters: the weights of both streams, the weighted sums, and their values at initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.adapters import GatedMixture, ScalarMixture, TokenMLP, WeightAdapters
from tests.models.tiny_parts import drawn

GATED = GatedMixture(hidden=5)
mix = jax.jit(GATED.apply)


@pytest.fixture(scope="module")
def streams():
    return jax.random.normal(jax.random.key(0), (2, 3, 4, 6)), jax.random.normal(jax.random.key(1), (2, 3, 4, 6))


@pytest.fixture(scope="module")
def weights(streams):
    return drawn(jax.eval_shape(GATED.init, jax.random.key(0), *streams), spread=0.5)


def layer_norm(tokens, norm):
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]


def residual_mlp(tokens, norm, inner, outer):
    hidden = jax.nn.gelu(layer_norm(tokens, norm) @ inner["kernel"] + inner["bias"])
    return tokens + hidden @ outer["kernel"] + outer["bias"]


def expert(weights, name, tokens):
    return residual_mlp(tokens, *(weights["params"][f"{name}_{part}"] for part in ("norm", "in", "out")))


def test_the_two_streams_weights_of_a_token_sum_to_one_and_differ_from_token_to_token(streams, weights):
    _, shares = mix(weights, *streams)
    assert shares.shape == (2, 3, 4, 2)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    assert shares[..., 0].std() > 0.05


def test_a_mixed_token_is_the_weighted_sum_of_both_experts(streams, weights):
    mixed, shares = mix(weights, *streams)
    experts = [expert(weights, name, tokens) for name, tokens in zip(("general", "facial"), streams, strict=True)]
    np.testing.assert_allclose(mixed, shares[..., :1] * experts[0] + shares[..., 1:] * experts[1], atol=1e-5)


def test_the_gate_is_the_softmax_of_an_mlp_of_both_normed_streams(streams, weights):
    params = weights["params"]
    normed = [layer_norm(x, params[f"{name}_norm"]) for name, x in zip(("general", "facial"), streams, strict=True)]
    hidden = jax.nn.gelu(jnp.concatenate(normed, -1) @ params["gate_in"]["kernel"] + params["gate_in"]["bias"])
    scores = np.asarray(hidden @ params["gate_out"]["kernel"] + params["gate_out"]["bias"])
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(mix(weights, *streams)[1], expected, atol=1e-6)


def test_the_gate_reads_only_the_token_that_it_weighs_of_both_streams(streams, weights):
    _, shares = mix(weights, *streams)
    for stream in range(2):
        changed = list(streams)
        changed[stream] = changed[stream].at[0, 1, 2, 0].add(3)
        moved = np.abs(mix(weights, *changed)[1] - shares).max(-1)
        assert moved[0, 1, 2] > 1e-3
        moved[0, 1, 2] = 0
        assert moved.max() == 0


@pytest.mark.parametrize("stream", ["general", "facial"])
def test_a_gate_of_one_for_a_stream_passes_only_that_streams_expert(streams, weights, stream):
    bias = jnp.array([50.0, -50.0] if stream == "general" else [-50.0, 50.0])
    params = {**weights["params"], "gate_out": {**weights["params"]["gate_out"], "bias": bias}}
    mixed, _ = mix({"params": params}, *streams)
    tokens = streams[0] if stream == "general" else streams[1]
    np.testing.assert_allclose(mixed, expert(weights, stream, tokens), atol=1e-5)


def test_an_untrained_mixture_passes_the_average_of_both_streams(streams):
    fresh = jax.jit(GATED.init)(jax.random.key(0), *streams)
    mixed, shares = mix(fresh, *streams)
    np.testing.assert_array_equal(shares, np.full((2, 3, 4, 2), 0.5))
    np.testing.assert_allclose(mixed, (streams[0] + streams[1]) / 2, atol=1e-6)


def test_a_scalar_mixture_is_the_weighted_sum_and_the_average_at_initialisation(streams):
    general, facial = streams
    mixture = ScalarMixture()
    fresh = mixture.init(jax.random.key(0), general, facial)
    assert jax.tree.map(jnp.shape, fresh) == {"params": {"weights": (2,)}}
    np.testing.assert_allclose(mixture.apply(fresh, general, facial)[0], (general + facial) / 2, atol=1e-6)
    mixed, shares = mixture.apply({"params": {"weights": jnp.array([0.25, -2.0])}}, general, facial)
    np.testing.assert_allclose(mixed, 0.25 * general - 2 * facial, atol=1e-6)
    np.testing.assert_array_equal(shares, np.broadcast_to([0.25, -2.0], (2, 3, 4, 2)))


def test_the_mlp_after_a_q_former_has_a_residual_and_is_the_identity_at_initialisation(streams):
    tokens, _ = streams
    model = TokenMLP(hidden=5)
    weights = drawn(jax.eval_shape(model.init, jax.random.key(0), tokens), spread=0.5)
    parts = (weights["params"][part] for part in ("norm", "in", "out"))
    np.testing.assert_allclose(model.apply(weights, tokens), residual_mlp(tokens, *parts), atol=1e-5)
    fresh = model.init(jax.random.key(0), tokens)
    np.testing.assert_array_equal(model.apply(fresh, tokens), tokens)


GUIDED = WeightAdapters(hidden=5)
weigh = jax.jit(GUIDED.apply)


@pytest.fixture(scope="module")
def asked():
    """Words of each question, embedded for both streams, some of them padding."""
    words = tuple(jax.random.normal(jax.random.key(seed), (2, 3, 4, 7)) for seed in (2, 3))
    return words, np.arange(4) < np.array([[4, 2, 1], [3, 4, 2]])[..., None]


@pytest.fixture(scope="module")
def guided(streams, asked):
    return drawn(jax.eval_shape(GUIDED.init, jax.random.key(0), *streams, *asked), spread=0.5)


def test_a_questions_weights_are_the_softmax_of_two_scores_of_a_stream_and_the_words(streams, asked, guided):
    mixed, weights = weigh(guided, *streams, *asked)
    words, mask = asked
    for clip, question in np.ndindex(2, 3):
        scores = []
        for name, tokens, text in zip(("general", "facial"), streams, words, strict=True):
            params = guided["params"][name]
            average = text[clip, question][mask[clip, question]].mean(0)
            hidden = layer_norm(tokens[clip, question], params["norm"]) @ params["tokens"]["kernel"]
            hidden += params["tokens"]["bias"] + average @ params["words"]["kernel"] + params["words"]["bias"]
            hidden = jax.nn.gelu(hidden).mean(0)
            scores.append(float((hidden @ params["score"]["kernel"] + params["score"]["bias"])[0]))
        share = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(weights[clip, question], np.tile(share, (4, 1)), atol=1e-5)
        expected = share[0] * streams[0][clip, question] + share[1] * streams[1][clip, question]
        np.testing.assert_allclose(mixed[clip, question], expected, atol=1e-5)


def test_a_weight_adapter_reads_its_own_stream_and_question_and_no_padding(streams, asked, guided):
    words, mask = asked
    before = weigh(guided, *streams, *asked)[1]
    padded = tuple(jnp.where(mask[..., None], text, 9.0) for text in words)
    np.testing.assert_array_equal(weigh(guided, *streams, padded, mask)[1], before)
    for stream in range(2):
        seen, read = list(streams), list(words)
        seen[stream] = seen[stream].at[0, 1, 2, 0].add(3)
        read[stream] = read[stream].at[1, 0, 0, 0].add(3)
        moved = np.abs(weigh(guided, *seen, tuple(read), mask)[1] - before).max((2, 3))
        assert moved[0, 1] > 1e-4 and moved[1, 0] > 1e-4
        moved[0, 1] = moved[1, 0] = 0
        assert moved.max() == 0


def test_untrained_weight_adapters_weigh_both_streams_equally(streams, asked):
    fresh = jax.jit(GUIDED.init)(jax.random.key(0), *streams, *asked)
    mixed, weights = weigh(fresh, *streams, *asked)
    np.testing.assert_array_equal(weights, np.full((2, 3, 4, 2), 0.5))
    np.testing.assert_allclose(mixed, (streams[0] + streams[1]) / 2, atol=1e-6)


def test_a_question_without_words_has_finite_weights(streams, asked, guided):
    words, mask = asked
    _, weights = weigh(guided, *streams, words, np.zeros_like(mask))
    assert np.isfinite(weights).all()
