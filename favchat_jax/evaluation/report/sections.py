"""A section of the report for each kind of result, as plain data that the page lays out."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from favchat_jax.evaluation.report import charts
from favchat_jax.evaluation.report.examples import Frames, shown

# Fields that a file of each kind must have.
NEEDED = {
    "benchmark": {"benchmark", "model", "n", "complete", "figures", "groups", "samples", "provenance"},
    "ablations": {"variant", "seeds", "steps", "rows", "order", "published_order"},
    "frame_length": {"checkpoint", "trained_on", "rows", "published"},
    "adapter_weights": {"checkpoint", "question", "groups"},
}
EMPTY = {"lead": "", "warnings": [], "tables": [], "bars": None, "charts": [], "confusions": [], "examples": []}
EMPTY |= {"notes": [], "details": []}


TITLES = {
    "dfec": "DFEC, expressions described (Table 1)",
    "dfew": "DFEW, emotions (Table 3)",
    "mafw": "MAFW, emotions (Table 3)",
    "emer": "EMER, emotions explained (Table 4)",
    "youtube_faces": "YouTube Faces, the same person (Table 5)",
    "held_out_qa": "Held-out questions of v2",
    "rendered": "Rendered faces, held-out",
}


def of_benchmark(name: str, results: Sequence[Mapping[str, Any]], frames: Frames, examples: int) -> dict[str, Any]:
    """Figures of all models with the published ones, by group, curves, confusions, answers, and where it is from."""
    results = _named(results)
    warnings = []
    for result in results:
        if not result["complete"]:
            missing = result.get("missing") or []
            named = ", ".join(str(sample["id"]) for sample in missing[:3]) + (", ..." if len(missing) > 3 else "")
            what = (
                f"{len(missing)} listed samples without a result ({named})" if missing else "some figures are missing"
            )
            warnings.append(f"{result['model']} is incomplete: {what}. Its figures are of {result['n']} samples.")
    curves = {}
    for result in results:
        for title, curve in (result.get("curves") or {}).items():
            curves.setdefault(title, {})[result["model"]] = curve
    return {
        **EMPTY,
        "title": TITLES.get(name, name),
        "lead": f"{max(result['n'] for result in results)} samples.",
        "warnings": warnings,
        "tables": [_figures_table(results)],
        "bars": _bars(results),
        "charts": [{"title": title, "svg": _curve(series)} for title, series in curves.items()],
        "confusions": [_confusion(result) for result in results if result.get("confusion")],
        "examples": shown(results, frames, examples),
        "notes": list(dict.fromkeys(note for result in results for note in result.get("notes") or [])),
        "details": [part for result in results for part in _details(result)],
    }


def _named(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results with short names for their models, each name once: a server's model without the server."""
    named: list[dict[str, Any]] = []
    for result in results:
        name = str(result["model"]).rpartition("#")[2] + (" w. FaVChat" if result.get("describer") else "")
        same = sum(other["model"].partition(" (run ")[0] == name for other in named)
        named.append({**result, "model": f"{name} (run {same + 1})" if same else name})
    return named


def _figures_table(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for result in results for name in result["figures"]))
    best = {
        name: max((r["figures"][name]["value"] or 0 for r in results if name in r["figures"]), default=0)
        for name in names
    }
    rows = []
    for result in results:
        cells = [_figure(result["figures"].get(name)) for name in names]
        for cell, name in zip(cells, names, strict=True):
            if cell:
                cell["best"] = len(results) > 1 and result["figures"][name]["value"] == best[name]
        rows.append({"kind": "ours", "name": result["model"], "tag": "", "cells": cells})
    for row in results[0].get("published") or []:
        cells = [_published(row["figures"].get(name)) for name in names]
        rows.append({"kind": "published", "name": row["model"], "tag": "published", "cells": cells})
    return {"title": "", "head": ["model", *names], "rows": rows}


