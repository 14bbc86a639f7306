"""Says which platform a program is compiled for, so that kernels are picked when it is traced."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

PLAIN = "plain"  # no platform: every kernel is in its plain form, whose products can be counted
_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Picks kernels for "cpu", "gpu", "tpu" or `PLAIN` in this context, also for a machine that is not here."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def platform(default: str = "") -> str:
    """Returns the platform that is compiled for; outside such a context `default`, or this process's backend."""
    return _TARGET.get() or default or jax.default_backend()
