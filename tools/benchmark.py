"""Our speed beside PyTorch's: python -m tools.benchmark WORK --preset=base --baseline=pytorch --json=F

WORK is one of
train   one step of stage 2
decode  a prompt with its visual tokens, and 64 new tokens, at batch 1 and 8
rollout 8 responses of 64 tokens to one question, drawn by chance, as the reinforcement stage draws them
loader  the training stream by worker processes, beside the bare decoding of the same clips

Both sides have the same weights, shapes and inputs, run in a process each, and take turns; before anything is timed,
what they compute is compared. On a CPU all is float32, on a GPU bfloat16 with float32 weights that train.
"""

import datetime
import functools
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from configs.common import PRESETS
from favchat_jax import command_line
from favchat_jax.errors import RunError, UserError
from favchat_jax.files import replace_file
from tools.beside_pytorch import bare, material, ours
from tools.beside_pytorch.contest import Side, Timing, alternate

LOADER_SECONDS = 4.0  # of each of its runs
GROUP = 8  # responses to a question: the paper's
SAME = 1e-3  # how far apart the losses of both sides may be, relative
# Floating-point operations a second in bfloat16, dense, by what the device's name holds.
PEAK = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H200": 989e12, "RTX 4090": 165e12}
Rows = list[dict[str, Any]]


def train(folder: str, preset: str, baseline: bool, rounds: int, only: Sequence[str] = ()) -> Rows:
    """Rows of the training step: all activations kept, and rematerialised."""
    pairs = {"eager": "kept", "compiled": "kept", "checkpointed": "rematerialised"}
    counterparts = {pairs[setting] for setting in only if setting in pairs}
    timings = _contest(folder, preset, baseline, rounds, "train", only=only, ours_only=counterparts)
    losses = [timing.results[0]["loss"] for side in timings.values() for timing in side.values()]
    if max(losses) - min(losses) > SAME * max(losses):
        raise RunError(f"the two sides' first losses differ: {losses}")
    rows = _rows(timings, lambda setting: pairs[setting], work="train", batch=material.CLIPS, unit="s a step")
    peak = next((PEAK[name] for name in PEAK if name in rows[0]["device"]), None)
    if peak and baseline:
        flops = timings["pytorch"]["eager"].results[0]["flops"]
        rows = [
            {**row, "mfu": flops / row["ours"] / peak, "pytorch_mfu": flops / row["pytorch"] / peak} for row in rows
        ]
    return rows


def decode(
    folder: str, preset: str, baseline: bool, rounds: int, only: Sequence[str] = (), batches: Sequence[int] = (1, 8)
) -> Rows:
    """Rows of answering one question, and several at once."""
    rows = []
    for batch in batches:
        timings = _contest(folder, preset, baseline, rounds, "decode", batch, only=only)
        memory = timings["ours"].pop("memory")
        bandwidth = max(memory.results)
        answers = [timing.results[0]["tokens"] for side in timings.values() for timing in side.values()]
        same = min(agreement(answers[0], other) for other in answers)
        kept = timings["ours"]["merged"].results[1:]
        per_token = sorted(sum(run["per_token"]) / len(run["per_token"]) for run in kept)[len(kept) // 2]
        floor = kept[0]["bytes"] / bandwidth
        growth = sorted(run["per_token"][-1] / run["per_token"][0] for run in kept)[len(kept) // 2]
        more = {
            "seconds_a_token": per_token,
            "memory_bytes_a_second": bandwidth,
            "memory_floor_a_token": floor,
            "over_memory_floor": per_token / floor,
            "last_third_over_first": growth,
            "same_tokens": same,
        }
        found = _rows(timings, lambda _: "merged", work="decode", batch=batch, unit="s an answer of 64 tokens")
        rows += [{**row, **more} for row in found]
    return rows


def rollout(folder: str, preset: str, baseline: bool, rounds: int, only: Sequence[str] = ()) -> Rows:
    """Rows of a group of responses to one question.

    What the sides draw differs by chance; `decode` compares the likeliest tokens. Each goes on until all responses have
    ended or have all their tokens.
    """
    timings = _contest(folder, preset, baseline, rounds, "rollout", GROUP, only=only)
    rows = _rows(timings, lambda _: "group", work="rollout", batch=GROUP, unit="s a group")
    return [{**row, "tokens_a_second": GROUP * ours.TOKENS / row["ours"]} for row in rows]


def agreement(ours: list[list[int]], other: list[list[int]]) -> float:
    """The share of tokens before the first that differs, over all rows; drawn weights leave near ties to rounding.

    Raises:
        RunError: a first token differs, which is drawn from the prompt.
    """
    equal = [
        list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*rows, strict=False)))
        for rows in zip(ours, other, strict=True)
    ]
    if not all(equal):
        raise RunError("the two sides read the prompt differently: their first tokens differ")
    return sum(map(len, equal)) / sum(map(len, ours))