def _figure(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A figure as it is printed: shares in percent, scores as they are."""
    if found is None or found["value"] is None:
        return None
    scale, digits = found.get("scale", 1), 2 if found.get("scale", 1) == 100 else 3
    value, low, high = (
        "" if x is None else f"{x * scale:.{digits}f}" for x in (found[n] for n in ("value", "low", "high"))
    )
    return {"value": value, "interval": f"{low} – {high}" if low else "", "best": False}


def _printed(value: float | None, digits: int = 2) -> dict[str, Any] | None:
    return None if value is None else {"value": f"{value:.{digits}f}", "interval": "", "best": False}


def _published(value: float | None) -> dict[str, Any] | None:
    return None if value is None else {"value": f"{value:g}", "interval": "", "best": False}


def _bars(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first share among each group's figures, a bar a model."""
    groups = list(dict.fromkeys(name for result in results for name in result["groups"]))
    measure = next(
        (
            n
            for r in results
            for part in r["groups"].values()
            for n, f in part["figures"].items()
            if f.get("scale") == 100
        ),
        None,
    )
    if measure is None:
        return None
    parts = []
    for group in groups:
        bars = []
        for series, result in enumerate(results):
            found = result["groups"].get(group, {}).get("figures", {}).get(measure)
            if found and found["value"] is not None:
                low, high = found["low"], found["high"]
                bars.append(
                    {
                        "series": series,
                        "width": round(100 * found["value"], 1),
                        "range": None if low is None else (round(100 * low, 1), round(100 * (high - low), 1)),
                        "figure": _figure(found),
                    }
                )
        if bars:
            n = next(result["groups"][group]["n"] for result in results if group in result["groups"])
            parts.append({"name": group, "n": n, "bars": bars})
    return {"title": f"{measure} by group", "models": [result["model"] for result in results], "parts": parts}


def _curve(series: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(series.values()))
    points = {name: (curve["x"], curve["y"]) for name, curve in series.items()}
    return charts.lines(points, first["x_label"], first["y_label"], dots=False)


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
    parts = [("Where it is from", result["provenance"])]
    if result.get("judge"):
        parts.insert(0, ("The judge", result["judge"]))
    if result.get("missing"):
        parts.insert(0, ("Samples without a result", result["missing"]))
    return [
        {"title": f"{title}: {result['model']}", "text": json.dumps(content, indent=1, ensure_ascii=False)}
        for title, content in parts
    ]


def of_ablations(result: Mapping[str, Any]) -> dict[str, Any]:
    """Table 6 in miniature: accuracy, what each part is worth, the paper's figures; then by kind of question."""
    seeds, rows = len(result["seeds"]), result["rows"]

    def cell(figure: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return figure and _figure({**figure, "scale": 100})

    def over_seeds(figure: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if figure is None or figure["seeds_low"] is None:
            return None
        told = _figure({**figure, "low": figure["seeds_low"], "high": figure["seeds_high"], "scale": 100})
        return {**told, "value": ""}

    main = []
    for row in rows:
        figure, published = row["figures"]["all"], row["published"]
        cells = [cell(figure), cell(figure.get("less")), over_seeds(figure.get("less"))]
        cells += [_printed(value) for value in published.values()]
        main.append(
            {"kind": "ours" if row["ablation"] == "none" else "", "name": row["model"], "tag": "", "cells": cells}
        )
    kinds = [
        {
            "kind": "",
            "name": kind,
            "tag": f"n {rows[0]['figures'][kind]['n']}",
            "cells": [cell(r["figures"][kind]) for r in rows],
        }
        for kind in rows[0]["figures"]
        if kind != "all"
    ]
    names = {row["ablation"]: row["model"] for row in rows}
    head = ["model", "held-out accuracy", "full is better by", "interval over seeds"]
    head += [f"{data_set} WAR, published" for data_set in rows[0]["published"]]
    orders = {name: " > ".join(names[arm] for arm in result[name]) for name in ("order", "published_order")}
    return {
        **EMPTY,
        "title": f"Table 6 in miniature ({result['variant']})",
        "lead": f"Embedded data, {seeds} seed{'s' * (seeds > 1)}, equal steps: "
        + ", ".join(f"{stage} {count}" for stage, count in result["steps"].items())
        + ". Intervals over questions (whole clips drawn) unless said otherwise.",
        "tables": [
            {"title": "", "head": head, "rows": main},
            {"title": "Accuracy by kind of question", "head": ["kind", *names.values()], "rows": kinds},
        ],
        "notes": [f"Order found: {orders['order']}.", f"Order in the paper: {orders['published_order']}."],
    }


def of_frame_lengths(result: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy over the number of frames, beside the published scores."""
    rows, published = result["rows"], dict(result["published"])
    at = [row["frames"] for row in rows]
    whole = [row["figures"]["all"] for row in rows]
    ours = {kind: (at, [row["figures"][kind]["value"] for row in rows]) for kind in rows[0]["figures"]}
    spread = {"all": ([figure["low"] for figure in whole], [figure["high"] for figure in whole])}
    frames = published.pop("frames")
    cells = [[_figure({**row["figures"][kind], "scale": 100}) for row in rows] for kind in ours]
    chosen = {kind: line for kind, line in ours.items() if kind in ("all", "motion", "emotion", "detail", "direction")}
    return {
        **EMPTY,
        "title": "Frame length",
        "lead": f"{result['checkpoint']}, trained on {result['trained_on']} frames.",
        "charts": [
            {
                "title": "Held-out accuracy",
                "svg": charts.lines(chosen, "frames", "accuracy", bands=spread, marked=result["trained_on"]),
            },
            {
                "title": "Published scores of FaVChat, read off the figure",
                "svg": charts.lines(
                    {name: (frames, values) for name, values in published.items()}, "frames", "score, 0 to 5"
                ),
            },
        ],
        "tables": [
            {
                "title": "",
                "head": ["frames", *map(str, at)],
                "rows": [
                    {"kind": "ours" if kind == "all" else "", "name": kind, "tag": "", "cells": row}
                    for kind, row in zip(ours, cells, strict=True)
                ],
            }
        ],
    }


def of_adapter_weights(result: Mapping[str, Any]) -> dict[str, Any]:
    """How much the facial stream weighs on clips with a face and without one."""
    groups = result["groups"]
    rows = [
        {
            "kind": "",
            "name": name,
            "tag": f"n {group['n']}",
            "cells": [_printed(x, 3) for x in (group["mean"], group["std"], *group["published"])],
        }
        for name, group in groups.items()
    ]
    head = ["clips", "mean weight", "standard deviation", "mean, published", "standard deviation, published"]
    return {
        **EMPTY,
        "title": "Weight of the facial stream",
        "lead": f"{result['checkpoint']}, asked: {result['question']} One half is even.",
        "tables": [{"title": "", "head": head, "rows": rows}],
        "charts": [
            {
                "title": "Each held-out clip",
                "svg": charts.strips({n: g["weights"] for n, g in groups.items()}, "weight"),
            }
        ],
        "notes": [f"Cohen's d between the two: {result['cohens_d']:.2f}."],
    }
