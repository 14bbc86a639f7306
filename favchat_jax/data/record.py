"""The common format of all data sources: one clip with its labels and texts."""

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
    """One clip with its labels and texts."""

    id: str
    clip: bytes  # an encoded video file
    attributes: np.ndarray  # uint8 [83], 0 or 1, in the order of `vocabulary.VOCABULARY`
    summary: str
    questions: tuple[Question, ...]
    targets: dict[str, str]  # "attributes", "emotion" and "action" in simple words
    source: str  # the video that the clip was cut from; splits share no source
    has_face: bool
    reasoning: str = ""  # `<think>` a thought `</think> <answer>` ... `</answer>`; empty if the source has none
    labels: dict[str, int] = field(
        default_factory=dict
    )  # class indices of source-specific labels (`RecordBuilder.LABELS`)
