"""What the processes of one run, one a host, do together. With a single process everything here is immediate.

A process that dies is noticed by the others in seconds where they exchange results with it, and otherwise after
`SILENCE` seconds without a sign of life; both end them with one line.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from favchat_jax.errors import RunError, UserError

SILENCE = 30  # seconds


def join(processes: str) -> None:
    """Connects this process to the others of its run; has to come before any work on a device.

    Args:
        processes: `auto` where a cluster's own settings say it (TPU slices, Slurm), or HOST:PORT,COUNT,INDEX with the
            address of the first process, the number of processes and which of them this one is; empty for one alone.

    Raises:
        UserError: of another form, or the others do not answer.
    """
    if not processes:
        return
    given = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", processes)
    if not given and processes != "auto":
        raise UserError(f"--processes={processes}: give auto, or HOST:PORT,COUNT,INDEX as in 10.0.0.1:9000,2,0")
    address, count, index = (given[1], int(given[2]), int(given[3])) if given else (None, None, None)
    try:
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=SILENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--processes={processes}: {_first_line(error)}") from None


@contextlib.contextmanager
def deaths_told() -> Iterator[None]:
    """Turns what jax raises where another process of the run is gone into one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise RunError(
            f"process {jax.process_index()} of {jax.process_count()} lost another one ({_first_line(error)}): "
            "the last checkpoint is intact; start all processes again"
        ) from None


def is_first() -> bool:
    """Whether this is the process that writes what is written once a run."""
    return jax.process_index() == 0


def first_alone(work: Callable[[], Any]) -> None:
    """Has the first process do `work`, whose result is files, while the others wait."""
    if is_first():
        work()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_alone")


def anyone(flag: bool) -> bool:
    """Whether `flag` is set in any process; all of them have to ask."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def gathered(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The values that all processes give, as JSON can hold them, in the processes' order; all of them have to ask."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.array(text.size))))
    padded = multihost_utils.process_allgather(np.pad(text, (0, longest - text.size), constant_values=ord(" ")))
    return [json.loads(row.tobytes()) for row in padded]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
