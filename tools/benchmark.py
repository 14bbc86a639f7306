"""Compares our speed with PyTorch's: python -m tools.benchmark WORK --preset=base --baseline=pytorch --json=F

WORK is one of
train   one step of stage 2
decode  a prompt with its visual tokens, and 64 new tokens, at batch 1 and 8
rollout 8 responses of 64 sampled tokens to one question, as in the reinforcement stage
loader  the training stream by worker processes, compared with bare decoding of the same clips

Both sides have the same weights, shapes and inputs, run in separate processes, and take turns. Their results are
compared before the timed runs. On a CPU everything is float32; on a GPU bfloat16, with float32 trainable weights.
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
from favchat_jax.planning.targets import of_device
from tools.beside_pytorch import bare, material, ours
from tools.beside_pytorch.contest import Side, Timing, alternate

LOADER_SECONDS = 4.0  # length of each of its runs
GROUP = 8  # responses to a question, as in the paper
SAME = 1e-3  # largest relative difference between the losses of both sides
Rows = list[dict[str, Any]]


def train(folder: str, preset: str, baseline: bool, rounds: int, only: Sequence[str] = ()) -> Rows:
    """Measures the training step, with all activations kept and with rematerialisation."""
    pairs = {"eager": "kept", "compiled": "kept", "checkpointed": "rematerialised"}
    counterparts = {pairs[setting] for setting in only if setting in pairs}
    timings = _contest(folder, preset, baseline, rounds, "train", only=only, ours_only=counterparts)
    losses = [timing.results[0]["loss"] for side in timings.values() for timing in side.values()]
    if max(losses) - min(losses) > SAME * max(losses):
        raise RunError(f"the two sides' first losses differ: {losses}")
    rows = _rows(timings, lambda setting: pairs[setting], work="train", batch=material.CLIPS, unit="s a step")
    target = of_device(rows[0]["device"])
    if target and baseline:
        share = timings["pytorch"]["eager"].results[0]["flops"] / target.flops
        rows = [{**row, "mfu": share / row["ours"], "pytorch_mfu": share / row["pytorch"]} for row in rows]
    return rows


def decode(
    folder: str, preset: str, baseline: bool, rounds: int, only: Sequence[str] = (), batches: Sequence[int] = (1, 8)
) -> Rows:
    """Measures answers to one question and to several questions in a batch."""
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
    """Measures a group of responses to one question.

    The sides draw different tokens, so only `decode` compares their tokens. Each side continues until all responses
    have ended or have all their tokens.
    """
    timings = _contest(folder, preset, baseline, rounds, "rollout", GROUP, only=only)
    rows = _rows(timings, lambda _: "group", work="rollout", batch=GROUP, unit="s a group")
    return [{**row, "tokens_a_second": GROUP * ours.TOKENS / row["ours"]} for row in rows]


def agreement(ours: list[list[int]], other: list[list[int]]) -> float:
    """Returns the share of tokens before the first difference, over all rows.

    Random weights have near ties, which rounding decides.

    Raises:
        RunError: the first tokens, which depend only on the prompt, differ.
    """
    equal = [
        list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*rows, strict=False)))
        for rows in zip(ours, other, strict=True)
    ]
    if not all(equal):
        raise RunError("the two sides read the prompt differently: their first tokens differ")
    return sum(map(len, equal)) / sum(map(len, ours))


def loader(folder: str, preset: str, baseline: bool, rounds: int, only: Sequence[str] = ()) -> Rows:
    """Measures the training stream with one worker and with one per core.

    It uses large clips and small ones; with small ones, work other than decoding has the largest share. Large ones are
    also measured with a face crop.
    """
    material.make_footage(folder)
    workers = sorted({1, os.cpu_count() or 1})
    arguments = (workers, (material.LARGE, material.SMALL), LOADER_SECONDS)
    loops = Side("bare", bare.loop, folder, preset, *arguments, only=only)
    timings = _contest(folder, preset, baseline, rounds, "loader", *arguments, only=only, ours_only=only, more=[loops])
    loops = timings.pop("bare")
    facts = {"work": "loader", "batch": material.CLIPS, "unit": "s a clip"}
    rows = _rows(timings, lambda setting: setting, **facts)
    measured = {row["ours_setting"] for row in rows}
    alone = {name: timing for name, timing in timings["ours"].items() if name not in measured}  # with a face crop
    rows += _rows({"ours": alone}, lambda setting: setting, **facts)
    for row in rows:
        size = ",".join(row["ours_setting"].split(",")[:2])  # the loop has no face crop
        row["bare_loop"] = loops[size].median
        row["share_of_bare_loop"] = row["bare_loop"] / row["ours"]
    return rows


WORKS: dict[str, Callable[..., Rows]] = {"train": train, "decode": decode, "rollout": rollout, "loader": loader}


def _contest(
    folder, preset, baseline, rounds, work, *arguments, only=(), ours_only=(), more=()
) -> dict[str, dict[str, Timing]]:
    sides = [Side("ours", getattr(ours, work), folder, preset, *arguments, only=ours_only), *more]
    try:
        if baseline:
            from tools.beside_pytorch import theirs  # imported here, since it imports PyTorch

            sides.append(Side("pytorch", getattr(theirs, work), folder, preset, *arguments, only=only))
        return alternate(sides, rounds)
    finally:
        for side in sides:
            side.close()


def _rows(timings: dict[str, dict[str, Timing]], counterpart: Callable[[str], str], **row: Any) -> Rows:
    """Returns a row for each of PyTorch's settings and our counterpart; without PyTorch, one for each of ours."""
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
    """Returns the rows as text: medians, the first runs' times, and our speed relative to PyTorch's."""
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
    "over_memory_floor": "a token's time relative to reading the weights",
    "last_third_over_first": "time of the last tokens relative to the first",
    "share_of_bare_loop": "share of the bare decoding loop's speed",
    "mfu": "share of the GPU's peak",
}