def loader(folder: str, preset: str, baseline: bool, rounds: int, only: Sequence[str] = ()) -> Rows:
    """Rows of the training stream with one worker and with as many as there are cores.

    Of large clips and of small ones, which leave the loader the least time for what is not decoding.
    """
    material.make_footage(folder)
    workers = sorted({1, os.cpu_count() or 1})
    arguments = (workers, (material.LARGE, material.SMALL), LOADER_SECONDS)
    loops = Side("bare", bare.loop, folder, preset, *arguments, only=only)
    timings = _contest(folder, preset, baseline, rounds, "loader", *arguments, only=only, ours_only=only, more=[loops])
    loops = timings.pop("bare")
    rows = _rows(timings, lambda setting: setting, work="loader", batch=material.CLIPS, unit="s a clip")
    for row in rows:
        row["bare_loop"] = loops[row["ours_setting"]].median
        row["share_of_bare_loop"] = row["bare_loop"] / row["ours"]
    return rows


WORKS: dict[str, Callable[..., Rows]] = {"train": train, "decode": decode, "rollout": rollout, "loader": loader}


def _contest(
    folder, preset, baseline, rounds, work, *arguments, only=(), ours_only=(), more=()
) -> dict[str, dict[str, Timing]]:
    sides = [Side("ours", getattr(ours, work), folder, preset, *arguments, only=ours_only), *more]
    try:
        if baseline:
            from tools.beside_pytorch import theirs  # here, not above: with it comes PyTorch

            sides.append(Side("pytorch", getattr(theirs, work), folder, preset, *arguments, only=only))
        return alternate(sides, rounds)
    finally:
        for side in sides:
            side.close()


def _rows(timings: dict[str, dict[str, Timing]], counterpart: Callable[[str], str], **row: Any) -> Rows:
    """A row for each setting of PyTorch's beside our counterpart; without PyTorch, one for each of ours."""
    theirs = timings.get("pytorch")
    pairs = [(counterpart(name), name) for name in theirs] if theirs else [(name, None) for name in timings["ours"]]
    rows = []
    for name, other in pairs:
        mine = timings["ours"][name]
        rows.append({**row, "ours": mine.median, "ours_setting": name, "ours_spread": mine.spread})
        rows[-1] |= {"ours_first": mine.first, "ours_peak_bytes": mine.peak_bytes, "device": mine.device}
        if other:
            its = theirs[other]
            rows[-1] |= {"pytorch": its.median, "pytorch_setting": other, "pytorch_spread": its.spread}
            rows[-1] |= {"pytorch_first": its.first, "pytorch_peak_bytes": its.peak_bytes}
            rows[-1]["ratio"] = its.median / mine.median
    return rows


