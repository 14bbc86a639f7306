"""From a clip's frames and labels to features, summary and questions (paper, section 3.2), an answer at a time.

Each step is a call; an answer that the automatic checks refuse is asked for anew, with the reason, up to a limit.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Protocol, TypeVar

from favchat_jax.corpus import checks, clip_frames
from favchat_jax.corpus.annotations import Annotation
from favchat_jax.corpus.calls import Reply
from favchat_jax.corpus.claims import Labels
from favchat_jax.data.record import Question

STEPS = ("features", "summary", "questions")
PROMPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(checks.PROMPTS.iterdir())}
VERSION = hashlib.sha256(json.dumps(PROMPTS).encode()).hexdigest()[:12]

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Clip:
    """What is annotated: a kept clip, its labels, and a hash of its file's bytes."""

    id: str
    path: Path
    labels: Labels
    frames: int
    digest: str


class Asking(Protocol):
    """What answers a call: an endpoint, or a forecast of one."""

    def ask(self, step: str, key: str, system: str, text: str, images: Callable[[], Sequence[bytes]]) -> Reply:
        """See `endpoint.Endpoint.ask`."""


class Unannotated(Exception):
    """A clip that gets no text, with the reason."""


@dataclass
class Describer:
    """Writes annotations with the answers of `asking`; `limit` is how many answers a step may take."""

    asking: Asking
    model: str
    limit: int

    def write(self, clip: Clip, refused: Sequence[str] = ()) -> Annotation:
        """One clip's annotation; `refused` are earlier summaries that a person, or the check for duplicates, refused.

        Raises:
          Unannotated: no answer was a feature dictionary, or the clip cannot be read.
        """
        work = _Work(self, clip, refused)
        features, problems = work.answer("features", checks.parse_features, attributes=attribute_text(clip.labels))
        if not features:
            raise Unannotated(f"no feature dictionary after {work.attempts} answers: {'; '.join(problems)}")
        known = {"attributes": attribute_text(clip.labels), "features": json.dumps(features, ensure_ascii=False)}
        summary, more = work.answer("summary", checks.parse_summary, **known)
        problems += more
        questions: tuple[Question, ...] = ()
        if not problems:  # questions about a text that nobody may learn from would be paid for in vain
            questions, found = work.answer("questions", checks.parse_questions, **known, summary=summary)
            problems += found if len(questions) < checks.FEWEST_PAIRS else []
        return Annotation(
            id=clip.id,
            key=clip_key(clip, "openai", self.model),
            backend="openai",
            model=self.model,
            prompts=VERSION,
            features=features,
            summary=summary,
            questions=questions,
            attempts=work.attempts,
            problems=tuple(problems),
        )


@dataclass
class _Work:
    """The calls of one clip."""

    describer: Describer
    clip: Clip
    refused: Sequence[str]
    attempts: int = field(default=0)

    def answer(
        self, step: str, parse: Callable[[str, Labels], tuple[Parsed, list[str]]], **known: str
    ) -> tuple[Parsed, list[str]]:
        """The first answer of a step without problems, else the last, and what its problems are."""
        schema = PROMPTS.get(f"{step}.schema.json", "")
        asked = Template(PROMPTS[f"{step}.md"]).substitute(known, schema=schema)
        # Features are of the clip, not of a text that was refused: they are not asked for anew.
        again = "".join(_again("a reader wants another text", text) for text in self.refused if step != "features")
        for attempt in range(self.describer.limit):
            reply = self._ask(step, asked + again, attempt)
            parsed, problems = parse(reply.text, self.clip.labels)
            if reply.problem:
                problems = [reply.problem]
            if not problems:
                break
            again = _again("; ".join(problems), reply.text)
        return parsed, problems

    def _ask(self, step: str, text: str, attempt: int) -> Reply:
        self.attempts += 1
        seen = step != "questions"
        # Of the clip's bytes and not of its pictures, which another version of a decoder may draw otherwise.
        content = [self.clip.digest, clip_frames.SETTINGS] if seen else []
        key = digest(self.describer.model, PROMPTS["system.md"], text, content, attempt)
        images = (lambda: clip_frames.pictures(self.clip.path)) if seen else list
        try:
            return self.describer.asking.ask(step, key, PROMPTS["system.md"], text, images)
        except clip_frames.ClipError as error:
            raise Unannotated(str(error)) from None


def attribute_text(labels: Labels) -> str:
    """Labels as an endpoint is told them, a group a line."""
    lines = [f"{group}: {', '.join(names).replace('_', ' ')}" for group, names in labels.items() if names]
    if labels.get("appearance"):
        lines.append("What the labels of appearance could name and do not, is not there.")
    return "\n".join(lines) or "none"


def clip_key(clip: Clip, backend: str, model: str) -> str:
    """A hash of the clip's content and of all else that its text follows from."""
    labels = {group: list(names) for group, names in sorted(clip.labels.items())}
    return digest(clip.digest, labels, backend, model, VERSION, clip_frames.SETTINGS)


def digest(*parts: object) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _again(problems: str, answer: str) -> str:
    return Template(PROMPTS["again.md"]).substitute(problems=problems, answer=answer[:2000] or "(nothing)")
