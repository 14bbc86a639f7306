"""Classifies emotions (Table 3) by three methods: describe and infer, answer directly, or score the class names.

UAR and WAR are averaged over folds. Answers without a class count as errors; the last column of the confusion matrix
lists them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.footage import Footage
from favchat_jax.evaluation.labels import decide, emotion_names
from favchat_jax.evaluation.metrics import confusion, recall_figures
from favchat_jax.evaluation.respondents import Ask
from favchat_jax.evaluation.result import Result, make_result
from favchat_jax.evaluation.session import Session, present


@dataclass(frozen=True)
class Listed:
    """A clip in a fold's list; `path` is None if its file is missing."""

    id: str
    path: Path | None
    label: str


def classify(
    config: EvaluationConfig,
    session: Session,
    root: Path,
    folds: Mapping[str, Sequence[Listed]],
    classes: Mapping[str, str],
) -> Result:
    """Classifies the clips of all folds and scores each fold.

    Args:
        config: method, describe, question, description_tokens, max_new_tokens, limit (clips per fold), seed.
        session: session with the model.
        root: the data set's folder, named in messages about missing clips.
        folds: clips of each fold.
        classes: class name -> its emotion in `labels.SYNONYMS`.
    """
    folds = {fold: clips[: config.limit or None] for fold, clips in folds.items()}
    listed = {clip.id: clip for clips in folds.values() for clip in clips}
    there = present([(id, clip.path) for id, clip in listed.items()], session, root)
    answers = _answer(config, session, {id: Footage(id, path) for id, path in there}, list(classes))
    samples, matrices = [], {}
    for fold, clips in folds.items():
        rows = [_row(clip, fold, answers[clip.id], classes) for clip in clips if clip.id in answers]
        samples += rows
        matrices[fold] = _matrix(rows, list(classes))
    undecided = sum(row["predicted"] is None for row in samples)
    return make_result(
        config.benchmark,
        samples,
        recall_figures(list(matrices.values()), config.seed),
        groups={
            fold: {"n": int(counts.sum()), "figures": recall_figures([counts], config.seed)}
            for fold, counts in matrices.items()
        },
        confusion={"labels": list(classes), "counts": sum(matrices.values()).tolist()},
        missing=session.missing,
        notes=[f"{undecided} of {len(samples)} answers name no single class and count as wrong"] if undecided else [],
    )


def _answer(
    config: EvaluationConfig, session: Session, clips: Mapping[str, Footage], classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns the question and answer of each clip by its id, with the description or the log-probabilities."""
    question = config.question.format(classes=", ".join(classes))
    direct = {id: Ask(id, (clip,), (((question, None),),)) for id, clip in clips.items()}
    if config.method == "likelihood":
        weights = session.likelihoods(list(direct.values()), classes)
        return {
            id: {
                "question": question,
                "answer": classes[int(np.argmax(row))],
                "likelihood": dict(zip(classes, row, strict=True)),
            }
            for id, row in weights.items()
        }
    descriptions: dict[str, list[str]] = {}
    if config.method == "describe":
        wanted = [Ask(id, (clip,), (((config.describe, None),),)) for id, clip in clips.items()]
        descriptions = session.ask(wanted, config.description_tokens, "describing")
        # An empty description cannot be an earlier turn: such a clip is asked about directly.
        direct = {
            id: _after(direct[id], config.describe, text) if text else direct[id]
            for id, (text,) in descriptions.items()
        }
    answers = session.ask(list(direct.values()), config.max_new_tokens, "classifying")
    extra = {id: {"description": text} for id, (text,) in descriptions.items()}
    return {id: {"question": question, "answer": answer, **extra.get(id, {})} for id, (answer,) in answers.items()}


def _after(ask: Ask, question: str, answer: str) -> Ask:
    return Ask(ask.id, ask.clips, tuple(((question, answer), *turns) for turns in ask.conversations))


def _row(clip: Listed, fold: str, reply: Mapping[str, Any], classes: Mapping[str, str]) -> dict[str, Any]:
    predicted = reply["answer"] if "likelihood" in reply else decide(reply["answer"], emotion_names(classes))
    row = {"id": clip.id, "fold": fold, "expected": clip.label, **reply}
    return {**row, "predicted": predicted, "correct": predicted == clip.label}


def _matrix(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> np.ndarray:
    expected = [classes.index(row["expected"]) for row in rows]
    predicted = [None if row["predicted"] is None else classes.index(row["predicted"]) for row in rows]
    return confusion(expected, predicted, len(classes))
