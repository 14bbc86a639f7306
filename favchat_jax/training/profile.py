"""Traces some training steps on request, for TensorBoard and Perfetto."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from favchat_jax.errors import UserError

WARM_UP = 2  # steps before a trace begins, which compile and fill queues


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
