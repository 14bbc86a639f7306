"""Runs the embedded benchmark: short questions about held-out rendered clips, scored by normalised exact match.

Its result also has "accuracy", "majority_baseline" (always giving a kind's most frequent answer) and "by_kind".
"""

from collections.abc import Sequence
from typing import Any

from favchat_jax.data.record import Record
from favchat_jax.data.sources import open_dataset, prepare
from favchat_jax.errors import UserError
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.footage import Footage
from favchat_jax.evaluation.metrics import accuracy_by_kind, exact_matches, majority_baseline, mean_figure, normalise
from favchat_jax.evaluation.respondents import Ask
from favchat_jax.evaluation.result import Result, make_result
from favchat_jax.evaluation.session import Session


def run(config: EvaluationConfig, session: Session) -> Result:
    """Asks the model every question of the split and scores its answers.

    Raises:
        UserError: the split holds no questions.
    """
    folder = prepare(config.data.name, config.data.root or None, config.data.packed)
    source = open_dataset(config.data.name, config.data.packed, config.data.split)
    records = [record for record in (source[i] for i in range(len(source))) if record.questions]
    if not records:
        raise UserError(f"split {config.data.split} of {config.data.name} has no questions: set another data.split")
    if config.limit:
        records = records[: config.limit]
    answers = session.ask([_ask(record) for record in records], config.max_new_tokens)
    rows = [row for record in records if record.id in answers for row in _rows(record, answers[record.id])]
    result = score(rows, config.seed)
    result["missing"], result["complete"] = session.missing, not session.missing
    result["data"] = {"name": config.data.name, "split": config.data.split, "root": folder, "listed": len(records)}
    return result


def score(rows: Sequence[dict[str, Any]], seed: int = 0) -> Result:
    """Makes the benchmark's result from rows of id, clip, kind, question, expected and answer."""
    kinds, references = [row["kind"] for row in rows], [row["expected"] for row in rows]
    hits = exact_matches([row["answer"] for row in rows], references)
    samples = [
        {**row, "predicted": normalise(row["answer"]), "correct": hit} for row, hit in zip(rows, hits, strict=True)
    ]
    by_kind, baseline = accuracy_by_kind(hits, kinds), majority_baseline(references, kinds)
    groups = {kind: [row for row in samples if row["kind"] == kind] for kind in by_kind}
    result = make_result(
        "rendered",
        samples,
        {"accuracy": _accuracy(samples, seed)},
        groups={
            kind: {"n": len(part), "figures": {"accuracy": _accuracy(part, seed)}} for kind, part in groups.items()
        },
    )
    result["accuracy"] = sum(hits) / len(hits)
    result["majority_baseline"] = sum(baseline[kind] * row["n"] for kind, row in by_kind.items()) / len(rows)
    result["by_kind"] = {kind: {**row, "majority_baseline": baseline[kind]} for kind, row in by_kind.items()}
    return result


def table(result: Result) -> str:
    """Formats the result for a terminal: accuracy by kind of question beside the majority baseline."""
    rows = [f"{'kind':<14}{'n':>6}{'accuracy':>10}{'majority':>10}"]
    rows += [
        f"{kind:<14}{row['n']:>6}{row['accuracy']:>10.3f}{row['majority_baseline']:>10.3f}"
        for kind, row in result["by_kind"].items()
    ]
    rows.append(f"{'all':<14}{result['n']:>6}{result['accuracy']:>10.3f}{result['majority_baseline']:>10.3f}")
    return "\n".join([*rows, *result["notes"]])


def _accuracy(samples: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    hits, clips = [row["correct"] for row in samples], [row["clip"] for row in samples]
    return mean_figure(hits, seed, scale=100, clusters=clips)


def _ask(record: Record) -> Ask:
    return Ask(record.id, (Footage(record.id, record.clip),), tuple(((q.question, None),) for q in record.questions))


def _rows(record: Record, answers: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{record.id} {number}",
            "clip": record.id,
            "kind": q.kind,
            "question": q.question,
            "expected": q.answer,
            "answer": answer,
        }
        for number, (q, answer) in enumerate(zip(record.questions, answers, strict=True))
    ]
