"""Scores free-text answers against references by words and by a judge, for DFEC, EMER and held_out_qa."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.judge import Judge, Question
from favchat_jax.evaluation.metrics import cider, mean_figure, rouge_l, words
from favchat_jax.evaluation.respondents import Unanswered
from favchat_jax.evaluation.result import Figure, Result, make_result
from favchat_jax.evaluation.session import Session

NO_JUDGE = "no judge is set, so its figures are missing: set --config.judge.url and --config.judge.model"


def sample(id: str, clip: str, question: str, expected: str, answer: str) -> dict[str, Any]:
    """Makes a result's row for a free-text answer, without a predicted class."""
    row = {"id": id, "clip": clip, "question": question, "expected": expected, "answer": answer}
    return {**row, "predicted": None, "correct": None}


def captions_result(
    config: EvaluationConfig,
    session: Session,
    samples: Sequence[dict[str, Any]],
    rubrics: Mapping[str, str],
    more: Callable[[Judge], tuple[dict[str, Figure], list[str]]] = lambda judge: ({}, []),
    known: Mapping[str, Figure] | None = None,
    **fields: Any,
) -> Result:
    """Makes the benchmark's result: word figures, and, if the session has a judge, its figure for each rubric.

    Missing figures and judgements are noted and make the result incomplete.

    Args:
        config: the benchmark's config.
        session: session with the judge.
        samples: rows made by `sample`.
        rubrics: see `judged_figures`.
        more: returns further figures by the judge, and notes.
        known: figures that are known already.
        fields: further arguments of `make_result`.
    """
    figures, notes, judge = word_figures(samples, config.seed), [NO_JUDGE], session.judge
    if judge is not None:
        judged, notes = judged_figures(judge, samples, rubrics, config.seed)
        others, unjudged = more(judge)
        figures, notes = {**judged, **figures, **others}, notes + unjudged
    state = {"missing": session.missing, "notes": notes, "judge": judge and judge.summary(), "complete": not notes}
    return make_result(config.benchmark, samples, {**figures, **(known or {})}, **state, **fields)


def word_figures(samples: Sequence[dict[str, Any]], seed: int) -> dict[str, Figure]:
    """Returns CIDEr and ROUGE-L of the answers, and writes each sample's values into its "scores"."""
    answers = [words(row["answer"]) for row in samples]
    references = [[words(row["expected"])] for row in samples]
    scored = {
        "cider": cider(answers, references),
        "rouge_l": [rouge_l(answer, group) for answer, group in zip(answers, references, strict=True)],
    }
    clips = [row["clip"] for row in samples]
    for name, values in scored.items():
        for row, value in zip(samples, values, strict=True):
            row.setdefault("scores", {})[name] = value
    return {name: mean_figure(values, seed, clusters=clips) for name, values in scored.items()}


def judged_figures(
    judge: Judge, samples: Sequence[dict[str, Any]], rubrics: Mapping[str, str], seed: int
) -> tuple[dict[str, Figure], list[str]]:
    """Returns the mean of a judge's scores for each rubric, and notes on answers that it did not score.

    Args:
        judge: the judge.
        samples: rows with id, clip, question, expected and answer; each row's scores are written into it.
        rubrics: figure name -> rubric that gives its scores.
        seed: seed of the intervals.
    """
    figures, notes = {}, []
    for name, rubric in rubrics.items():
        questions = [Question(row["id"], rubric, _fields(row)) for row in samples]
        scores = judge.scores(questions, f"judging {name}")
        scored = [(row, scores[row["id"]]) for row in samples]
        for row, score in scored:
            note_score(row, name, score)
        known = [(row["clip"], score) for row, score in scored if not isinstance(score, Unanswered)]
        notes += unjudged_note(name, len(samples) - len(known))
        figures[name] = mean_figure([score for _, score in known], seed, clusters=[clip for clip, _ in known])
    return figures, notes


def note_score(row: dict[str, Any], name: str, score: Any) -> None:
    """Writes one score into a sample, or the reason why it is missing."""
    if isinstance(score, Unanswered):
        row.setdefault("unjudged", {})[name] = str(score)
    else:
        row.setdefault("scores", {})[name] = score


def unjudged_note(name: str, count: int) -> list[str]:
    """Returns the note about answers that the judge did not score; none if `count` is 0."""
    return [f"{name}: {count} answers have no judgement and are not part of this figure"] if count else []


def _fields(row: Mapping[str, Any]) -> dict[str, str]:
    return {"question": row["question"], "reference": row["expected"], "answer": row["answer"] or "(no answer)"}
