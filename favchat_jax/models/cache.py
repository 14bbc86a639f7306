"""Holds the cache of keys and values with which the language model writes an answer token by token."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from favchat_jax.models.kernels.attention import attention, attention_to_cache
from favchat_jax.sharding import by_clip_and_head


class LayerCache(NamedTuple):
    """Keys and values of one layer, or of all layers along a first axis. Position s is in slot s; S is static.

    They are stored in the layout in which one token's products read them, so that nothing is transposed.
    """

    keys: Float[Array, "*layers R K C S"]
    values: Float[Array, "*layers R K S C"]

    def written(
        self, keys: Float[Array, "R L K C"], values: Float[Array, "R L K C"], first: Int[Array, " R"]
    ) -> "LayerCache":
        """Returns the cache of one layer with L more tokens in each row, from slot `first` on."""

        def write(cache: Array, new: Array, axis: int) -> Array:
            update = partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
            return jax.vmap(update)(cache, new.astype(cache.dtype), first)

        return LayerCache(
            write(self.keys, rearrange(keys, "R L K C -> R K C L"), 2),
            write(self.values, rearrange(values, "R L K C -> R K L C"), 1),
        )


Cache = LayerCache | list[LayerCache]  # of all layers


def empty_layer(rows: int, heads: int, width: int, length: int, dtype: DTypeLike) -> LayerCache:
    """Returns the zeroed cache of one layer with heads of `width`, for `rows` sequences of at most `length` tokens."""
    keys, values = (rows, heads, width, length), (rows, heads, length, width)
    return LayerCache(jnp.zeros(keys, dtype), jnp.zeros(values, dtype))


def by_row_and_head(cache: Cache) -> Cache:
    """Constrains a cache to be split along its rows, as clips are, and its heads."""
    return jax.tree.map(by_clip_and_head, cache)


def repeated(cache: Cache, copies: int) -> Cache:
    """Returns a cache with each row `copies` times."""
    return by_row_and_head(jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=leaf.ndim - 4), cache))


def places(
    embeddings: Float[Array, "R L D"], positions: Int[Array, "R L"] | None, cache: LayerCache | None, window: int | None
) -> tuple[Int[Array, "R L"], Bool[Array, "R S"] | None]:
    """Returns the positions of tokens, and the slots of a cache that they read.

    Args:
        embeddings: of the tokens.
        positions: 0, 1, ... by default.
        cache: of any layer; None for complete sequences.
        window: of the language model.

    Returns:
        The slots are None for complete sequences and for their first tokens, which read each other.
    """
    length, slots = embeddings.shape[1], None
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), embeddings.shape[:2])
    if length == 1 and cache is not None:
        slots = readable(positions[:, 0], cache.values.shape[-2], window)
    return positions, slots


def readable(position: Int[Array, " R"], slots: int, window: int | None) -> Bool[Array, "R S"]:
    """Returns True at the slots that a token at each row's position reads: its own, and earlier ones in the window."""
    distance = position[:, None] - jnp.arange(slots)
    return (distance >= 0) & (distance < (window or slots))


def attend(
    query: Float[Array, "R L A C"],
    key: Float[Array, "R L K C"],
    value: Float[Array, "R L K C"],
    positions: Int[Array, "R L"],
    slots: Bool[Array, "R S"] | None,
    cache: LayerCache | None,
    *,
    mask: Bool[Array, "R 1 1 L"] | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "R L A C"], LayerCache | None]:
    """Returns the causal attention of some tokens, and the cache with their keys and values in it.

    Args:
        query, key, value: of the tokens, rotated to their positions.
        positions, slots: from `places`.
        cache: of this layer; None for complete sequences.
        mask: without slots, False at tokens that none reads.
        window: see `attention`.
    """
    if cache is not None:
        cache = cache.written(key, value, positions[:, 0])
        if slots is not None:
            return attention_to_cache(query, cache.keys, cache.values, slots), cache
    return attention(query, key, value, mask=mask, causal=True, window=window), cache
