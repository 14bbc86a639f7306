"""Holds linear layers on flattened tokens, and the product with a transposed kernel for decoding.

The gradient of a kernel contracts all leading dimensions of its input. Over [B, L, D], XLA first transposes the
operands; over [B*L, D], the gradient is one product of two matrices.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from favchat_jax.models.kernels.platform import platform

FEW = 64  # most rows for which `transposed_product` puts its kernel first
BLOCK = 256  # rows of a narrow kernel that are widened at a time on a CPU
BITS = jnp.uint16  # dtype of bfloat16's bits


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


def for_reading(kernel: Float[Array, "F D"]) -> Num[Array, "F D"]:
    """Returns a transposed kernel in the form in which `transposed_product` reads it: on a CPU, bfloat16 as its bits.

    XLA on a CPU computes nothing in bfloat16. It would widen a complete kernel before it reads a part.
    """
    if kernel.dtype == jnp.bfloat16 and platform() == "cpu" and kernel.shape[0] % BLOCK == 0:
        return jax.lax.bitcast_convert_type(kernel, BITS)
    return kernel


def transposed_product(
    x: Float[Array, "... D"], kernel: Num[Array, "F D"], scale: Float[Array, "F groups"] | None = None
) -> Float[Array, "... F"]:
    """Returns x @ (kernel * scale).T in the dtype of x, computed over flattened tokens; fast where they are few.

    For up to 64 rows, XLA's product on a CPU takes hardly longer than reading the kernel if the kernel is its first
    operand; as the second operand, up to 1.5 times as long. The barrier keeps XLA from exchanging the operands.
    Saves 24 % of 8 answers of the base preset on a CPU.

    Args:
        x: inputs of some tokens.
        kernel: as [out, in], from `for_reading`, or integers (`quantized.quantize`).
        scale: of integers, one for each group of neighbours in a row.
    """
    flat = x.reshape(-1, x.shape[-1])
    if kernel.dtype.itemsize < 4 and platform() == "cpu" and kernel.shape[0] % BLOCK == 0:
        y = _blockwise(flat.astype(jnp.float32), kernel, scale).astype(x.dtype)
    else:
        wide = _widened(kernel, scale, x.dtype)
        y = jax.lax.optimization_barrier(wide @ flat.T).T if flat.shape[0] <= FEW else flat @ wide.T
        y = _scaled(y, scale)
    return y.reshape(*x.shape[:-1], kernel.shape[0])


def _blockwise(x: Float[Array, "R D"], kernel: Num[Array, "F D"], scale: Array | None) -> Float[Array, "R F"]:
    """Returns x @ (kernel * scale).T with some rows of the kernel widened at a time, which stay in the CPU's cache.

    XLA on a CPU multiplies no narrow kernels: it writes a wide copy of the whole kernel to memory each time. For one
    row in bfloat16 or int8, this takes a third of that time.
    """
    parts = kernel.reshape(-1, BLOCK, kernel.shape[1])
    scales = None if scale is None else scale.reshape(-1, BLOCK, scale.shape[1])

    def product(_, part):
        part, scale = jax.lax.optimization_barrier(part)  # otherwise, XLA widens the whole kernel before the loop
        return None, jax.lax.optimization_barrier(_widened(part, scale, jnp.float32) @ x.T)

    _, y = jax.lax.scan(product, None, (parts, scales))
    return _scaled(y.reshape(kernel.shape[0], -1).T, scale)


def _widened(kernel: Num[Array, "F D"], scale: Array | None, dtype: DTypeLike) -> Float[Array, "F D"]:
    """Returns a kernel in a wider dtype, times its scales if a row has several."""
    if kernel.dtype == BITS:
        return jax.lax.bitcast_convert_type(kernel.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)
    wide = kernel.astype(dtype)
    if scale is None or scale.shape[1] == 1:
        return wide
    return (wide.reshape(*scale.shape, -1) * scale[..., None].astype(dtype)).reshape(kernel.shape)


def _scaled(y: Float[Array, "R F"], scale: Array | None) -> Float[Array, "R F"]:
    """Returns a product times the scales of the kernel's rows, if each has a single one."""
    return y if scale is None or scale.shape[1] > 1 else y * scale[:, 0].astype(y.dtype)
