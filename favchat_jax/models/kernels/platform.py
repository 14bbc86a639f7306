"""Says which platform a program is compiled for, so that kernels are picked when it is traced."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
from jax.sharding import Mesh

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


@contextlib.contextmanager
def computing_on(mesh: Mesh) -> Iterator[None]:
    """Picks kernels for a mesh's devices, unless a context around picks others, and constrains arrays to its axes."""
    target = platform(mesh.devices.flat[0].platform)
    with compiling_for(target), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def platform(default: str = "") -> str:
    """Returns the platform that is compiled for; outside such a context `default`, or this process's backend."""
    return _TARGET.get() or default or jax.default_backend()
