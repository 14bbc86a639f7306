"""Runs both sides of a comparison in turns: each process builds its side once, then runs one setting on request.

In one process, the libraries' threads would disturb each other. A process that waits for its turn uses no core.
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

# Setting -> a run of it, which measures itself: its seconds and its result.
Runs = dict[str, Callable[[], tuple[float, Any]]]


@dataclasses.dataclass
class Timing:
    """The measurements of one setting.

    Attributes:
        first: seconds of its first run, which includes compilation and warm-up.
        results: results of all runs, including the first.
        seconds: of every timed run.
        device: name of the side's device.
        peak_bytes: peak of the device's memory over all settings of the side.
    """

    first: float
    results: list[Any]
    seconds: list[float] = dataclasses.field(default_factory=list)
    device: str = ""
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        """Returns the median seconds of the timed runs."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> list[float]:
        """Returns the seconds of the fastest and the slowest run."""
        return [min(self.seconds), max(self.seconds)]


class Side:
    """A process with one side's runs.

    Args:
        name: name of the side in error messages.
        build: makes the runs in the process; it must be importable by name, like its `arguments`.
        only: settings to run; by default, all.
    """

    def __init__(self, name: str, build: Callable[..., Runs], *arguments: Any, only: Collection[str] = ()):
        context = multiprocessing.get_context("spawn")
        self.name, self._only = name, only
        self._pipe, theirs = context.Pipe()
        # Not a daemon: the loader's side starts workers.
        self._process = context.Process(target=_serve, args=(theirs, build, arguments))
        self._process.start()
        theirs.close()

    def build(self) -> list[str]:
        """Builds the runs and returns the settings to run. Sides should build one after the other.

        Raises:
            UserError: `only` names an unknown setting.
        """
        self._pipe.send("build")
        settings = self._receive()
        if not set(self._only) <= set(settings):
            raise UserError(f"--settings={','.join(self._only)}: choose from {', '.join(settings)}")
        return [setting for setting in settings if setting in self._only or not self._only]

    def run(self, setting: str) -> tuple[float, Any]:
        """Runs a setting once; returns its seconds and its result."""
        self._pipe.send(setting)
        return self._receive()

    def footprint(self) -> tuple[str, int]:
        """Returns the device and the peak of its memory in bytes."""
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
    """Runs every setting of every side once to warm up, then all of them in turn, `rounds` times.

    Args:
        sides: the sides, in the order of their runs.
        rounds: timed runs of each setting.

    Returns:
        The timings by side and setting.

    Raises:
        RunError: a side failed.
        UserError: a side lacks a requested setting.
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
    """Serves requests in the side's process until its pipe is closed."""
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
