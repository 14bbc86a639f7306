"""Coordinates the processes of one run, one on each host. With a single process, every function returns at once.

JAX notices a dead process only after a while, and then aborts the others with a stack trace. Here each process holds a
connection to the first one. The system closes it when either dies, and the other ends at once with one line.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from favchat_jax.errors import RunError, UserError, one_line

REGULAR, REFUSED = b"done\n", b"error: "  # what a process says at its end; its error follows
SAME_ERROR = 5  # seconds in which this process may end with the error that another one has
SILENCE = 25  # seconds after which a host without an answer counts as dead
PLACE = "On each of several hosts: auto (the cluster's own settings) or HOST:PORT,COUNT,INDEX"  # help of --processes
RESUME = "the last checkpoint is intact: start all processes again to resume"


@contextlib.contextmanager
def joined(processes: str, advice: str = RESUME) -> Iterator[None]:
    """Connects this process to the others of its run before any work on a device, and disconnects it afterwards.

    Args:
        processes: `auto` for a cluster's own settings (TPU slices, Slurm), or HOST:PORT,COUNT,INDEX with the address of
            the first process, the number of processes and the index of this one; empty for a single process.
        advice: what is kept, and what to do, if another process dies.

    Raises:
        UserError: the text has another form, or the others do not answer.
        RunError: JAX lost another process. If the connection to it is lost first, this process ends at once with
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
        # Longer than the limit here, so that JAX's stack trace appears only if the connection notices nothing.
        jax.distributed.initialize(**place, heartbeat_timeout_seconds=2 * SILENCE, shutdown_timeout_seconds=SILENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--processes={processes}: {one_line(error)}") from None
    others = _connect(host)
    left = threading.Event()
    for other in others:
        threading.Thread(target=_watch, args=(other, others, left, advice), daemon=True).start()
    try:
        yield
        _tell(others, REGULAR)
    except UserError as error:
        _tell(others, REFUSED + one_line(error).encode() + b"\n")
        raise
    except jax.errors.JaxRuntimeError as error:
        raise RunError(f"{_who()} lost another one ({one_line(error)}); {advice}") from None
    finally:
        left.set()
        for other in others:
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_WR)


def _connect(host: str) -> list[socket.socket]:
    """Returns the first process's connections to all others, or this process's connection to the first."""
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


def _tell(others: Sequence[socket.socket], message: bytes) -> None:
    for other in others:
        with contextlib.suppress(OSError):  # it has ended already
            other.sendall(message)


def _watch(other: socket.socket, others: Sequence[socket.socket], left: threading.Event, advice: str) -> None:
    """Ends this process when the one at the other end dies, or ends with an error that this one does not have."""
    try:
        said = other.makefile("rb").readline()
    except OSError:  # the host does not answer
        said = b""
    if said == REGULAR or left.is_set() or (said.startswith(REFUSED) and left.wait(SAME_ERROR)):
        return
    if said.startswith(REFUSED):
        left.set()  # the others end for the same reason, and none of them counts as lost
        _tell([one for one in others if one is not other], said)
        reason = said.removeprefix(REFUSED).decode().strip()
        print(f"{_who()} ends because another one did: {reason}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()  # for which the other one waits
        os._exit(2)
    print(f"{_who()} lost another one, which died or was killed; {advice}", file=sys.stderr, flush=True)
    os._exit(1)


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def is_first() -> bool:
    """Returns whether this process writes the files that a run writes once."""
    return jax.process_index() == 0


def share_of(items: Sequence[Any]) -> Sequence[Any]:
    """Returns the items that this process works on, if all share them out one by one."""
    return items[jax.process_index() :: jax.process_count()]


def first_alone(work: Callable[[], Any]) -> None:
    """Runs `work`, which writes files, in the first process while the others wait."""
    if is_first():
        work()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_alone")


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is set in any process; all of them have to call it."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def agreed(work: Callable[[], Any]) -> Any:
    """Returns what `work` gives (JSON) in the first process; all of them have to call it.

    Raises:
        UserError: `work` raised it in the first process.
    """
    if jax.process_count() == 1:
        return work()
    found: dict[str, Any] = {}
    if is_first():
        try:
            found = {"value": work()}
        except UserError as error:
            found = {"error": str(error)}
    found = gathered(found)[0]
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


def gathered(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the values (JSON) of all processes in their order; all of them have to call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.array(text.size))))
    padded = multihost_utils.process_allgather(np.pad(text, (0, longest - text.size), constant_values=ord(" ")))
    return [json.loads(row.tobytes()) for row in padded]