def main(work: str) -> None:
    """Measures the work that the command line names."""
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
        _other_rows(Path(_JSON.value), [])
    jax.config.update("jax_platforms", "cpu")  # for this process: the sides use the accelerator
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


def _settings(row: dict[str, Any]) -> tuple:
    return row["work"], row["batch"], row["ours_setting"], row.get("pytorch_setting")


def _other_rows(path: Path, rows: Rows) -> Rows:
    """Returns the rows of a file, if it exists, whose settings are not those of `rows`."""
    try:
        measured = {_settings(row) for row in rows}
        held = json.loads(path.read_text()) if path.exists() else []
        return [row for row in held if _settings(row) not in measured]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--json={path} exists and has no rows of a benchmark: name another file") from None


def _merge(path: Path, rows: Rows) -> None:
    """Writes the rows; the file's rows of other settings stay."""
    replace_file(path, json.dumps([*_other_rows(path, rows), *rows], indent=1) + "\n")


if __name__ == "__main__":
    _PRESET = flags.DEFINE_enum("preset", "base", PRESETS, "Sizes of the model")
    _BASELINE = flags.DEFINE_enum("baseline", "pytorch", ("pytorch", "none"), "Implementation to compare with")
    _JSON = flags.DEFINE_string("json", None, "File for the rows")
    _BATCHES = flags.DEFINE_list("batches", ["1", "8"], "decode: numbers of questions in a batch")
    _SETTINGS = flags.DEFINE_list("settings", [], "PyTorch's settings to measure; by default, all")
    _ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed runs of each setting", lower_bound=1)
    named = sys.argv[1:2] if not sys.argv[1:2] or not sys.argv[1].startswith("-") else []
    command_line.start(lambda: main("".join(named)), [sys.argv[0], *sys.argv[1 + len(named) :]])
