"""The text of the corpus, one object a clip: what `annotate` writes, `review` judges and `pack` takes."""

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
    """Features, summary and questions of one clip.

    `key` is a hash of the clip's bytes and labels and of all that shapes its text; `attempts` counts the answers that
    it took. `problems` are what the automatic checks still find after the last of them: such a text is for a person to
    accept or mend, and not for training before that.
    """

    id: str
    key: str
    backend: str
    model: str
    prompts: str  # version: a hash of the wording
    features: dict
    summary: str
    questions: tuple[Question, ...]
    attempts: int
    problems: tuple[str, ...]

    def text(self) -> str:
        """Names the summary and questions, so that a verdict on them is not taken for one on a later text."""
        return text_digest(self.summary, self.questions)

    def line(self) -> str:
        """The object as JSON on one line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def text_digest(summary: str, questions: Iterable[Question]) -> str:
    """A short hash of a clip's summary and questions."""
    text = json.dumps([summary, [[pair.question, pair.answer] for pair in questions]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_questions(published: object) -> tuple[Question, ...]:
    """Questions of a JSON list of `{"question", "answer", "kind"}`; raises what a wrong shape raises."""
    pairs = tuple(Question(**pair) for pair in published)
    if not all(isinstance(text, str) for pair in pairs for text in dataclasses.astuple(pair)):
        raise TypeError("a question, its answer and its kind are texts")
    return pairs


def read_annotations(out: Path) -> dict[str, Annotation]:
    """Clip id -> annotation, in the order of the file.

    Raises:
      UserError: there is no such file, or a line that is not an annotation.
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
            raise UserError(f"{path}: {row['id']} is not an annotation: run annotate again to write it anew") from None
    return annotations
