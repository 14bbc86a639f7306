"""The form that every source of clips is brought to: one clip, its labels and its texts."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Question:
    """A question about a clip with its answer; `kind` groups questions in the evaluation, e.g. "hair" or "motion"."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True, eq=False)
class Record:
    """One clip with all that is known about it."""

    id: str
    clip: bytes  # an encoded video file
    attributes: np.ndarray  # uint8 [83], 0 or 1, in the order of `vocabulary.VOCABULARY`
    summary: str
    questions: tuple[Question, ...]
    targets: dict[str, str]  # "attributes", "emotion" and "action" in simple words
    source: str  # the video it was cut from: splits are disjoint by it
    has_face: bool
    reasoning: str = ""  # `<think>` a thought `</think> <answer>` ... `</answer>`, where the source has one
    labels: dict[str, int] = field(default_factory=dict)  # classes of a source of its own (`RecordBuilder.LABELS`)
