"""Processes that take turns: each builds its side of a comparison once, then runs one setting whenever it is told to.

Threads of one library would disturb the other's within a process; a process that waits for its turn uses no core.
"""

import dataclasses
import logging
import multiprocessing
import resource
import statistics
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax

from favchat_jax import command_line
from favchat_jax.errors import RunError, UserError

log = logging.getLogger("favchat_jax")

# Setting -> a run of it, which measures itself: its seconds, and what it computed.
Runs = dict[str, Callable[[], tuple[float, Any]]]


@dataclasses.dataclass
class Timing:
    """What was measured of one setting.

    Attributes:
        first: seconds of its first run: compiling and warming up.
        seconds: of every run that counts.
        results: what each run computed, the first one's included.
        device: what the side ran on.
        peak_bytes: of the device's memory that the side has held at once, in any of its settings.
    """

    first: float
    results: list[Any]
    seconds: list[float] = dataclasses.field(default_factory=list)
    device: str = ""
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        """Seconds of the middle run."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> list[float]:
        """Seconds of the fastest and of the slowest run."""
        return [min(self.seconds), max(self.seconds)]


class Side:
    """A process with one side's runs.

    Args:
        name: what to call it where it fails.
        build: makes the runs, in the process; importable by name, as are its `arguments`.
        only: settings to run; all that there are where none is named.
    """

    def __init__(self, name: str, build: Callable[..., Runs], *arguments: Any, only: Collection[str] = ()):
        context = multiprocessing.get_context("spawn")
        self.name, self._only = name, only
        self._pipe, theirs = context.Pipe()
        # Not a daemon: the loader's side has workers of its own.
        self._process = context.Process(target=_serve, args=(theirs, build, arguments))
        self._process.start()
        theirs.close()

    def build(self) -> list[str]:
        """Builds the runs, which no other side should do at the same time; the settings to run.

        Raises:
            UserError: there is no setting of a name in `only`.
        """
        self._pipe.send("build")
        settings = self._receive()
        if not set(self._only) <= set(settings):
            raise UserError(f"--settings={','.join(self._only)}: choose from {', '.join(settings)}")
        return [setting for setting in settings if setting in self._only or not self._only]

    def run(self, setting: str) -> tuple[float, Any]:
        """One run: its seconds, and what it computed."""
        self._pipe.send(setting)
        return self._receive()

    def footprint(self) -> tuple[str, int]:
        """The device, and the peak of its memory in bytes."""
        self._pipe.send(None)
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RunError(f"{self.name} ended with exit code {self._process.exitcode}: it may lack memory") from None
        if failed:
            raise RunError(f"{self.name} failed: {value}")
        return value

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()


def alternate(sides: Sequence[Side], rounds: int) -> dict[str, dict[str, Timing]]:
    """Runs every setting of every side once to warm up, then all of them in turn, `rounds` times: side -> setting.

    Args:
        sides: whose settings are run, in this order.
        rounds: runs of each that count.

    Raises:
        RunError: a side failed.
        UserError: a side has not the settings that it shall run.
    """
    timings: dict[str, dict[str, Timing]] = {side.name: {} for side in sides}
    for side in sides:
        for setting in side.build():
            seconds, result = side.run(setting)
            timings[side.name][setting] = Timing(seconds, [result])
            log.info("%s, %s: the first run took %.4g s", side.name, setting, seconds)
    for _ in range(rounds):
        for side in sides:
            for setting, timing in timings[side.name].items():
                seconds, result = side.run(setting)
                timing.seconds.append(seconds)
                log.info("%s, %s: %.4g s", side.name, setting, seconds)
                timing.results.append(result)
    for side in sides:
        device, peak = side.footprint()
        for timing in timings[side.name].values():
            timing.device, timing.peak_bytes = device, peak
    return timings


def _serve(pipe: Connection, build: Callable[..., Runs], arguments: tuple) -> None:
    """What the process does until its pipe is closed."""
    command_line.keep_freed_memory()
    try:
        pipe.recv()
        runs = build(*arguments)
        pipe.send((False, list(runs)))
        while True:
            setting = pipe.recv()
            pipe.send((False, _footprint() if setting is None else runs[setting]()))
    except EOFError:
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send((True, f"{type(error).__name__}: {error}"))


def _footprint() -> tuple[str, int]:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    device = jax.devices()[0]
    if device.platform == "gpu":
        return device.device_kind, device.memory_stats()["peak_bytes_in_use"]
    return "cpu", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