def table(rows: Rows) -> str:
    """The rows for a person: medians, how many times faster we are, and what the first run took."""
    lines = []
    for row in rows:
        line = f"{row['work']} x{row['batch']}: {row['ours_setting']} {row['ours']:.4g} {row['unit']}"
        line += f" (first run {row['ours_first']:.3g} s)"
        if "pytorch" in row:
            line += f"; PyTorch {row['pytorch_setting']} {row['pytorch']:.4g} (first run {row['pytorch_first']:.3g} s)"
            line += f"; {row['ratio']:.2f} times as fast"
        for name, what in NOTES.items():
            line += f"; {what} {row[name]:.3g}" if name in row else ""
        if row["device"] != "cpu":
            line += f"; {row['device']}, at most {row['ours_peak_bytes'] / 2**30:.1f} GiB"
        lines.append(line)
    return "\n".join(lines)


NOTES = {
    "over_memory_floor": "a token's time over what reading the weights takes",
    "last_third_over_first": "time of the last tokens over that of the first",
    "share_of_bare_loop": "share of the bare decoding loop's speed",
    "mfu": "share of the GPU's peak",
}


def main(work: str) -> None:
    """Measures what the command line names."""
    if work not in WORKS:
        raise UserError(f"{work or 'nothing'} cannot be measured: name one of {', '.join(WORKS)} first")
    if _PRESET.value == "paper":
        raise UserError("--preset=paper has no language model to draw: choose tiny or base")
    if not all(batch.isdecimal() and int(batch) for batch in _BATCHES.value or [""]):
        raise UserError(f"--batches={','.join(_BATCHES.value)}: give whole numbers above 0, as in 1,8")
    if _SETTINGS.value and _BASELINE.value == "none":
        raise UserError(
            f"--settings={','.join(_SETTINGS.value)} names settings of PyTorch, which --baseline=none leaves out"
        )
    if _JSON.value:
        command_line.check_output("--json", _JSON.value)
        _others(Path(_JSON.value), [])
    jax.config.update("jax_platforms", "cpu")  # of this process: an accelerator belongs to the sides
    with tempfile.TemporaryDirectory() as folder:
        material.make(folder, _PRESET.value)
        measure = WORKS[work]
        if work == "decode":
            measure = functools.partial(decode, batches=[int(batch) for batch in _BATCHES.value])
        rows = measure(folder, _PRESET.value, _BASELINE.value == "pytorch", _ROUNDS.value, _SETTINGS.value)
    about = {"preset": _PRESET.value, "rounds": _ROUNDS.value, "date": datetime.date.today().isoformat()}
    about |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    rows = [{**row, **about} for row in rows]
    print(table(rows))
    if _JSON.value:
        _merge(Path(_JSON.value), rows)


def _which(row: dict[str, Any]) -> tuple:
    return row["work"], row["batch"], row["ours_setting"], row.get("pytorch_setting")


def _others(path: Path, rows: Rows) -> Rows:
    """The rows of a file, where there is one, whose settings are not those of `rows`."""
    try:
        measured = {_which(row) for row in rows}
        held = json.loads(path.read_text()) if path.exists() else []
        return [row for row in held if _which(row) not in measured]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--json={path} is there and holds no rows of a benchmark: name another file") from None


def _merge(path: Path, rows: Rows) -> None:
    """Writes the rows; those of other settings that the file holds stay."""
    replace_file(path, json.dumps([*_others(path, rows), *rows], indent=1) + "\n")


if __name__ == "__main__":
    _PRESET = flags.DEFINE_enum("preset", "base", PRESETS, "Sizes of the model")
    _BASELINE = flags.DEFINE_enum("baseline", "pytorch", ("pytorch", "none"), "What to compare with")
    _JSON = flags.DEFINE_string("json", None, "File for the rows")
    _BATCHES = flags.DEFINE_list("batches", ["1", "8"], "decode: how many questions at once")
    _SETTINGS = flags.DEFINE_list("settings", [], "PyTorch's settings to measure; all where none is named")
    _ROUNDS = flags.DEFINE_integer("rounds", 5, "Runs of each setting that count", lower_bound=1)
    named = sys.argv[1:2] if not sys.argv[1:2] or not sys.argv[1].startswith("-") else []
    command_line.start(lambda: main("".join(named)), [sys.argv[0], *sys.argv[1 + len(named) :]])
