"""Data sets of clips with text: one TFDS builder a source, packed as ArrayRecord, read at random without TensorFlow.

Every source gives the same `Record`: an encoded clip, the 83 labels of CelebV-HQ, a summary, question-answer pairs
(paper, section 3.2) and the target strings of the facial reward. `prepare` packs a source, `open_dataset` reads it.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from favchat_jax.data.datasets.packing import RecordSource


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
    attributes: np.ndarray  # uint8 [83], 0 or 1, in the order of `celebvhq_vocabulary.VOCABULARY`
    summary: str
    questions: tuple[Question, ...]
    targets: dict[str, str]  # "attributes", "emotion" and "action" in simple words
    source: str  # the video it was cut from: splits are disjoint by it
    has_face: bool
    reasoning: str = ""  # `<think>` a thought `</think> <answer>` ... `</answer>`, where the source has one
    labels: dict[str, int] = field(default_factory=dict)  # rendered clips: class of each of `rendered_faces.LABELS`


def prepare(name: str, root: str | None, data_dir: str) -> str:
    """Packs the data set `name` under `data_dir` unless it lies there already, and returns its folder.

    `name` is "rendered_faces" (drawn on the spot, `root` is not used), "rendered_faces/smoke" (the same, a few clips),
    "celebvhq" (read from the folder `root`) or "corpus" (the same, of a folder that `tools.build_dataset` has filled).
    A build that was cut short leaves nothing that is taken for whole.

    Raises:
      UserError: unknown name, or a `root` whose files are missing or malformed.
    """
    from favchat_jax.data.datasets import packing

    return packing.prepare(name, root, data_dir)


def open_dataset(name: str, data_dir: str, split: str) -> "RecordSource":
    """Opens split "train" or "heldout" of a prepared data set, or another that it has, such as "rl" of a corpus.

    Raises:
      UserError: the data set is not prepared, or has no such split.
    """
    from favchat_jax.data.datasets import packing

    return packing.RecordSource(name, data_dir, split)


def training_split(name: str, stage: str) -> str:
    """The split that a stage trains on: its own where the data set has one, as a corpus does, else "train"."""
    from favchat_jax.data.datasets import packing

    return stage if stage in packing.views(name) else "train"
