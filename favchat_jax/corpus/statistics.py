"""Measures a corpus: a table like the paper's (Section 3), and plots."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from favchat_jax.data import vocabulary
from favchat_jax.files import draft_file, replace_file

COLUMNS = {
    "clips": "clips",
    "heldout": "held out",
    "groups": "source videos or persons",
    "hours": "hours",
    "frames": "frames a clip",
    "summaries": "summaries",
    "pairs": "question-answer pairs",
    "labels": "labels a clip",
    "told": "labels named in the summary",
    "summary_tokens": "tokens a summary",
    "answer_tokens": "tokens an answer",
}
ALL = "all"


def measure(records: Sequence[dict[str, Any]], kept: dict[str, dict[str, Any]], tokenizer: str = "") -> dict[str, Any]:
    """Returns the figures of each source and of all sources together, as JSON numbers by the names of COLUMNS.

    Args:
        records: lines of records.jsonl.
        kept: id -> row of kept.parquet.
        tokenizer: folder of a tokenizer; without one, words and punctuation marks are counted.
    """
    count = _counter(tokenizer)
    sources = sorted({record["source"] for record in records})
    rows = {source: [r for r in records if r["source"] == source] for source in sources} | {ALL: list(records)}
    return {
        "tokens": f"of the tokenizer in {Path(tokenizer).name}" if tokenizer else "words and marks",
        "rows": {source: _figures(chosen, kept, count) for source, chosen in rows.items()},
    }


def _figures(
    records: list[dict[str, Any]], kept: dict[str, dict[str, Any]], count: Callable[[str], int]
) -> dict[str, float]:
    clips = [kept[record["id"]] for record in records]
    answers = [question["answer"] for record in records for question in record["questions"]]
    return {
        "clips": len(records),
        "heldout": sum(record["part"] == "heldout" for record in records),
        "groups": len({record["group"] for record in records}),
        "hours": round(sum(clip["frames"] / clip["fps"] for clip in clips) / 3600, 4),
        "frames": _mean([clip["frames"] for clip in clips]),
        "summaries": sum(bool(record["summary"]) for record in records),
        "pairs": len(answers),
        "labels": _mean([len(record["labels"]) for record in records]),
        "told": _mean([labels_named(record["summary"], record["labels"]) for record in records]),
        "summary_tokens": _mean([count(record["summary"]) for record in records]),
        "answer_tokens": _mean([count(answer) for answer in answers]),
    }


def labels_named(summary: str, labels: Sequence[str]) -> int:
    """Returns how many labels a summary names: it contains all words of the label, in any place and form."""
    words = re.findall(r"[a-z0-9]+", summary.lower())
    return sum(all(any(w.startswith(part) for w in words) for part in _stems(label)) for label in labels)


def _stems(label: str) -> list[str]:
    """Returns the significant words of a label, without endings: wearing_hat -> hat, close_eyes -> clos, eye."""
    parts = [part for part in label.split("_") if part not in ("wearing", "o", "no")]
    return [re.sub(r"(es|s|e)$", "", part) if len(part) > 3 else part for part in parts]


def _counter(tokenizer: str) -> Callable[[str], int]:
    if not tokenizer:
        return lambda text: len(re.findall(r"\w+|[^\w\s]", text))
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return lambda text: len(loaded.encode(text, add_special_tokens=False))


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 2) if values else 0.0


def table(figures: dict[str, Any]) -> str:
    """Returns the figures as a Markdown table, one column per source."""
    rows = figures["rows"]
    lines = [f"| | {' | '.join(rows)} |", f"|---|{'---:|' * len(rows)}"]
    lines += [
        f"| {title} | {' | '.join(f'{row[name]:,}' for row in rows.values())} |" for name, title in COLUMNS.items()
    ]
    return "\n".join([*lines, "", f"Tokens are {figures['tokens']}."])


def write(out: Path, figures: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Writes statistics.json, statistics.md and statistics.png."""
    replace_file(out / "statistics.json", json.dumps(figures, indent=1))
    replace_file(out / "statistics.md", f"{table(figures)}\n")
    _plot(out / "statistics.png", records)


def _plot(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Plots the lengths of the texts, the kinds of questions and the frequencies of the labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    lengths, answers, kinds, labels = figure.subplots(2, 2).ravel()
    count = _counter("")
    lengths.hist([count(record["summary"]) for record in records], bins=30)
    lengths.set(title="Summaries", xlabel="words and marks", ylabel="clips")
    pairs = [question for record in records for question in record["questions"]]
    answers.hist([count(pair["answer"]) for pair in pairs], bins=30)
    answers.set(title="Answers", xlabel="words and marks", ylabel="pairs")
    _bars(kinds, Counter(pair["kind"] for pair in pairs), "Kinds of questions")
    held = Counter(label for record in records for label in record["labels"])
    _bars(labels, held, f"Labels ({len(held)} of {len(vocabulary.VOCABULARY)} occur; the commonest)")
    with draft_file(path) as draft:
        figure.savefig(draft, format="png", metadata={"Software": None}, dpi=80)


def _bars(axes: Any, counts: Counter, title: str) -> None:
    commonest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:30]
    axes.barh(range(len(commonest)), [times for _, times in commonest])
    axes.set_yticks(range(len(commonest)), [name for name, _ in commonest], fontsize=7)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="times")
