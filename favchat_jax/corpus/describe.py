"""Turns a clip's frames and labels into features, a summary and questions (paper, section 3.2), one call per step.

An answer that fails the automatic checks is requested again with the reason, up to a limit.
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
from favchat_jax.data.reasoning import answer_of
from favchat_jax.data.record import Question

STEPS = ("features", "summary", "questions")
PROMPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(checks.PROMPTS.iterdir())}
VERSION = hashlib.sha256(json.dumps(PROMPTS).encode()).hexdigest()[:12]

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Clip:
    """Holds a kept clip to annotate, its labels, and a hash of its file's bytes."""

    id: str
    path: Path
    labels: Labels
    frames: int
    digest: str


class Responder(Protocol):
    """Answers a call: an endpoint, or the stored replies of one."""

    def ask(self, step: str, key: str, system: str, text: str, images: Callable[[], Sequence[bytes]]) -> Reply:
        """See `endpoint.Endpoint.ask`."""


class Unannotated(Exception):
    """Raised for a clip that gets no text, with the reason."""


@dataclass
class Describer:
    """Writes annotations from the answers of `responder`; `limit` is the most answers that a step may take."""

    responder: Responder
    model: str
    limit: int

    def write(self, clip: Clip, refused: Sequence[str] = ()) -> Annotation:
        """Writes one clip's annotation.

        Args:
          refused: earlier summaries that a person or the check for duplicates refused.

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
        if not problems:  # questions about a refused text would be a waste
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
    """Makes the calls for one clip and counts its answers."""

    describer: Describer
    clip: Clip
    refused: Sequence[str]
    attempts: int = field(default=0)

    def answer(
        self, step: str, parse: Callable[[str, Labels], tuple[Parsed, list[str]]], **known: str
    ) -> tuple[Parsed, list[str]]:
        """Returns a step's first answer without problems, or else the last answer and its problems."""
        schema = PROMPTS.get(f"{step}.schema.json", "")
        asked = Template(PROMPTS[f"{step}.md"]).substitute(known, schema=schema)
        # Features describe the clip, not a refused text, so they are not requested again.
        again = "".join(_again("a reader wants another text", text) for text in self.refused if step != "features")
        for attempt in range(self.describer.limit):
            reply = self._ask(step, asked + again, attempt)
            text = answer_of(reply.text)
            parsed, problems = parse(text, self.clip.labels)
            if reply.problem:
                problems = [reply.problem]
            if not problems:
                break
            again = _again("; ".join(problems), text)
        return parsed, problems

    def _ask(self, step: str, text: str, attempt: int) -> Reply:
        self.attempts += 1
        seen = step != "questions"
        # Hash the clip's bytes rather than its pictures, which can differ between versions of a decoder.
        content = [self.clip.digest, clip_frames.SETTINGS] if seen else []
        key = digest(self.describer.model, PROMPTS["system.md"], text, content, attempt)
        images = (lambda: clip_frames.pictures(self.clip.path)) if seen else list
        try:
            return self.describer.responder.ask(step, key, PROMPTS["system.md"], text, images)
        except clip_frames.ClipError as error:
            raise Unannotated(str(error)) from None


def attribute_text(labels: Labels) -> str:
    """Returns the labels as text for the prompt, one group per line."""
    lines = [f"{group}: {', '.join(names).replace('_', ' ')}" for group, names in labels.items() if names]
    if labels.get("appearance"):
        lines.append("What the labels of appearance could name and do not, is not there.")
    return "\n".join(lines) or "none"


def clip_key(clip: Clip, backend: str, model: str) -> str:
    """Returns a hash of the clip's content and of everything else that determines its text."""
    labels = {group: list(names) for group, names in sorted(clip.labels.items())}
    return digest(clip.digest, labels, backend, model, VERSION, clip_frames.SETTINGS)


def digest(*parts: object) -> str:
    """Returns the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _again(problems: str, answer: str) -> str:
    return Template(PROMPTS["again.md"]).substitute(problems=problems, answer=answer[:2000] or "(nothing)")
