"""What models say about many devices: which arrays have clips, or parts of clips, along their first axis.

Without such hints the compiler may follow a weight's partition instead and cut activations along their channels. The
models know no mesh; whoever compiles them for one says with `clips_over` how clips lie on it.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, Shaped

_CLIPS: contextvars.ContextVar[NamedSharding | None] = contextvars.ContextVar("clips", default=None)


@contextlib.contextmanager
def clips_over(sharding: NamedSharding) -> Iterator[None]:
    """While a model is traced in it, `by_clip` cuts the first axis as `sharding` does."""
    token = _CLIPS.set(sharding)
    try:
        yield
    finally:
        _CLIPS.reset(token)


def by_clip(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """`x` with its first axis cut as clips are and its other axes whole; unchanged outside `clips_over`."""
    sharding = _CLIPS.get()
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
