"""Defines the common format of all data sources: one clip with its labels and texts."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True)
class Question:
    """A question about a clip with its answer; `kind` groups questions in the evaluation, e.g. "hair" or "motion"."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True, eq=False)
class Record:
    """One clip with its labels and texts.

    Attributes:
        id: name of the clip in its data set.
        clip: an encoded video file.
        attributes: 0 or 1 for each of `vocabulary.VOCABULARY`.
        summary: description of the clip.
        questions: question-answer pairs.
        targets: "attributes", "emotion" and "action" in simple words.
        source: the video that the clip was cut from; splits share no source.
        has_face: whether the clip shows a face.
        reasoning: `<think>` thought `</think> <answer>` answer `</answer>`; empty if the source has none.
        labels: class indices of source-specific labels (`RecordBuilder.LABELS`).
    """

    id: str
    clip: bytes
    attributes: UInt8[np.ndarray, " 83"]
    summary: str
    questions: tuple[Question, ...]
    targets: dict[str, str]
    source: str
    has_face: bool
    reasoning: str = ""
    labels: dict[str, int] = field(default_factory=dict)
