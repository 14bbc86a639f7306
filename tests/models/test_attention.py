"""The attention function: its formula, grouped heads, masks and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.kernels.attention import attention


def naive(query, key, value, bias=None, mask=None):
    """Computes attention for one batch entry, head and query at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    result = np.zeros(query.shape)
    for b, i, h in np.ndindex(batch, length, heads):
        scores = key[b, :, h // group] @ query[b, i, h] / np.sqrt(width)
        if bias is not None:
            scores = scores + np.broadcast_to(bias, (batch, heads, length, len(scores)))[b, h, i]
        if mask is not None:
            scores = np.where(np.broadcast_to(mask, (batch, heads, length, len(scores)))[b, h, i], scores, -np.inf)
        weights = np.exp(scores - scores.max())
        result[b, i, h] = weights / weights.sum() @ value[b, :, h // group]
    return result


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_query_head_reads_the_key_head_of_its_group(key_heads):
    query, key, value = draw(2, 3, 4, 6), draw(2, 5, key_heads, 6, seed=1), draw(2, 5, key_heads, 6, seed=2)
    np.testing.assert_allclose(attention(query, key, value), naive(query, key, value), atol=1e-5)


def test_a_bias_adds_to_the_scaled_scores_and_a_mask_hides_keys():
    query, key, value = (draw(2, 5, 4, 6, seed=seed) for seed in range(3))
    bias, mask = draw(1, 4, 5, 5, seed=3), jnp.tril(jnp.ones((5, 5), bool))[None, None]
    expected = naive(query, key, value, bias, mask)
    np.testing.assert_allclose(attention(query, key, value, bias=bias, mask=mask), expected, atol=1e-5)


def test_a_query_that_may_read_nothing_returns_the_average_of_all_values():
    query, key, value = (draw(1, 3, 2, 4, seed=seed) for seed in range(3))
    result = attention(query, key, value, mask=jnp.zeros((1, 1, 3, 3), bool))
    np.testing.assert_allclose(result, np.broadcast_to(value.mean(1, keepdims=True), value.shape), atol=1e-6)


def test_in_bfloat16_the_softmax_over_many_keys_is_still_float32():
    query, key, value = (jnp.asarray(draw(1, 2000, 1, 8, seed=seed), jnp.bfloat16) for seed in range(3))
    result = jax.jit(attention)(query[:, :4], key, value + 1)
    assert result.dtype == jnp.bfloat16
    # Sums of 2000 small weights in bfloat16 would be off by a tenth and more.
    expected = naive(query[:, :4], key, value + 1)
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, atol=0.02)


@pytest.mark.parametrize("window", [None, 3])
def test_causal_queries_read_the_keys_before_them_that_are_in_the_window(window):
    query, key, value = (draw(2, 8, 2, 4, seed=seed) for seed in range(3))
    distance = np.arange(8)[:, None] - np.arange(8)
    expected = naive(query, key, value, mask=((distance >= 0) & (distance < (window or 8)))[None, None])
    np.testing.assert_allclose(attention(query, key, value, causal=True, window=window), expected, atol=1e-5)
