"""Defines the format of every evaluation's result, as a dictionary and as the JSON file that `--out` names.

    benchmark     name of the module in evaluation/benchmarks
    model         the evaluated model: a checkpoint's folder, or openai:URL#NAME
    describer     the checkpoint whose descriptions the model also saw, or null
    n             number of samples behind the figures
    incomparable  why the figures are not comparable with published ones, a reason each; empty if they are
    complete      true if every listed sample was evaluated and every figure of the benchmark is present
    missing       listed samples without a result: [{"id", "reason"}]; any entry makes `complete` false
    without_face  names of the clips in which no face was found and whose whole frames the facial encoder read; absent
                  if no face was looked for
    notes         remarks that a reader of the figures must know, one line each
    figures       name -> {"value", "low", "high", "scale"}: value and 95 % bootstrap interval, null if undefined;
                  published tables multiply the figure by `scale`: 100 for shares, 1 for scores
    groups        name of a part (fold, kind of question, protocol) -> {"n", "figures"}
    confusion     {"labels", "counts"}: rows are expected labels, columns predicted ones and, last, none; or null
    curves        name -> {"x", "y", "x_label", "y_label"}, such as the ROC curve of face verification
    published     rows of the paper's table: [{"model", "figures": {name: value as printed}}]
    samples       one object per question: "id", "question", "expected", "answer", "predicted", "correct", and fields
                  of the benchmark ("kind", "fold", "description", "judged", "scores", "likelihood"); "predicted" is
                  the label read from the answer, or null; "correct" is null if no answer counts as right or wrong
    judge         null, or "model", "url", "prompt_version", "left_out" (options that it refuses, such as temperature),
                  "tokens", "cost", and with a second judge "agreement"
    provenance    "config", "checkpoint", "describer", "data", "versions", "seed"

A result does not depend on when the evaluation ran or how often it was interrupted. Benchmarks may add other fields.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.files import is_hidden, replace_file

Figure = dict[str, float | None]
Result = dict[str, Any]

SHOWN = 3  # published rows and missing samples in a terminal; FaVChat's rows are the last of every table
PACKAGES = ("jax", "flax", "numpy", "scikit-learn", "transformers", "av")


def figure(value: float, low: float | None = None, high: float | None = None, scale: int = 1) -> Figure:
    """Makes one figure with its interval; values that are not finite become null, since JSON has no NaN."""
    numbers = {"value": value, "low": low, "high": high}
    known = {name: None if x is None or not math.isfinite(x) else float(x) for name, x in numbers.items()}
    return {**known, "scale": scale}


def make_result(
    benchmark: str,
    samples: Sequence[dict[str, Any]],
    figures: Mapping[str, Figure],
    *,
    groups: Mapping[str, dict[str, Any]] | None = None,
    confusion: dict[str, Any] | None = None,
    curves: Mapping[str, dict[str, Any]] | None = None,
    published: Sequence[dict[str, Any]] = (),
    missing: Sequence[dict[str, str]] = (),
    notes: Sequence[str] = (),
    judge: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    complete: bool = True,
    n: int | None = None,
) -> Result:
    """Makes the result that a benchmark returns; `favchat_jax.evaluate` adds the model and its provenance."""
    return {
        "benchmark": benchmark,
        "n": len(samples) if n is None else n,
        "complete": complete and not missing,
        "missing": list(missing),
        "notes": list(notes),
        "figures": dict(figures),
        "groups": dict(groups or {}),
        "confusion": confusion,
        "curves": dict(curves or {}),
        "published": list(published),
        "judge": judge,
        "data": data,
        "samples": list(samples),
    }


def with_provenance(
    result: Result,
    config: EvaluationConfig,
    model: Mapping[str, Any],
    describer: Mapping[str, Any] | None,
    incomparable: Sequence[str] = (),
) -> Result:
    """Adds the model, config, data, versions and seed to a benchmark's result.

    Args:
        result: the benchmark's result.
        config: the evaluation's config.
        model, describer: a "name" and further facts, such as the checkpoint's step and hash.
        incomparable: why the figures are not comparable with published ones.
    """
    own = {name: value for name, value in result.items() if name not in ("data", "samples")}
    return {
        "benchmark": result["benchmark"],
        "model": model["name"],
        "describer": describer["name"] if describer else None,
        "incomparable": list(incomparable),
        **own,
        "provenance": {
            "config": config.to_json(),
            "checkpoint": dict(model),
            "describer": dict(describer) if describer else None,
            "data": result["data"],
            "versions": versions(),
            "seed": config.seed,
        },
        "samples": result["samples"],
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages on which figures depend."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def data_hash(annotations: Iterable[Path], clips: Iterable[Path]) -> str:
    """Hashes an evaluation's input: the annotations' content, and the clips' names and sizes.

    The size of a folder is its number of frames. The clips' content is not hashed, since reading all clips would take
    as long as the evaluation.
    """
    digest = hashlib.sha256()
    for path in annotations:
        digest.update(path.read_bytes())
    for path in clips:
        size = path.stat().st_size if path.is_file() else -1
        if path.is_dir():
            size = sum(not is_hidden(name) for name in os.listdir(path))
        digest.update(f"{path.name} {size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def write_result(path: Path, result: Result) -> None:
    """Writes a result as JSON."""
    replace_file(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))


def table(result: Result) -> str:
    """Formats the figures for a terminal: with intervals, beside published ones, and for each group."""
    rows = result["published"][-SHOWN:][::-1]
    head = f"{'figure':<24}{'here':>9}{'95 % interval':>20}"
    reasons = result.get("incomparable") if rows else []
    lines = [f"NOT COMPARABLE with published figures: {'; '.join(reasons)}"] if reasons else []
    lines.append(head + "".join(f"{row['model'][:17]:>18}" for row in rows))
    for name, found in result["figures"].items():
        beside = "".join(f"{_number(row['figures'].get(name)):>18}" for row in rows)
        lines.append(f"{name:<24}{_row(found)}{beside}")
    for group, part in result["groups"].items():
        lines += [f"  {f'{group}: {name}':<22}{_row(found)}" for name, found in part["figures"].items()]
    lines.append(f"n = {result['n']}" + ("" if result["complete"] else ", INCOMPLETE"))
    lines += [f"missing: {row['id']}: {row['reason']}" for row in result["missing"][:SHOWN]]
    if len(result["missing"]) > SHOWN:
        lines.append(f"missing: {len(result['missing']) - SHOWN} more, listed in the result")
    text = "\n".join([*lines, *result["notes"]])
    return text.encode(errors="backslashreplace").decode()  # names of files may hold bytes that are no text


def _row(found: Figure) -> str:
    known = (found["value"], found["low"], found["high"])
    value, low, high = (x if x is None else x * found["scale"] for x in known)
    interval = "" if low is None else f"{_number(low)} - {_number(high)}"
    return f"{_number(value):>9}{interval:>20}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
