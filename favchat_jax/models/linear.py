"""The linear layer that every module uses: Flax's, on flattened tokens.

The gradient of a kernel contracts all leading dimensions of its input. Written over [B, L, D], XLA transposes the
operands first; over [B L, D] it is one matrix product. On a CPU this halves the time of the backward pass.
"""

import flax.linen as nn
import jax
from jaxtyping import Array, Float


def flat_dot_general(x: Float[Array, "... D"], kernel: Float[Array, "D F"], dimension_numbers, **kwargs):
    """`jax.lax.dot_general` of a linear layer, with the leading dimensions of `x` flattened."""
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
        raise ValueError(f"not a linear layer's product: {dimension_numbers}")
    flat = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **kwargs)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Dense):
    """`flax.linen.Dense` whose product runs over flattened tokens."""

    dot_general: object = flat_dot_general
