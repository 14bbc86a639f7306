"""Reads the corpus that `tools.build_dataset` made, and packs it with Apache Beam.

Every clip is stored once. Clips are divided into parts, and each stage reads a union of parts:

    stage1, stage2   all training clips, with summaries and all questions
    stage3           training clips of CelebV-HQ
    rl, coldstart    training clips of CelebV-HQ with known attributes, emotion and action
    heldout          clips of source videos, or of persons, that are in no other split

The folder holds `records.jsonl`, one line per clip: `{"id", "video": path in the folder, "sha256", "part", "group",
"labels", "summary", "questions", "reasoning"}`.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from favchat_jax.data import vocabulary
from favchat_jax.data.record import Question, Record
from favchat_jax.data.sources.celebvhq import label_text
from favchat_jax.data.storage import RecordBuilder, pack
from favchat_jax.errors import UserError, listed

RECORDS = "records.jsonl"
PARTS = ("train_rl", "train_celebvhq", "train_other", "heldout")


class Corpus(RecordBuilder, skip_registration=True):  # type: ignore[call-arg]  # as for RecordBuilder
    """Clips of several sources with summaries and question-answer pairs (paper, Section 3)."""

    name = "corpus"
    VIEWS = {
        **dict.fromkeys(("train", "stage1", "stage2"), PARTS[:3]),
        "stage3": PARTS[:2],
        **dict.fromkeys(("rl", "coldstart"), PARTS[:1]),
    }

    def __init__(self, *, root: str | None, config: str | None = None, beam_options: tuple[str, ...] = (), **options):
        if not root:
            raise UserError("corpus needs a folder: set data.root to the folder that tools.build_dataset has filled")
        self._root = Path(root).expanduser().resolve()
        self._beam_options = list(beam_options)
        path = self._root / RECORDS
        try:
            content = path.read_bytes()
            self._rows = [json.loads(line) for line in content.splitlines()]
        except FileNotFoundError:
            made = f"python -m tools.build_dataset pack --out={root}"
            raise UserError(f"{path} is missing: make it with {made}") from None
        except ValueError:
            raise UserError(f"{path} is damaged: remove it and run pack again") from None
        self._digest = hashlib.sha256(content).hexdigest()
        super().__init__(config=config, **options)

    def digest(self) -> str:
        """Returns a hash of the records, which contain a hash of every clip."""
        return self._digest

    def counts(self) -> dict[str, int]:
        """Returns the number of clips of each part.

        Raises:
            UserError: a clip is missing, or there are no training clips.
        """
        missing = [row["video"] for row in self._rows if not (self._root / row["video"]).is_file()]
        if missing:
            raise UserError(f"{len(missing)} clips are missing in {self._root}: {listed(missing)}; run clip again")
        counts = {part: sum(row["part"] == part for row in self._rows) for part in PARTS}
        if not any(counts[part] for part in PARTS[:3]):
            raise UserError(f"{self._root / RECORDS} holds no training clips: annotate more, or hold out fewer")
        return counts

    def download_config(self) -> tfds.download.DownloadConfig:
        """Returns TFDS's settings with the Beam options."""
        from apache_beam.options.pipeline_options import PipelineOptions

        return tfds.download.DownloadConfig(beam_options=PipelineOptions(self._beam_options))

    def _generate_examples(self, split: str):
        try:
            import apache_beam as beam
        except ImportError:
            raise UserError("packing a corpus needs Apache Beam: pip install 'favchat_jax[corpus]'") from None
        rows = beam.Create([str(self._root / RECORDS)]) | beam.FlatMap(_rows_of, part=split) | beam.Reshuffle()
        return rows | beam.Map(_example, root=str(self._root))


def _rows_of(path: str, part: str) -> Iterator[dict]:
    with open(path, encoding="utf-8") as file:
        yield from (row for row in map(json.loads, file) if row["part"] == part)


def _example(row: dict, root: str) -> tuple[str, dict]:
    return row["id"], pack(read_record(root, row))


def read_record(root: str, row: dict) -> Record:
    """Reads the record of a line of `records.jsonl`.

    Raises:
        UserError: the clip has changed since the line was written.
    """
    video = Path(root, row["video"])
    clip = video.read_bytes()
    if hashlib.sha256(clip).hexdigest() != row["sha256"]:
        raise UserError(f"{video} has changed since the clip step wrote it: run clip and pack again")
    attributes = label_vector(row["labels"])
    return Record(
        id=row["id"],
        clip=clip,
        attributes=attributes,
        summary=row["summary"],
        questions=tuple(Question(**question) for question in row["questions"]),
        targets=label_text(attributes),
        source=row["group"],
        has_face=True,
        reasoning=row["reasoning"],
    )


def label_vector(labels: list[str]) -> np.ndarray:
    """Returns uint8 [83] with 1 for each of `labels`."""
    return np.isin(vocabulary.VOCABULARY, labels).astype(np.uint8)
