"""What the processes of one run, one a host, do together. With a single process everything here is immediate.

jax itself notices a process that died only after a while, and then aborts the others with a stack trace. Here each
holds a connection to the first one, which the system closes when either dies: whoever sees that ends with one line, so
that all of them end at once.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from favchat_jax.errors import RunError, UserError, one_line

SILENCE = 25  # seconds after which a host that does not answer any more counts as dead
RESTART = "the last checkpoint is intact: start all processes again, and they go on"


@contextlib.contextmanager
def joined(processes: str) -> Iterator[None]:
    """Connects this process to the others of its run, before any work on a device, and lets go of them afterwards.

    Args:
        processes: `auto` where a cluster's own settings say it (TPU slices, Slurm), or HOST:PORT,COUNT,INDEX with the
            address of the first process, the number of processes and which of them this one is; empty for one alone.

    Raises:
        UserError: of another form, or the others do not answer.
        RunError: jax lost another process. Where the connection to it is lost first, this process ends at once with
            exit code 1 and one line.
    """
    if not processes:
        yield
        return
    given = re.fullmatch(r"([^,]+):(\d{1,5}),(\d{1,6}),(\d{1,6})", processes)
    if given and not (0 < int(given[2]) < 2**16 and int(given[4]) < int(given[3])):
        given = None
    if not given and processes != "auto":
        raise UserError(
            f"--processes={processes}: give auto, or HOST:PORT,COUNT,INDEX as in 10.0.0.1:9000,2,0 (INDEX below COUNT)"
        )
    host, place = socket.gethostname(), dict[str, Any]()
    if given:
        host = given[1]
        place = {
            "coordinator_address": f"{host}:{given[2]}",
            "num_processes": int(given[3]),
            "process_id": int(given[4]),
        }
    try:
        # Later than what is noticed here, so that its stack trace is seen only where that fails.
        jax.distributed.initialize(**place, heartbeat_timeout_seconds=2 * SILENCE, shutdown_timeout_seconds=SILENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--processes={processes}: {one_line(error)}") from None
    others = _connect(host)
    left = threading.Event()
    for other in others:
        threading.Thread(target=_watch, args=(other, left), daemon=True).start()
    try:
        yield
        for other in others:
            other.sendall(b".")  # this process ends as it should
    except jax.errors.JaxRuntimeError as error:
        raise RunError(f"{_who()} lost another one ({one_line(error)}); {RESTART}") from None
    finally:
        left.set()
        for other in others:
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_WR)


def _connect(host: str) -> list[socket.socket]:
    """The first process's connections to all others, or theirs to it."""
    server = socket.create_server(("", 0), backlog=jax.process_count())
    first = gathered({"host": host, "port": server.getsockname()[1]})[0]
    if is_first():
        others = [server.accept()[0] for _ in range(jax.process_count() - 1)]
    else:
        others = [socket.create_connection((first["host"], first["port"]), timeout=SILENCE)]
    server.close()
    for other in others:
        other.settimeout(None)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", SILENCE - 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                other.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return others


def _watch(other: socket.socket, left: threading.Event) -> None:
    """Ends this process when the one at the other end ends without having said so."""
    try:
        said = other.recv(1)
    except OSError:  # the host does not answer
        said = b""
    if not said and not left.is_set():
        print(f"{_who()} lost another one, which died or was ended; {RESTART}", file=sys.stderr, flush=True)
        os._exit(1)


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


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
