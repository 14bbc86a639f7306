"""Stores the language model's frozen kernels in 8 or 4 bits for small cards: integers times a scale.

int8 has one scale per output channel, by which the product is multiplied; the kernel is only converted, within the
matrix product. int4 has one scale per `GROUP` inputs of each output channel, since 15 levels are too few for a
complete column; its kernel is dequantised one layer at a time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from favchat_jax.models.kernels.linear import flat_product

GROUP = 32  # inputs that share a scale in int4
LEVELS = {"int8": 127, "int4": 7}  # the largest integer; symmetric, so that zero stays zero
# Shares of a group's largest value that may become the largest integer; the one with the smallest error is taken.
# Cutting off the largest values gives the others finer steps.
SHARES: dict[str, tuple[float, ...]] = {"int8": (), "int4": (0.9, 0.8)}


def quantize(
    kernel: Float[Array, "*layers D F"], storage: str, axis: int = -2
) -> tuple[Int[Array, "*layers D F"], Float[Array, "*layers _D _F"]]:
    """Returns integers and scales (one group for int8) whose product is nearest to a kernel.

    Args:
        kernel: one or several stacked; for int4, the number of inputs must be a multiple of `GROUP` or smaller.
        storage: int8 or int4.
        axis: of the inputs, which the scales have for their groups; -1 for a transposed kernel.
    """
    groups = max(1, kernel.shape[axis] // GROUP) if storage == "int4" else 1
    wide, most = _grouped(kernel.astype(jnp.float32), groups, axis), LEVELS[storage]
    # Splitting the axis of the inputs has put the groups one place before their members.
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)

    def rounded(share: float) -> tuple[Array, Array, Array]:
        scale = share * largest / most
        integers = jnp.clip(jnp.round(wide / jnp.where(scale == 0, 1, scale)), -most, most)
        return jnp.sum((integers * scale - wide) ** 2, axis=axis, keepdims=True), integers, scale

    best = rounded(1.0)
    for share in SHARES[storage]:
        other = rounded(share)
        best = jax.tree.map(lambda a, b, less=other[0] < best[0]: jnp.where(less, b, a), best, other)
    _, integers, scale = best
    return integers.reshape(kernel.shape).astype(storage), scale.squeeze(axis)


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


def _grouped(kernel: Array, groups: int, axis: int = -2) -> Array:
    """Splits the axis of the inputs into groups and their members."""
    place = kernel.ndim + axis
    return kernel.reshape(*kernel.shape[:place], groups, -1, *kernel.shape[place + 1 :])
