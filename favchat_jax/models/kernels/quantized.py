"""Stores the language model's frozen kernels in 8 or 4 bits for small cards: integers times a scale.

int8 has one scale per output channel, by which the product is multiplied; the kernel is only converted, within the
matrix product. int4 has one scale per `GROUP` inputs of each output channel, since 15 levels are too few for a
complete column; its kernel is dequantised one layer at a time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from favchat_jax.models.kernels.linear import flat_product

GROUP = 64  # inputs that share a scale in int4
LEVELS = {"int8": 127, "int4": 7}  # the largest integer; symmetric, so that zero stays zero


def quantize(
    kernel: Float[Array, "*layers D F"], storage: str
) -> tuple[Int[Array, "*layers D F"], Float[Array, "*layers groups F"]]:
    """Returns integers and scales (one group for int8) whose product is nearest to a kernel.

    Args:
        kernel: one or several stacked; for int4 D must be a multiple of `GROUP` or smaller.
        storage: int8 or int4.
    """
    wide = _grouped(kernel.astype(jnp.float32), _groups(kernel.shape[-2], storage))
    scale = jnp.max(jnp.abs(wide), axis=-2, keepdims=True) / LEVELS[storage]
    integers = jnp.round(wide / jnp.where(scale == 0, 1, scale))
    return integers.reshape(kernel.shape).astype(storage), scale[..., 0, :]


def product(
    x: Float[Array, "... D"], kernel: Num[Array, "D F"], scale: Float[Array, "groups F"]
) -> Float[Array, "... F"]:
    """Returns x @ (kernel * scale), in the dtype of x."""
    if scale.shape[0] == 1:
        return flat_product(x, kernel.astype(x.dtype)) * scale[0].astype(x.dtype)
    wide = _grouped(kernel.astype(x.dtype), scale.shape[0]) * scale[:, None].astype(x.dtype)
    return flat_product(x, wide.reshape(kernel.shape))


def store(weights: dict[str, Array], storage: str) -> dict[str, Array]:
    """Quantises the language model's kernels among frozen weights, and adds a `kernel_scale` beside each.

    Args:
        weights: by path; every `llm/.../kernel` is quantised. They are removed one after another, so that a small card
            never holds all of them in both forms.
        storage: int8 or int4; with full, the weights are returned unchanged.
    """
    if storage == "full":
        return weights
    stored = {}
    while weights:
        path, leaf = weights.popitem()
        if path.startswith("llm/") and path.endswith("/kernel"):
            stored[path], stored[f"{path}_scale"] = jax.jit(quantize, static_argnums=1)(leaf, storage)
        else:
            stored[path] = leaf
    return stored


def _groups(inputs: int, storage: str) -> int:
    return max(1, inputs // GROUP) if storage == "int4" else 1


def _grouped(kernel: Array, groups: int) -> Array:
    return kernel.reshape(*kernel.shape[:-2], groups, kernel.shape[-2] // groups, kernel.shape[-1])
