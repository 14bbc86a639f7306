"""Runs one part of the accelerator check: correctness, a training step of each stage, or answers, beside PyTorch's."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from favchat_jax.config import Config
from favchat_jax.planning import plan
from tools.beside_pytorch.contest import Side, Timing
from tools.on_accelerator import correct, drawn, ours
from tools.on_accelerator.correct import Keep

ROUNDS = 5
log = logging.getLogger("favchat_jax")


def about(preset: str, folder: Path, until: float, keep: Keep) -> None:
    """Finds the device, the versions, and the rates that the device reaches."""
    del folder, until
    names = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "peft")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    row = {"device": device.device_kind, "platform": device.platform, "devices": jax.device_count()}
    keep([{**row, "usable_bytes": memory, "versions": found, "cores": os.cpu_count(), **ours.rates(preset)}])


def steps(stage: str) -> Callable[[str, Path, float, Keep], None]:
    """Returns the part that measures a stage's training step, with and without rematerialisation on both sides."""

    def measure(preset: str, folder: Path, until: float, keep: Keep) -> None:
        config = drawn.settings(preset, stage, folder)
        pairs = [(f"remat={config.model.remat or 'none'}", "checkpointed"), ("remat=none", "eager")]
        with _both_sides("steps", preset, stage, str(folder)) as sides:
            contest(sides, pairs, until, keep, functools.partial(_flops, config))

    return measure


def answers(preset: str, folder: Path, until: float, keep: Keep) -> None:
    """Measures answers and a group of responses. PyTorch's side runs them uncompiled, then compiled."""
    drawn.settings(preset, "stage3", folder)
    pairs = [(name, name + how) for how in ("", ", compiled") for name in ours.ANSWERS]
    with _both_sides("answers", preset, str(folder)) as sides:
        contest(sides, pairs, until, keep)


def forms(preset: str, folder: Path, until: float, keep: Keep) -> None:
    """Measures answers with int8 kernels, and a group of responses with the weights that train."""
    drawn.settings(preset, "stage3", folder)
    side = Side("ours", ours.forms, preset, str(folder))
    try:
        contest([side], [(f"{name}, {form}",) for form, how in ours.FORMS.items() for name in how[2]], until, keep)
    finally:
        side.close()


PARTS: dict[str, Callable[[str, Path, float, Keep], None]] = {
    "about": about,
    "kernels": correct.kernels,
    "losses": correct.losses,
    "answers": answers,
    "forms": forms,
    "stage2": steps("stage2"),
    "stage3": steps("stage3"),
}


@contextlib.contextmanager
def _both_sides(build: str, *arguments: str) -> Iterator[list[Side]]:
    """Starts our side's process and, where PyTorch, transformers and PEFT are installed, theirs; ends them at the end.

    Args:
        build: name of the function of both sides that returns their runs.
        arguments: of this function.
    """
    sides = [Side("ours", getattr(ours, build), *arguments)]
    try:
        if all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
            from tools.on_accelerator import theirs

            sides.append(Side("pytorch", getattr(theirs, build), *arguments))
        yield sides
    finally:
        for side in sides:
            side.close()


def _flops(config: Config) -> dict[str, float]:
    return {"flops": config.batch * plan.flops_of_one_clip(config)}


def contest(
    sides: Sequence[Side],
    pairs: Sequence[tuple[str, ...]],
    until: float,
    keep: Keep,
    count: Callable[[], dict[str, float]] = dict,
) -> None:
    """Measures pairs of settings one after the other: both sides warm up at the same time, then run in turns.

    Args:
        sides: ours and PyTorch's; or ours alone.
        pairs: our setting and PyTorch's. A setting of several pairs gets one row for all of its runs.
        until: moment of `time.monotonic` from which no pair and no round begins.
        keep: takes the rows after each round.
        count: returns what every row also holds; called while the sides build.
    """
    timings: dict[tuple[str, str], Timing] = {}
    with ThreadPoolExecutor() as both:
        built = both.map(Side.build, sides)
        more = count()
        list(built)
        for pair in pairs:
            if time.monotonic() >= until:
                log.warning("%s and what follows are left out, since the time is over", " and ".join(pair))
                return
            turns = list(zip(sides, pair, strict=False))
            first = list(both.map(lambda turn: turn[0].run(turn[1]), turns))
            for (side, setting), (seconds, result) in zip(turns, first, strict=True):
                timings.setdefault((side.name, setting), Timing(seconds, [result]))
                log.info("%s, %s: the first run took %.4g s", side.name, setting, seconds)
            for number in range(ROUNDS):
                if number and time.monotonic() >= until:
                    break
                for side, setting in turns:
                    seconds, result = side.run(setting)
                    timings[side.name, setting].seconds.append(seconds)
                    timings[side.name, setting].results.append(result)
                keep([row | more for row in _rows(timings)])


def _rows(timings: dict[tuple[str, str], Timing]) -> list[dict[str, Any]]:
    """Returns a row for each setting of each side: the median seconds, and the medians of what its runs report."""
    rows = []
    for (side, setting), timing in timings.items():
        row = {"side": side, "setting": setting, "first_seconds": timing.first, "rounds": len(timing.seconds)}
        failed = next((result["failed"] for result in timing.results if "failed" in result), None)
        if failed:
            rows.append({**row, "failed": failed})
            continue
        row |= {"seconds": timing.median, "spread": timing.spread}
        kept = timing.results[1:]
        rows.append(row | {name: statistics.median(result[name] for result in kept) for name in kept[0]})
    return rows
