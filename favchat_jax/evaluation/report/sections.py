"""Makes a section of the report for each kind of result, as plain data that the page lays out.

Every section has the fields of `EMPTY`; table cells come from `_figure`, or are None.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

from favchat_jax.evaluation.ablations import RENDERED
from favchat_jax.evaluation.benchmarks import title_of
from favchat_jax.evaluation.report import charts
from favchat_jax.evaluation.report.examples import Frames, shown

# Required fields of a file of each kind.
NEEDED = {
    "benchmark": {"benchmark", "model", "n", "complete", "figures", "groups", "samples", "provenance"},
    "ablations": {"variant", "seeds", "steps", "rows", "order", "published_order"},
    "frame_length": {"checkpoint", "trained_on", "rows", "published"},
    "adapter_weights": {"checkpoint", "question", "groups", "cohens_d"},
}
EMPTY = {"lead": "", "warnings": [], "tables": [], "bars": None, "charts": [], "confusions": [], "examples": []}
EMPTY |= {"notes": [], "details": []}
SHARES_OF_HITS = ("accuracy", "war")  # figures for which the majority's answer is a baseline
DRAWN = ("all", "motion", "direction", "emotion", "detail")  # kinds of question in the frame-length chart


def of_benchmark(name: str, results: Sequence[Mapping[str, Any]], frames: Frames, examples: int) -> dict[str, Any]:
    """Makes a benchmark's section: figures beside published ones, groups, curves, confusions, answers, provenance."""
    results = _named(results)
    return {
        **EMPTY,
        "title": title_of(name),
        "lead": f"{max(result['n'] for result in results)} samples.",
        "warnings": [line for result in results for line in _warnings(result)],
        "tables": [_figures_table(results)],
        "bars": _bars(results),
        "charts": _curves(results),
        "confusions": [_confusion(result) for result in results if result.get("confusion")],
        "examples": shown(results, frames, examples),
        "notes": list(dict.fromkeys(note for result in results for note in result.get("notes") or [])),
        "details": [part for result in results for part in _details(result)],
    }


