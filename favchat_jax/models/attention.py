"""Scaled dot-product attention, the one function that every module calls.

Every attention of the model (joint space-time, windowed with a relative position bias, cross-attention, causal with
grouped heads) goes through `attention`, so that the choice of a kernel is made in one place.
"""

import chex
import jax
from jaxtyping import Array, Bool, Float


def attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    bias: Float[Array, "#B #H L S"] | None = None,
    mask: Bool[Array, "#B #H L S"] | None = None,
) -> Float[Array, "B L H D"]:
    """softmax(q k^T / sqrt(D) + bias) v, with the softmax in float32.

    Args:
        query: queries of H heads.
        key: keys of K heads, K a divisor of H: query head h reads key head h // (H / K) (grouped-query attention).
        value: values, shaped as `key`.
        bias: added to the scaled scores.
        mask: True where a query may read a key. A row without any True returns an average of all values.

    Returns:
        The attended values, in the dtype of `query`.
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    chex.assert_is_divisible(query.shape[2], key.shape[2])
    return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask)
