"""Stores people's verdicts on the annotations in `reviews.jsonl`, one per line.

The last verdict of a reviewer on a text counts.
"""

import dataclasses
import itertools
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from favchat_jax.corpus.annotations import Annotation, read_questions
from favchat_jax.corpus.manifest import REVIEWS
from favchat_jax.data.record import Question
from favchat_jax.errors import UserError

VERDICTS = ("accept", "edit", "reject", "regenerate")


@dataclass(frozen=True)
class Review:
    """Holds a verdict on a clip's text. `summary` and `questions` are that text, or its replacement for `edit`."""

    id: str
    reviewer: str
    verdict: str
    summary: str
    questions: tuple[Question, ...]
    time: str  # ISO 8601, UTC
    text: str  # `Annotation.text` of the judged text: a verdict does not carry over to a later text


class Reviews:
    """Stores the verdicts of one corpus folder; threads may share it.

    Raises:
      UserError: a line is not a review.
    """

    def __init__(self, out: Path):
        self._path = out / REVIEWS
        self._lock = threading.Lock()
        self._latest: dict[str, dict[tuple[str, str], Review]] = {}  # clip -> (reviewer, text) -> verdict
        written = self._path.read_bytes() if self._path.exists() else b""
        self._end = written.rfind(b"\n") + 1  # anything after it is an unconfirmed, interrupted write
        for number, line in enumerate(written[: self._end].splitlines(), start=1):
            try:
                row = json.loads(line)
                row["questions"] = read_questions(row["questions"])
                self._take(Review(**row))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self._path}, line {number}: not a review; correct or remove the line") from None

    def add(self, review: Review) -> None:
        """Stores a verdict. It is on disk when this returns. After an OSError, the file is unchanged."""
        line = json.dumps(dataclasses.asdict(review), ensure_ascii=False).encode() + b"\n"
        with self._lock:
            with self._path.open("r+b" if self._path.exists() else "x+b") as file:
                try:
                    file.truncate(self._end)
                    file.seek(self._end)
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, self._end)
                    raise
            self._end += len(line)
            self._take(review)

    def of(self, annotation: Annotation) -> dict[str, Review]:
        """Returns each reviewer's verdict on the annotation's current text."""
        text = annotation.text()
        with self._lock:
            return {reviewer: review for (reviewer, t), review in self._verdicts(annotation.id).items() if t == text}

    def refused(self, clip: str) -> tuple[str, ...]:
        """Returns the summaries of a clip that a reviewer wants rewritten, oldest first."""
        wanted = (review for review in self._verdicts(clip).values() if review.verdict == "regenerate")
        return tuple({review.text: review.summary for review in wanted}.values())

    def _verdicts(self, clip: str) -> dict[tuple[str, str], Review]:
        return self._latest.get(clip, {})

    def _take(self, review: Review) -> None:
        if review.verdict not in VERDICTS:
            raise ValueError(review.verdict)
        self._latest.setdefault(review.id, {})[review.reviewer, review.text] = review


def final_text(annotation: Annotation, verdicts: Mapping[str, Review]) -> tuple[str, tuple[Question, ...]] | None:
    """Returns the summary and questions to train on, or None to leave the clip out.

    One rejection or one request for another text is enough to leave the clip out. Otherwise the last edit counts. A
    text without verdicts is used if the automatic checks found no problem.
    """
    given = {review.verdict for review in verdicts.values()}
    if given & {"reject", "regenerate"} or (annotation.problems and not given):
        return None
    edits = [review for review in verdicts.values() if review.verdict == "edit"]
    chosen = max(edits, key=lambda review: review.time, default=annotation)
    return chosen.summary, chosen.questions


@dataclass(frozen=True)
class Agreement:
    """Holds two reviewers' agreement on clips that both judged: share of equal verdicts, and Cohen's kappa."""

    first: str
    second: str
    clips: int
    equal: float
    kappa: float | None


def agreement(annotations: Iterable[Annotation], reviews: Reviews) -> list[Agreement]:
    """Returns the agreement of every pair of reviewers with clips in common."""
    shared: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for annotation in annotations:
        verdicts = sorted((reviewer, review.verdict) for reviewer, review in reviews.of(annotation).items())
        for (first, one), (second, other) in itertools.combinations(verdicts, 2):
            shared.setdefault((first, second), []).append((one, other))
    return [
        Agreement(*names, len(pairs), sum(a == b for a, b in pairs) / len(pairs), cohens_kappa(pairs))
        for names, pairs in sorted(shared.items())
    ]


def cohens_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Returns (p_o - p_e) / (1 - p_e) of two raters' verdicts (Cohen, 1960), or None if p_e is 1."""
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    expected = sum(
        sum(a == verdict for a, _ in pairs) * sum(b == verdict for _, b in pairs) / n**2 for verdict in VERDICTS
    )
    return None if expected == 1 else (observed - expected) / (1 - expected)
