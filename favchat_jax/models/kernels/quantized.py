"""Kernels in 8 or 4 bits, for the language model's frozen base on a small card: whole numbers times a scale.

int8 has a scale for each output channel, which the product is multiplied with afterwards: the kernel itself is only
converted, within the matrix product. int4 has one for each `GROUP` inputs of each output channel besides, since 15
levels are too few for a whole column; its kernel is dequantised a layer at a time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from favchat_jax.models.kernels.linear import flat_product

GROUP = 64  # inputs that share a scale in int4
LEVELS = {"int8": 127, "int4": 7}  # the largest whole number; symmetric, so that zero stays zero


def quantize(
    kernel: Float[Array, "*layers D F"], storage: str
) -> tuple[Int[Array, "*layers D F"], Float[Array, "*layers groups F"]]:
    """Whole numbers and scales (one group for int8) whose product is nearest to a kernel.

    Args:
        kernel: one or several stacked; for int4 D must be a multiple of `GROUP` or smaller.
        storage: int8 or int4.
    """
    wide = _grouped(kernel.astype(jnp.float32), _groups(kernel.shape[-2], storage))
    scale = jnp.max(jnp.abs(wide), axis=-2, keepdims=True) / LEVELS[storage]
    whole = jnp.round(wide / jnp.where(scale == 0, 1, scale))
    return whole.reshape(kernel.shape).astype(storage), scale[..., 0, :]


def product(
    x: Float[Array, "... D"], kernel: Num[Array, "D F"], scale: Float[Array, "groups F"]
) -> Float[Array, "... F"]:
    """x @ (kernel * scale), in the dtype of x."""
    if scale.shape[0] == 1:
        return flat_product(x, kernel.astype(x.dtype)) * scale[0].astype(x.dtype)
    wide = _grouped(kernel.astype(x.dtype), scale.shape[0]) * scale[:, None].astype(x.dtype)
    return flat_product(x, wide.reshape(kernel.shape))


def store(weights: dict[str, Array], storage: str) -> dict[str, Array]:
    """Frozen weights by path, the language model's kernels among them quantised, each with a `kernel_scale` beside it.

    Args:
        weights: by path; every `llm/.../kernel` is quantised. They are taken out one after another, so that a small
            card does not hold all of them in both forms.
        storage: int8 or int4, or full for weights as they are.
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
