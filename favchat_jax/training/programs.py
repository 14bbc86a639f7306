"""Keeps compiled programs, so that a second start compiles nothing again, and traces steps on request."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from favchat_jax.errors import UserError

WARM_UP = 2  # steps before a trace begins, which compile and fill queues


def keep_programs(folder: Path, seconds: float = 1.0) -> None:
    """Keeps programs compiled from now on in `folder/compiled`, unless JAX_COMPILATION_CACHE_DIR names another place.

    CPU programs contain instructions of that processor, so each type of processor has its own folder.

    Args:
        folder: the workdir in training, the user's cache in answering.
        seconds: shortest compilation whose program is kept.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled" / _machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()  # an earlier stage of this process used another folder


def user_cache() -> Path | None:
    """Makes the user's cache of this package, `~/.cache/favchat_jax`; returns None if it cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "favchat_jax"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None


def _machine() -> str:
    if jax.default_backend() != "cpu":
        return jax.default_backend()
    with contextlib.suppress(OSError):
        flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))]
        return f"cpu-{hashlib.sha256(''.join(flags[:1]).encode()).hexdigest()[:12]}"
    return "cpu"


@contextlib.contextmanager
def tracing(workdir: Path, steps: int, first: int) -> Iterator[Callable[[int, Any], None]]:
    """Writes a trace of some steps to `workdir/profile`, for TensorBoard (xplane) and ui.perfetto.dev.

    Args:
        workdir: of the run.
        steps: number of traced steps; 0 for no trace.
        first: step at which the run starts; the trace begins `WARM_UP` steps later.

    Yields:
        A function to call before each step with its number and the state. It waits for the state at both ends.

    Raises:
        UserError: the trace cannot be written.
    """
    running = False

    def stop() -> None:
        nonlocal running
        running = False
        try:
            jax.profiler.stop_trace()
        except OSError as error:
            raise UserError(
                f"{workdir}/profile cannot be written ({error.strerror}): train without --profile"
            ) from None

    def before(step: int, state: Any) -> None:
        nonlocal running
        if steps and step == first + WARM_UP:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(workdir / "profile"), create_perfetto_trace=True)
            running = True
        elif running and step == first + WARM_UP + steps:
            jax.block_until_ready(state)
            stop()

    try:
        yield before
    finally:
        if running:
            stop()
