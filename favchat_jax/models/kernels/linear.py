"""The linear layer that every module uses: Flax's, on flattened tokens.

The gradient of a kernel contracts all leading dimensions of its input. Written over [B, L, D], XLA transposes the
operands first; over [B L, D] it is one product of two matrices, which halves the time of a backward pass on a CPU.
"""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

FEW = 64  # rows up to which `transposed_product` takes its kernel first


def flat_product(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """x @ kernel over flattened tokens."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def transposed_product(x: Float[Array, "*B D"], kernel: Float[Array, "F D"]) -> Float[Array, "*B F"]:
    """x @ kernel.T over flattened tokens, for a kernel that is read to multiply a few of them.

    With the kernel as its first operand, XLA's product on a CPU takes for up to 64 rows hardly longer than reading it;
    as its second, up to 1.5 times as long. The barrier keeps XLA from turning one into the other.
    """
    flat = x.reshape(-1, x.shape[-1])
    few = flat.shape[0] <= FEW
    y = jax.lax.optimization_barrier(kernel @ flat.T).T if few else flat @ kernel.T
    return y.reshape(*x.shape[:-1], kernel.shape[0])


class Linear(nn.Dense):
    """`flax.linen.Dense` that sees its input as one matrix."""

    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return flat.reshape(*inputs.shape[:-1], self.features)
