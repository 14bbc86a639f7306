"""Attention that XLA compiles, with all of its scores and a gradient of its own (`attention.plain` has the formula)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LOWEST = -1e30  # the score of a hidden key


def attention(query, key, value, *, bias=None, mask=None, causal=False, window=None):
    """As `attention.plain`.

    Products have four dimensions; those of grouped heads would have five, for which XLA changes the layout.
    """
    mask = visible(query.shape[1], mask, causal, window)
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[3] ** -0.5, key, value))
    return jnp.swapaxes(_scored(query, key, value, bias, mask), 1, 2)


def visible(
    length: int, mask: Bool[Array, "#B #A #L S"] | None, causal: bool, window: int | None
) -> Bool[Array, "#B #A #L S"] | None:
    """True where one of `length` queries may read a key; None where it may read all."""
    if not causal:
        return mask
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    behind = ((distance >= 0) & (distance < (window or length)))[None, None]
    return behind if mask is None else mask & behind


@jax.custom_vjp
def _scored(
    query: Float[Array, "B A L C"],
    key: Float[Array, "B A S C"],
    value: Float[Array, "B A S C"],
    bias: Float[Array, "#B #A L S"] | None,
    mask: Bool[Array, "#B #A #L S"] | None,
) -> Float[Array, "B A L C"]:
    """Attention with all of its scores, [B, A, L, S], and a gradient that passes over them half as often as autodiff's.

    Values are summed under weights that do not add up to 1 yet, since dividing the sums is less to divide. In the
    backward pass the sum over a row of the weights times their gradients is the product of the output with its own
    (as in flash attention), and gradients of keys and values are products whose small factor is the transposed one.
    """
    return _forward(query, key, value, bias, mask)[0]


def _forward(query, key, value, bias, mask):
    scores = jnp.einsum("BALC,BASC->BALS", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, LOWEST)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    summed = jnp.einsum("BALS,BASC->BALC", weights, value, preferred_element_type=jnp.float32)
    out = (summed / total).astype(query.dtype)
    return out, (query, key, value, bias, mask, weights, total, out)


def _backward(saved, d_out):
    query, key, value, bias, mask, weights, total, out = saved
    along = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1, keepdims=True) / total
    d_sum = (d_out / total).astype(value.dtype)
    d_weights = jnp.einsum("BALC,BASC->BALS", d_sum, value, preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights - along)
    if mask is not None:
        d_scores = jnp.where(mask, d_scores, 0)
    # Behind a barrier it exists once; fused into both products below it would be computed for each.
    d_scores = jax.lax.optimization_barrier(d_scores)
    d_bias = None if bias is None else _summed_to(bias, d_scores)
    d_scores = d_scores.astype(query.dtype)
    d_query = jnp.einsum("BALS,BASC->BALC", d_scores, key)
    d_key = jnp.einsum("BALC,BALS->BACS", query, d_scores)
    d_value = jnp.einsum("BALC,BALS->BACS", d_sum, weights)
    return d_query, jnp.swapaxes(d_key, 2, 3), jnp.swapaxes(d_value, 2, 3), d_bias, None


def _summed_to(bias, d_scores):
    """The gradient of a bias that was broadcast over the scores."""
    repeated = [axis for axis, size in enumerate(bias.shape) if size != d_scores.shape[axis]]
    return d_scores.sum(axis=repeated, keepdims=True).astype(bias.dtype)


_scored.defvjp(_forward, _backward)
