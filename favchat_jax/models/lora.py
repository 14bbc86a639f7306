"""Holds linear layers with low-rank adapters, as in PEFT: y = x W + (alpha / r) dropout(x) A B.

A starts as a scaled uniform, B as zeros, so that a fresh adapter changes nothing.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from favchat_jax.models.kernels import quantized
from favchat_jax.models.kernels.linear import flat_product
from favchat_jax.models.kernels.low_rank import low_rank

# PEFT's: uniform within +-1 / sqrt(width of the input).
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LoRADense(nn.Module):
    """A bias-free linear layer with an optional low-rank adapter.

    Attributes:
        features: width of the output.
        rank: r of the adapter; 0 for a plain layer without adapter weights.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: share of the adapter's input that is dropped in training; the base path sees all of it.
        dtype: dtype of the computation; the adapter's weights stay float32.
        storage: `full`, or int8 or int4 for a frozen kernel that `quantized.store` has narrowed. Initialisation
            always draws a full kernel.
    """

    features: int
    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    storage: str = "full"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], deterministic: bool = True) -> Float[Array, "... F"]:
        x = x.astype(self.dtype)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if self.storage == "full" or self.is_initializing():
            y = flat_product(x, kernel.astype(self.dtype))
        else:
            y = quantized.product(x, kernel, self.get_variable("params", "kernel_scale"))
        if not self.rank:
            return y
        lora_a = self.param("lora_a", UNIFORM, (x.shape[-1], self.rank))
        lora_b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        return y + (self.alpha / self.rank) * low_rank(x, lora_a.astype(self.dtype), lora_b.astype(self.dtype))


def merged(
    kernel: Float[Array, "*#layers D F"],
    a: Float[Array, "*#layers D r"],
    b: Float[Array, "*#layers r F"],
    alpha: float,
) -> Float[Array, "*layers D F"]:
    """Returns W + (alpha / r) A B, computed in float32, in the dtype of W."""
    a, b = (matrix.astype(jnp.float32) for matrix in (a, b))
    return (kernel.astype(jnp.float32) + (alpha / a.shape[-1]) * (a @ b)).astype(kernel.dtype)
