"""The linear layer that every module uses: Flax's, on flattened tokens.

The gradient of a kernel contracts all leading dimensions of its input. Written over [B, L, D], XLA transposes the
operands first; over [B L, D] it is one product of two matrices, which halves the time of a backward pass on a CPU.
"""

import flax.linen as nn
from jaxtyping import Array, Float


def flat_product(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """x @ kernel over flattened tokens."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nn.Dense):
    """`flax.linen.Dense` that sees its input as one matrix."""

    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return flat.reshape(*inputs.shape[:-1], self.features)
