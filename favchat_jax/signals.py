"""Ends processes without loss: at SIGTERM and Ctrl-C after saving, and workers with the process that started them."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import TracebackType

log = logging.getLogger("favchat_jax")
INTERRUPTED = 130  # exit code of a process that Ctrl-C ended, as shells count


@contextlib.contextmanager
def termination(meanwhile: str) -> Iterator[threading.Event]:
    """Yields an event that SIGTERM and the first Ctrl-C set instead of ending the process.

    Only the main thread receives signals, so in other threads the event is never set.

    Args:
        meanwhile: work before the process ends; logged after a Ctrl-C.

    Raises:
        KeyboardInterrupt: after the body if there was a Ctrl-C; at once for a second one.
    """
    event, interrupted = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def interrupt(*_) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        interrupted.set()
        event.set()
        log.info("interrupted: %s; Ctrl-C again ends at once", meanwhile)

    signal.signal(signal.SIGTERM, lambda *_: event.set())
    if before[signal.SIGINT] is not signal.SIG_IGN:  # the shell ignores it for background jobs
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted.is_set():
        raise KeyboardInterrupt


def end_at_interrupt(name: str) -> None:
    """Makes a Ctrl-C that nothing handles end this process at once, with one line and exit code 130.

    A normal end would take away threads of the compiler while they work, which crashes. Python itself drops a Ctrl-C
    that arrives within a callback, such as JAX's of the garbage collector.

    Args:
        name: the command, named in the line.
    """
    others, dropped = sys.excepthook, sys.unraisablehook

    def stop() -> None:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # nothing reads it any more
            sys.stdout.flush()
        os._exit(INTERRUPTED)

    def end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            stop()
        others(kind, error, traceback)

    def end_dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            stop()
        if str(unraisable.exc_value) != "Event loop is closed":  # of Orbax' threads after a failed write
            dropped(unraisable)

    sys.excepthook, sys.unraisablehook = end, end_dropped


def end_with_parent() -> None:
    """Ends this worker process as soon as the process that started it has ended, even if it was killed.

    With the last worker gone, Python's resource tracker removes the shared memory that is left.
    """

    def follow(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=follow, args=(parent,), daemon=True).start()
