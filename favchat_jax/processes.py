"""Coordinates the processes of one run, one on each host. With a single process, every function returns at once.

JAX notices a dead process only after a while, and then aborts the others with a stack trace. Here each process holds a
connection to the first one. The system closes it when either dies, and the other ends at once with one line.
"""

import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from favchat_jax.errors import RunError, UserError, one_line

log = logging.getLogger("favchat_jax")

REGULAR, REFUSED = b"done\n", b"error: "  # what a process says at its end; its error follows
SAME_ERROR = 5  # seconds in which this process may end with the error that another one has
HELLO = "favchat_jax process"  # begins what processes say to each other before they join
PATIENCE = 300  # seconds in which all processes must come, since hosts start one after another
SILENCE = 25  # seconds after which a host without an answer counts as dead
PLACE = "On each of several hosts: auto (the cluster's own settings) or HOST:PORT,COUNT,INDEX"  # help of --processes
RESUME = "the last checkpoint is intact: start all processes again to resume"


@contextlib.contextmanager
def joined(processes: str, settings: Any = None, advice: str = RESUME) -> Iterator[None]:
    """Connects this process to the others of its run before any work on a device, and disconnects it afterwards.

    Args:
        processes: `auto` for a cluster's own settings (TPU slices, Slurm), or HOST:PORT,COUNT,INDEX with the address of
            the first process, the number of processes and the index of this one; empty for a single process.
        settings: what all processes must have been given alike, as JSON.
        advice: what is kept, and what to do, if another process dies.

    Raises:
        UserError: the text has another form, the others do not come, or they have other settings.
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
        _meet(host, int(given[2]), int(given[3]), int(given[4]))
    # JAX would otherwise take SIGTERM for itself and go on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # Longer than the limit here, so that JAX's stack trace appears only if the connection notices nothing.
        jax.distributed.initialize(**place, heartbeat_timeout_seconds=2 * SILENCE, shutdown_timeout_seconds=SILENCE)
    except (RuntimeError, ValueError) as error:
        hint = "" if given else "; where no cluster says it, give HOST:PORT,COUNT,INDEX"
        raise UserError(f"--processes={processes}: {one_line(error)}{hint}") from None
    others = _connect(host, settings)
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


def _meet(host: str, port: int, count: int, index: int) -> None:
    """Waits until all processes are there; JAX would wait without a word, and then end with a stack trace.

    Raises:
        UserError: not all come within `PATIENCE`, two have the same index, or the first one cannot listen at the port.
    """
    end, where = time.monotonic() + PATIENCE, f"{host}:{port}"
    soon = threading.Timer(5, lambda: log.info("waiting until all %d processes have come to %s", count, where))
    soon.daemon = True
    soon.start()
    try:
        if index == 0:
            _gather(port, count, end)
        else:
            _come(host, port, count, index, end)
    except (OSError, ValueError) as error:
        missing = "not all processes came" if isinstance(error, TimeoutError) else one_line(error)
        raise UserError(
            f"--processes: no meeting of {count} processes at {where} ({missing}): give all the same HOST:PORT and "
            "COUNT, and each its own INDEX"
        ) from None
    finally:
        soon.cancel()


def _gather(port: int, count: int, end: float) -> None:
    """Waits for the other processes, as the first one, and tells them that all are there."""
    came: dict[str, socket.socket] = {}
    with contextlib.ExitStack() as at_end, socket.create_server(("", port), backlog=count) as server:
        while len(came) < count - 1:
            server.settimeout(max(0.01, end - time.monotonic()))
            other = at_end.enter_context(server.accept()[0])
            other.settimeout(5)
            said = other.makefile("rb").readline().decode(errors="replace").strip()
            if said in came or said == f"{HELLO} 0 of {count}":
                raise ValueError(f"two processes have INDEX {said.split()[2]}")
            if said in {f"{HELLO} {number} of {count}" for number in range(1, count)}:
                came[said] = other
        for other in came.values():
            other.sendall(f"{HELLO}\n".encode())
        for other in came.values():
            other.recv(1)  # the other one closes first, which frees the port at once


def _come(host: str, port: int, count: int, index: int, end: float) -> None:
    """Goes to the first process, as another one, and waits for its word."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as first:
                first.sendall(f"{HELLO} {index} of {count}\n".encode())
                first.settimeout(max(0.01, end - time.monotonic()))
                if first.makefile("rb").readline() == f"{HELLO}\n".encode():
                    return
        except OSError:
            if time.monotonic() >= end:
                raise TimeoutError from None
        if time.monotonic() >= end:
            raise TimeoutError
        time.sleep(0.3)


def _connect(host: str, settings: Any) -> list[socket.socket]:
    """Returns the first process's connections to all others, or this process's connection to the first.

    Raises:
        UserError: the processes have different settings.
    """
    server = socket.create_server(("", 0), backlog=jax.process_count())
    met = gathered({"host": host, "port": server.getsockname()[1], "settings": settings})
    first = met[0]
    if any(other["settings"] != first["settings"] for other in met):
        raise UserError("the processes were given different settings: start the same command on every host")
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
