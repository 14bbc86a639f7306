"""Computes Table 6, the contribution of each part of the model, from results of several seeds on the same questions.

Every figure has two intervals. The interval over questions says what other held-out clips would give: a bootstrap of
the seeds' average that draws entire clips, since questions about one clip are not independent. The interval over seeds
(Student's t) says what another training run would give; it needs two seeds. Differences from the full model are paired:
same questions, same seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from favchat_jax.errors import UserError
from favchat_jax.evaluation import published
from favchat_jax.evaluation.metrics import mean_figure

FULL = "none"
DATA_SETS = ("DFEW", "MAFW")
RENDERED = "the models are embedded ones and the clips rendered faces"  # `tools.ablate` trains no others

# Variant -> ablation -> the paper's label, and WAR in percent on DFEW and MAFW.
PUBLISHED = {
    variant: dict(zip((FULL, "no_face", "no_granularity", "no_moe"), rows, strict=True))
    for variant, rows in (("v1", published.ABLATIONS), ("v2", published.ABLATIONS_V2))
}


def compare(variant: str, results: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Compares the ablations: figures of each, over all questions and by kind of question.

    Args:
        variant: v1 or v2; selects the published rows.
        results: for each ablation (`none` is the full model), the answers of each seed as rows of clip, kind, question
            and correct.

    Returns:
        `rows`: one per ablation, in the given order, with `ablation`, `model` (the paper's label), `published` and
        `figures`. `order` and `published_order`: ablations by falling accuracy. `figures` has `all` and each kind of
        question: n, value, low, high (over questions), seeds (each seed's value), seeds_low, seeds_high (None for one
        seed). All but the full model also have `less`: the same fields for full minus this ablation.

    Raises:
        UserError: the ablations answered different questions, or have different numbers of seeds.
    """
    asked = _asked(results)
    kinds = np.array([kind for _, _, kind in asked])
    clips = np.unique([clip for clip, _, _ in asked], return_inverse=True)[1]
    hits = {
        arm: np.array([[row["correct"] for row in rows] for rows in seeds], float) for arm, seeds in results.items()
    }
    groups = {"all": np.ones(len(kinds), bool), **{str(kind): kinds == kind for kind in sorted(set(kinds))}}
    rows = []
    for arm, values in hits.items():
        label, *printed = PUBLISHED[variant][arm]
        figures = {}
        for name, chosen in groups.items():
            figures[name] = {"n": int(chosen.sum()), **_figure(values[:, chosen], clips[chosen])}
            if arm != FULL and FULL in hits:
                figures[name]["less"] = _figure((hits[FULL] - values)[:, chosen], clips[chosen])
        beside = dict(zip(DATA_SETS, printed, strict=True))
        rows.append({"ablation": arm, "model": label, "published": beside, "figures": figures})
    return {
        "rows": rows,
        "order": [row["ablation"] for row in sorted(rows, key=lambda row: -row["figures"]["all"]["value"])],
        "published_order": sorted(hits, key=lambda arm: -PUBLISHED[variant][arm][1]),
    }


def _asked(results: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[tuple[str, str, str]]:
    every = [
        (arm, [(row["clip"], row["question"], row["kind"]) for row in rows])
        for arm, seeds in results.items()
        for rows in seeds
    ]
    if len({len(seeds) for seeds in results.values()}) != 1:
        raise UserError("the ablations have different numbers of seeds: evaluate each with the same seeds")
    for arm, asked in every:
        if asked != every[0][1]:
            raise UserError(f"{arm} and {every[0][0]} answered different questions: evaluate both on the same split")
    return every[0][1]


def _figure(values: Float[np.ndarray, "S N"], clips: np.ndarray) -> dict[str, Any]:
    """Returns the mean over S seeds and N questions with both intervals."""
    seeds = values.mean(axis=1)
    figure = {**mean_figure(values.mean(axis=0), seed=0, scale=100, clusters=clips), "seeds": seeds.tolist()}
    if len(seeds) > 1:
        half = stats.t.ppf(0.975, len(seeds) - 1) * seeds.std(ddof=1) / np.sqrt(len(seeds))
        return {**figure, "seeds_low": float(seeds.mean() - half), "seeds_high": float(seeds.mean() + half)}
    return {**figure, "seeds_low": None, "seeds_high": None}


def table(compared: Mapping[str, Any]) -> str:
    """Formats Table 6 for a terminal: accuracy and its drop with both intervals, the paper's row, then each kind."""
    rows = compared["rows"]
    labels = {row["ablation"]: row["model"] for row in rows}
    over = f"{'95 % (questions)':<18}{'95 % (seeds)':<18}"
    lines = [f"{'':<19}{'accuracy':>8}  {over}{'full - this':>11}  {over}{'DFEW':>6}{'MAFW':>7} (paper, WAR)"]
    for row in rows:
        line = f"{row['model']:<19}"
        for figure, width, form in ((row["figures"]["all"], 8, ".3f"), (row["figures"]["all"].get("less"), 11, "+.3f")):
            value = format(figure["value"], form) if figure else ""
            line += f"{value:>{width}}  {interval(figure):<18}{interval(figure, 'seeds_'):<18}"
        lines.append(line + "".join(f"{value:>7.2f}" for value in row["published"].values()))
    lines += [f"NOT COMPARABLE with the paper's columns: {RENDERED}"]
    lines += ["", f"{'kind':<12}{'n':>5}" + "".join(f"{row['model']:>26}" for row in rows)]
    for kind, first in rows[0]["figures"].items():
        cells = [row["figures"][kind] for row in rows]
        lines.append(f"{kind:<12}{first['n']:>5}" + "".join(f"{c['value']:>10.3f} {interval(c):>15}" for c in cells))
    seeds = len(rows[0]["figures"]["all"]["seeds"])
    for name, source in (("order", f"found over {seeds} seed{'s' * (seeds > 1)}"), ("published_order", "in the paper")):
        lines.append(f"order {source}: {' > '.join(labels[arm] for arm in compared[name])}")
    return "\n".join(lines)


def interval(figure: Mapping[str, Any] | None, of: str = "") -> str:
    """Formats [low, high] of a figure, over questions or (`seeds_`) over seeds; empty without an interval."""
    if figure is None or figure[f"{of}low"] is None:
        return ""
    return f"[{figure[f'{of}low']:.3f}, {figure[f'{of}high']:.3f}]"
