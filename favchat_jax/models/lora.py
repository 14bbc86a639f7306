"""Low-rank adaptation of a linear layer, with PEFT's semantics: y = x W + (alpha / r) dropout(x) A B.

A starts as a scaled uniform, B as zeros, so that a fresh adapter changes nothing. With `rank=0` the layer is a plain
bias-free linear layer and holds no adapter weights.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from favchat_jax.models.kernels import quantized
from favchat_jax.models.kernels.linear import flat_product, transposed_product

# PEFT's: uniform within +-1 / sqrt(width of the input).
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@jax.custom_vjp
def low_rank(x: Float[Array, "... D"], a: Float[Array, "D r"], b: Float[Array, "r F"]) -> Float[Array, "... F"]:
    """(x A) B, with a gradient of B that is one matrix product.

    Autodiff would transpose a fused [tokens, F] cotangent for B's gradient, which costs more than the whole adapter;
    here it is (x A)^T dy on flattened tokens.
    """
    return (x @ a) @ b


def _low_rank_forward(x, a, b):
    inner = x @ a
    return inner @ b, (x, inner, a, b)


def _low_rank_backward(saved, dy):
    x, inner, a, b = saved
    # Behind a barrier the cotangent exists once; fused into both products below it would be computed for each.
    dy_flat = jax.lax.optimization_barrier(dy.reshape(-1, dy.shape[-1]))
    d_inner = dy_flat @ b.T
    d_a = x.reshape(-1, x.shape[-1]).T @ d_inner
    d_b = inner.reshape(-1, inner.shape[-1]).T @ dy_flat
    return (d_inner @ a.T).reshape(x.shape), d_a, d_b


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class LoRADense(nn.Module):
    """A bias-free linear layer with an optional low-rank adapter.

    Where the weights hold `transposed` in place of `kernel` (`convert.stacking.for_decoding`), there is no adapter.

    Attributes:
        features: width of the output.
        rank: r of the adapter; 0 for none.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: share of the adapter's input that is dropped in training; the base path sees all of it.
        dtype: dtype of the computation; the adapter's weights stay float32.
    """

    features: int
    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], deterministic: bool = True) -> Float[Array, "... F"]:
        x = x.astype(self.dtype)
        if self.has_variable("params", "transposed"):  # for decoding
            return transposed_product(x, self.get_variable("params", "transposed").astype(self.dtype))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if self.has_variable("params", "kernel_scale"):  # a frozen base in 8 or 4 bits
            y = quantized.product(x, kernel, self.get_variable("params", "kernel_scale"))
        else:
            y = flat_product(x, kernel.astype(self.dtype))
        if not self.rank:
            return y
        lora_a = self.param("lora_a", UNIFORM, (x.shape[-1], self.rank))
        lora_b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        return y + (self.alpha / self.rank) * low_rank(x, lora_a.astype(self.dtype), lora_b.astype(self.dtype))


def merge(weights: dict, alpha: float) -> dict:
    """Adds every adapter below `weights` to its kernel: W + (alpha / r) A B, computed in float32.

    Args:
        weights: a nested tree in which some nodes hold `kernel`, `lora_a` and `lora_b` (stacked layers included).
        alpha: the adapters' alpha; their rank is read from `lora_a`.

    Returns:
        The tree without adapters, each kernel in its own dtype.
    """
    if "lora_a" in weights:
        a, b = (weights[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
        kernel = weights["kernel"].astype(jnp.float32) + (alpha / a.shape[-1]) * (a @ b)
        return {"kernel": kernel.astype(weights["kernel"].dtype)}
    return {name: merge(child, alpha) if isinstance(child, dict) else child for name, child in weights.items()}
