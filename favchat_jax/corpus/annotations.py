"""Defines a clip's generated text, one JSON object: `annotate` writes it, `review` judges it, `pack` reads it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from favchat_jax.corpus.manifest import ANNOTATIONS, read_lines
from favchat_jax.data.record import Question
from favchat_jax.errors import UserError

UNANNOTATED = "unannotated.jsonl"


@dataclass(frozen=True)
class Annotation:
    """Holds the features, the summary and the questions of one clip.

    `key` is a hash of the clip's bytes, its labels and everything else that shapes the text. `attempts` counts the
    answers that were needed. `problems` lists what the automatic checks found in the last answer. A text with problems
    is used for training only after a person has accepted or edited it.
    """

    id: str
    key: str
    backend: str
    model: str
    prompts: str  # version: a hash of the prompts' wording
    features: dict
    summary: str
    questions: tuple[Question, ...]
    attempts: int
    problems: tuple[str, ...]

    def text(self) -> str:
        """Returns a hash of the summary and questions, which ties a verdict to the text that was judged."""
        return text_digest(self.summary, self.questions)

    def line(self) -> str:
        """Returns the object as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def text_digest(summary: str, questions: Iterable[Question]) -> str:
    """Returns a short hash of a clip's summary and questions."""
    text = json.dumps([summary, [[pair.question, pair.answer] for pair in questions]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_questions(published: object) -> tuple[Question, ...]:
    """Returns the questions in a JSON list of `{"question", "answer", "kind"}`.

    Raises:
      TypeError: the list has another form.
    """
    pairs = tuple(Question(**pair) for pair in published)
    if not all(isinstance(text, str) for pair in pairs for text in dataclasses.astuple(pair)):
        raise TypeError("a question, its answer and its kind must be text")
    return pairs


def read_annotations(out: Path) -> dict[str, Annotation]:
    """Returns the annotation of each clip id, in the order of the file.

    Raises:
      UserError: the file is missing, or a line is not an annotation.
    """
    path = out / ANNOTATIONS
    if not path.is_file():
        raise UserError(f"{path} does not exist: run annotate --out={out} first")
    annotations = {}
    for row in read_lines(out, ANNOTATIONS):
        try:
            row["questions"], row["problems"] = read_questions(row["questions"]), tuple(row["problems"])
            annotations[row["id"]] = Annotation(**row)
        except (KeyError, TypeError):
            raise UserError(f"{path}: {row['id']} is not an annotation: run annotate again to rewrite it") from None
    return annotations
