"""Mixture adapters: what the gate's weights are and what they weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.adapters import GatedMixture, ScalarMixture
from tests.models.tiny_parts import drawn

GATED = GatedMixture(hidden=5)
mix = jax.jit(GATED.apply)


@pytest.fixture(scope="module")
def streams():
    return jax.random.normal(jax.random.key(0), (2, 3, 4, 6)), jax.random.normal(jax.random.key(1), (2, 3, 4, 6))


@pytest.fixture(scope="module")
def weights(streams):
    return drawn(jax.eval_shape(GATED.init, jax.random.key(0), *streams), spread=0.5)


def expert(weights, name, tokens):
    norm, inner, outer = (weights["params"][f"{name}_{part}"] for part in ("norm", "in", "out"))
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
    return tokens + jax.nn.gelu(normed @ inner["kernel"] + inner["bias"]) @ outer["kernel"] + outer["bias"]


def test_the_two_streams_weights_of_a_token_sum_to_one_and_differ_from_token_to_token(streams, weights):
    _, shares = mix(weights, *streams)
    assert shares.shape == (2, 3, 4, 2)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    assert shares[..., 0].std() > 0.05


def test_a_mixed_token_is_the_weighted_sum_of_both_experts(streams, weights):
    mixed, shares = mix(weights, *streams)
    experts = [expert(weights, name, tokens) for name, tokens in zip(("general", "facial"), streams, strict=True)]
    np.testing.assert_allclose(mixed, shares[..., :1] * experts[0] + shares[..., 1:] * experts[1], atol=1e-5)


def test_the_gate_reads_both_streams_and_nothing_but_the_token_that_it_weighs(streams, weights):
    _, shares = mix(weights, *streams)
    for stream in range(2):
        changed = list(streams)
        changed[stream] = changed[stream].at[0, 1, 2, 0].add(3)
        moved = np.abs(mix(weights, *changed)[1] - shares).max(-1)
        assert moved[0, 1, 2] > 1e-3
        moved[0, 1, 2] = 0
        assert moved.max() == 0


@pytest.mark.parametrize("stream", ["general", "facial"])
def test_a_gate_that_is_all_on_one_stream_passes_that_streams_expert_alone(streams, weights, stream):
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


def test_a_scalar_mixture_is_the_plain_weighted_sum_and_starts_as_the_average(streams):
    general, facial = streams
    mixture = ScalarMixture()
    fresh = mixture.init(jax.random.key(0), general, facial)
    assert jax.tree.map(jnp.shape, fresh) == {"params": {"weights": (2,)}}
    np.testing.assert_allclose(mixture.apply(fresh, general, facial)[0], (general + facial) / 2, atol=1e-6)
    mixed, shares = mixture.apply({"params": {"weights": jnp.array([0.25, -2.0])}}, general, facial)
    np.testing.assert_allclose(mixed, 0.25 * general - 2 * facial, atol=1e-6)
    np.testing.assert_array_equal(shares, np.broadcast_to([0.25, -2.0], (2, 3, 4, 2)))
