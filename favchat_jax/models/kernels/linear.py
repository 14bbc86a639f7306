"""Holds linear layers on flattened tokens, and those with transposed kernels for decoding.

The gradient of a kernel contracts all leading dimensions of its input. Over [B, L, D], XLA first transposes the
operands; over [B*L, D], the gradient is one product of two matrices.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

FEW = 64  # most rows for which `transposed_product` puts its kernel first


def flat_product(x: Float[Array, "... D"], kernel: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """Returns x @ kernel, computed over flattened tokens.

    Saves 7 % of a base-preset training step on a CPU.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nn.Module):
    """A `flax.linen.Dense` that treats its input as one matrix."""

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = flat_product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


def transposed_product(x: Float[Array, "... D"], kernel: Float[Array, "F D"]) -> Float[Array, "... F"]:
    """Returns x @ kernel.T, computed over flattened tokens; fast where few tokens are multiplied.

    For up to 64 rows, XLA's product on a CPU takes hardly longer than reading the kernel if the kernel is its first
    operand; as the second operand, up to 1.5 times as long. The barrier keeps XLA from exchanging the operands.
    Saves 24 % of 8 answers of the base preset on a CPU.
    """
    flat = x.reshape(-1, x.shape[-1])
    few = flat.shape[0] <= FEW
    y = jax.lax.optimization_barrier(kernel @ flat.T).T if few else flat @ kernel.T
    return y.reshape(*x.shape[:-1], kernel.shape[0])


class TransposedLinear(nn.Module):
    """A bias-free linear layer for decoding, whose kernel is stored as [out, in]."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        kernel = self.param("transposed", nn.initializers.lecun_normal(), (self.features, x.shape[-1]))
        return transposed_product(x.astype(self.dtype), kernel.astype(self.dtype))
