"""Runs one part of the accelerator check: correctness, a training step of each stage, or answers, beside PyTorch's."""

import importlib.metadata
import logging
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tools.beside_pytorch.contest import Side, Timing, alternate
from tools.on_accelerator import correct, ours

Keep = Callable[[list[dict[str, Any]]], None]  # takes the rows that a part has so far

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
    """Returns the part that measures a stage's training step."""

    def measure(preset: str, folder: Path, until: float, keep: Keep) -> None:
        _contest("steps", (preset, stage, str(folder)), until, keep)

    return measure


def answers(preset: str, folder: Path, until: float, keep: Keep) -> None:
    """Measures answers and a group of responses."""
    _contest("answers", (preset, str(folder)), until, keep)


PARTS: dict[str, Callable[[str, Path, float, Keep], None]] = {
    "about": about,
    "kernels": correct.kernels,
    "losses": correct.losses,
    "stage2": steps("stage2"),
    "answers": answers,
    "stage3": steps("stage3"),
}


def _contest(build: str, arguments: tuple, until: float, keep: Keep) -> None:
    """Runs our side and, where PyTorch is installed, its side in turns."""
    sides = [Side("ours", getattr(ours, build), *arguments)]
    try:
        try:
            from tools.on_accelerator import theirs  # imports PyTorch, transformers and PEFT

            sides.append(Side("pytorch", getattr(theirs, build), *arguments))
        except ImportError as error:
            log.warning("PyTorch's side is left out: %s", error)
        alternate(sides, ROUNDS, until, lambda timings: keep(_rows(timings)))
    finally:
        for side in sides:
            side.close()


def _rows(timings: dict[str, dict[str, Timing]]) -> list[dict[str, Any]]:
    """Returns a row for each setting of each side: the median seconds, and the medians of what its runs report."""
    rows = []
    for side, settings in timings.items():
        for setting, timing in settings.items():
            row = {"side": side, "setting": setting, "first_seconds": timing.first, "rounds": len(timing.seconds)}
            results = timing.results[1:] or timing.results
            failed = next((result["failed"] for result in timing.results if "failed" in result), None)
            if failed:
                rows.append({**row, "failed": failed})
                continue
            row["seconds"] = timing.median if timing.seconds else math.nan
            row["spread"] = timing.spread if timing.seconds else []
            row |= {name: statistics.median(result[name] for result in results) for name in results[0]}
            rows.append(row)
    return rows