def _named(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Gives the results' models short, unique names; the name of a server's model omits the server."""
    counted: collections.Counter[str] = collections.Counter()
    named = []
    for result in results:
        name = str(result["model"]).rpartition("#")[2] + (" w. FaVChat" if result.get("describer") else "")
        counted[name] += 1
        named.append({**result, "model": f"{name} (run {counted[name]})" if counted[name] > 1 else name})
    return named


def _warnings(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if result.get("incomparable") and result.get("published"):
        reasons = "; ".join(map(str, result["incomparable"]))
        lines.append(f"{result['model']} is not comparable with the published rows: {reasons}.")
    return lines if result["complete"] else [*lines, _incomplete(result)]


def _incomplete(result: Mapping[str, Any]) -> str:
    missing = result.get("missing") or []
    reason = "some figures are missing"
    if missing:
        named = ", ".join(str(sample["id"]) for sample in missing[:3]) + (", ..." if len(missing) > 3 else "")
        reason = f"{len(missing)} listed samples have no result ({named})"
    return f"{result['model']} is incomplete: {reason}. Its figures cover {result['n']} samples."


def _figures_table(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for result in results for name in result["figures"]))
    best = {
        name: max((r["figures"][name]["value"] or 0 for r in results if name in r["figures"]), default=0)
        for name in names
    }
    rows = []
    baseline = _majority(results[0])
    for result in results:
        cells = [_figure(result["figures"].get(name)) for name in names]
        for cell, name in zip(cells, names, strict=True):
            if cell:
                cell["best"] = len(results) > 1 and result["figures"][name]["value"] == best[name]
        rows.append(_row(result["model"], cells, "ours"))
    if baseline is not None:
        cells = [_printed(100 * baseline) if name in SHARES_OF_HITS else None for name in names]
        rows.append(_row("always the most frequent answer", cells, "published", tag="baseline"))
    for row in results[0].get("published") or []:
        cells = [_published(row["figures"].get(name)) for name in names]
        rows.append(_row(row["model"], cells, "published", tag="published"))
    return {"title": "", "head": ["model", *names], "rows": rows}


def _majority(result: Mapping[str, Any]) -> float | None:
    """Returns the share of hits of always giving the most frequent answer; None if answers are not right or wrong."""
    if "majority_baseline" in result:
        return result["majority_baseline"]
    expected = [row.get("expected") for row in result["samples"] if row.get("correct") is not None]
    return collections.Counter(expected).most_common(1)[0][1] / len(expected) if expected else None


def _figure(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Formats a figure: shares in percent, scores unscaled."""
    if found is None or found["value"] is None:
        return None
    scale, digits = found["scale"], 2 if found["scale"] == 100 else 3
    value, low, high = (
        "" if x is None else f"{x * scale:.{digits}f}" for x in (found[n] for n in ("value", "low", "high"))
    )
    return {"value": value, "interval": f"{low} – {high}" if low else "", "best": False}


def _printed(value: float | None, digits: int = 2) -> dict[str, Any] | None:
    return None if value is None else {"value": f"{value:.{digits}f}", "interval": "", "best": False}


def _published(value: float | None) -> dict[str, Any] | None:
    return None if value is None else {"value": f"{value:g}", "interval": "", "best": False}


def _bars(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Draws the first share among the groups' figures, one bar per model; None if no group has a share."""
    groups = list(dict.fromkeys(name for result in results for name in result["groups"]))
    figures = {name: f for r in results for part in r["groups"].values() for name, f in part["figures"].items()}
    shares = [name for name, figure in figures.items() if figure["scale"] == 100]
    if not shares:
        return None
    parts = []
    for group in groups:
        found = [result["groups"].get(group, {"n": 0, "figures": {}}) for result in results]
        bars = [_bar(series, part["figures"].get(shares[0])) for series, part in enumerate(found)]
        majority = (results[0].get("by_kind") or {}).get(group, {}).get("majority_baseline")
        part = {"name": group, "n": max(part["n"] for part in found), "bars": [bar for bar in bars if bar]}
        parts.append({**part, "majority": None if majority is None else round(100 * majority, 1)})
    return {"title": f"{shares[0]} by group", "models": [result["model"] for result in results], "parts": parts}


def _bar(series: int, found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the lengths in percent of a bar and of its interval's line."""
    if found is None or found["value"] is None:
        return None
    low, high = found["low"], found["high"]
    interval = None if low is None else (round(100 * low, 1), round(100 * (high - low), 1))
    return {"series": series, "width": round(100 * found["value"], 1), "range": interval, "figure": _figure(found)}


def _curves(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draws a chart for each kind of curve, with one line per model."""
    drawn: dict[str, dict[str, Any]] = {}
    for result in results:
        for title, curve in (result.get("curves") or {}).items():
            drawn.setdefault(title, {})[result["model"]] = curve
    made = []
    for title, curves in drawn.items():
        first = next(iter(curves.values()))
        points = {model: (curve["x"], curve["y"]) for model, curve in curves.items()}
        made.append({"title": title, "svg": charts.lines(points, first["x_label"], first["y_label"], dots=False)})
    return made


def _confusion(result: Mapping[str, Any]) -> dict[str, Any]:
    labels, counts = result["confusion"]["labels"], result["confusion"]["counts"]
    columns = [*labels, "none"][: len(counts[0])]
    rows = []
    for number, (label, row) in enumerate(zip(labels, counts, strict=True)):
        n = sum(row)
        cells = []
        for column, count in enumerate(row):
            share = count / n if n else 0.0
            shown = f"{100 * share:.0f}" if count else ""
            cells.append(
                {"count": count, "share": share, "percent": round(100 * share), "shown": shown, "hit": column == number}
            )
        rows.append({"label": label, "cells": cells, "n": n})
    return {"model": result["model"], "columns": columns, "rows": rows}


def _details(result: Mapping[str, Any]) -> list[dict[str, str]]:
    parts = [("Provenance", result["provenance"])]
    if result.get("judge"):
        parts.insert(0, ("The judge", result["judge"]))
    if result.get("missing"):
        parts.insert(0, ("Samples without a result", result["missing"]))
    return [
        {"title": f"{title}: {result['model']}", "text": json.dumps(content, indent=1, ensure_ascii=False)}
        for title, content in parts
    ]


def of_ablations(result: Mapping[str, Any]) -> dict[str, Any]:
    """Makes Table 6's section: accuracy, each part's contribution, the paper's figures; then by kind of question."""
    seeds, rows = len(result["seeds"]), result["rows"]
    main = []
    for row in rows:
        figure = row["figures"]["all"]
        cells = [_figure(figure), _figure(figure.get("less")), _over_seeds(figure.get("less"))]
        cells += [_printed(value) for value in row["published"].values()]
        main.append(_row(row["model"], cells, "ours" if row["ablation"] == "none" else ""))
    kinds = [
        _row(kind, [_figure(row["figures"][kind]) for row in rows], tag=f"n {figure['n']}")
        for kind, figure in rows[0]["figures"].items()
        if kind != "all"
    ]
    names = {row["ablation"]: row["model"] for row in rows}
    head = ["model", "held-out accuracy", "full is better by", "interval over seeds"]
    head += [f"{data_set} WAR, published" for data_set in rows[0]["published"]]
    found, printed = (" > ".join(names[arm] for arm in result[name]) for name in ("order", "published_order"))
    steps = ", ".join(f"{stage} {count}" for stage, count in result["steps"].items())
    return {
        **EMPTY,
        "title": f"Table 6 in miniature ({result['variant']})",
        "warnings": [f"These figures are not comparable with the published columns: {RENDERED}."],
        "lead": f"Embedded data, {seeds} seed{'s' * (seeds > 1)}, equal steps: {steps}. Intervals are over questions "
        "(bootstrap over clips) unless stated otherwise.",
        "tables": [
            {"title": "", "head": head, "rows": main},
            {"title": "Accuracy by kind of question", "head": ["kind", *names.values()], "rows": kinds},
        ],
        "notes": [f"Order found: {found}.", f"Order in the paper: {printed}."],
    }


def _over_seeds(figure: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Formats the interval over seeds only."""
    if figure is None or figure["seeds_low"] is None:
        return None
    return {**_figure({**figure, "low": figure["seeds_low"], "high": figure["seeds_high"]}), "value": ""}


def of_frame_lengths(result: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the section on accuracy over the number of frames, beside the published scores."""
    rows, published = result["rows"], dict(result["published"])
    lengths, printed_lengths = [row["frames"] for row in rows], published.pop("frames")
    kinds = {kind: [row["figures"][kind] for row in rows] for kind in rows[0]["figures"]}
    lines = {kind: (lengths, [f["value"] for f in found]) for kind, found in kinds.items() if kind in DRAWN}
    interval = tuple([figure[end] for figure in kinds["all"]] for end in ("low", "high"))
    ours = charts.lines(lines, "frames", "accuracy", bands={"all": interval}, marked=result["trained_on"])
    printed = {name: (printed_lengths, values) for name, values in published.items()}
    body = [_row(kind, [*map(_figure, found)], "ours" if kind == "all" else "") for kind, found in kinds.items()]
    return {
        **EMPTY,
        "title": "Frame length",
        "lead": f"{result['checkpoint']}, trained on {result['trained_on']} frames.",
        "tables": [{"title": "", "head": ["frames", *map(str, lengths)], "rows": body}],
        "charts": [
            {"title": "Held-out accuracy", "svg": ours},
            {"title": "Published scores, read off the figure", "svg": charts.lines(printed, "frames", "score, 0 to 5")},
        ],
    }


def of_adapter_weights(result: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the section on the facial stream's weight for clips with and without a face."""
    groups = result["groups"]
    rows = [
        _row(name, [_printed(x, 3) for x in (group["mean"], group["std"], *group["published"])], tag=f"n {group['n']}")
        for name, group in groups.items()
    ]
    head = ["clips", "mean weight", "standard deviation", "mean, published", "standard deviation, published"]
    drawn = charts.strips({name: group["weights"] for name, group in groups.items()}, "weight")
    return {
        **EMPTY,
        "title": "Weight of the facial stream",
        "lead": f"{result['checkpoint']}, asked: {result['question']} A weight of 0.5 is an even mixture.",
        "tables": [{"title": "", "head": head, "rows": rows}],
        "charts": [{"title": "Each held-out clip", "svg": drawn}],
        "notes": [f"Cohen's d between the two groups: {result['cohens_d']:.2f}."],
    }


def _row(name: str, cells: list[dict[str, Any] | None], kind: str = "", tag: str = "") -> dict[str, Any]:
    return {"kind": kind, "name": name, "tag": tag, "cells": cells}
