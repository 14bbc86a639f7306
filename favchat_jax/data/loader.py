"""Turns records into padded batches: a Grain pipeline with the same order of records for any number of workers.

source (one slice per host) -> seed -> shuffle -> repeat -> decode and tokenise -> worker processes -> drop bad records
-> pad and batch. Dropping and batching depend on the order of records, so they happen after the workers' outputs are
merged. Checkpoints store the iterator's state with the count of dropped records, through
`grain.checkpoint.CheckpointSave` and `CheckpointRestore`.
"""

from __future__ import annotations

import bisect
import contextlib
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import grain
import numpy as np
from absl import flags

from favchat_jax.data import reasoning
from favchat_jax.data.bad_records import BadRecords
from favchat_jax.data.conversation import ContextError, Conversation, PromptEncoder
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.kept_tracks import KeptTracks
from favchat_jax.data.record import Record
from favchat_jax.data.video import Augment, decode
from favchat_jax.errors import UserError
from favchat_jax.signals import end_with_parent

# Questions of stage 1; one is drawn for each clip.
INSTRUCTIONS = (
    "Describe the video in detail.",
    "What can be seen in this video? Describe it.",
    "Give a detailed description of the clip.",
    "Tell me what this clip shows, with all its details.",
    "Summarize what you see in the video.",
    "Write a description of this video.",
)
TEXTS = {  # what is trained on -> what a record must have for it
    "summary": "summary",
    "qa": "question with an answer",
    "face_qa": "question about a clip that shows a face",
    "reasoning": "face with labels",
}
FIXED_QUESTIONS = {"summary": INSTRUCTIONS, "reasoning": (reasoning.QUESTION,)}  # those that no record brings

ROUND = 32  # tokens; lengths of buckets that are proposed are multiples of it
SHARED_MEMORY = "/dev/shm"  # worker processes pass their clips through it
FEWER_WORKERS = "set --config.data.workers=0, or start the container with --shm-size=2g"


class Source(Protocol):
    """Random access to records. It can be pickled, since every worker process opens its own source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass(frozen=True)
class Batch:
    """Holds the input of one training step.

    Attributes:
        arrays: frames uint8 [B, T, H, W, C], of three channels, or six with a face crop; tokens int32 [B, Q, L]; length
          int32 [B, Q], tokens that are not padding (0 in rows without a question); loss_mask bool [B, Q, L]; prompt
          int32 [B, Q, L_prompt] and prompt_mask bool [B, Q, L_prompt] for the Q-Formers.
        ids: the clips' ids, named if a step fails.
    """

    arrays: dict[str, np.ndarray]
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Example(grain.transforms.RandomMap):
    """Encodes one record in a worker, as arrays of Q rows with the text padded to the record's longest.

    A bad record (a clip that cannot be decoded) becomes {"id", "bad": reason}, with {"length": tokens} if its text is
    over the limit. A record without the requested text becomes {"id", "skip": reason}.

    Attributes:
        text: `summary`, one instruction and the record's summary; `qa`, up to Q of its questions, drawn at random;
          `face_qa`, the same for records that show a face; `reasoning`, one question and a thought before the answer.
        questions: Q. A clip with fewer questions leaves rows empty.
        max_length: longest sequence, including visual tokens.
        face_crop: how the face is cut out of the frames; None leaves it out.
        tracks: faces that were found before; clips that it lacks are searched.
    """

    conversation: Conversation
    prompt: PromptEncoder
    text: str
    frames: int
    size: int
    sampling: str
    augment: Augment | None
    questions: int
    max_length: int
    face_crop: FaceCrop | None = None
    tracks: KeptTracks | None = None

    def random_map(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        """Encodes `record` with the random numbers of `rng`."""
        turns = self._turns(record, rng)
        if not turns:
            return {"id": record.id, "skip": f"no {TEXTS[self.text]}, which this stage trains on"}
        try:
            return {"id": record.id, **self._encode(record, turns, rng)}
        except ContextError as error:
            return {"id": record.id, "bad": str(error), "length": error.length}
        except UserError as error:
            return {"id": record.id, "bad": str(error)}

    def _turns(self, record: Record, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Returns the questions and answers that the record is trained on; none if it lacks the text."""
        if self.text == "summary":
            return [(str(rng.choice(INSTRUCTIONS)), record.summary)] if record.summary else []
        if self.text == "reasoning":
            usable = reasoning.has_face_and_targets(record)
            return [(reasoning.QUESTION, reasoning.response(record, rng))] if usable else []
        if self.text == "face_qa" and not record.has_face:
            return []
        chosen = rng.permutation(len(record.questions))[: self.questions]
        return [(record.questions[i].question, record.questions[i].answer) for i in chosen]

    def _encode(self, record: Record, turns: list[tuple[str, str]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        clip = decode(
            record.clip,
            frames=self.frames,
            size=self.size,
            sampling=self.sampling,
            rng=rng,
            augment=self.augment,
            name=f"clip {record.id}",
            face_crop=self.face_crop,
            tracks=self.tracks.of(record.id) if self.tracks else None,
        )
        texts = [self.conversation.encode([turn], self.frames, self.max_length, clip.seconds) for turn in turns]
        rows, longest = self.questions, max(len(text.tokens) for text in texts)
        arrays = {
            "frames": clip.frames,
            "tokens": np.full((rows, longest), self.conversation.pad, np.int32),
            "length": np.zeros(rows, np.int32),
            "loss_mask": np.zeros((rows, longest), bool),
            "prompt": np.zeros((rows, self.prompt.length), np.int32),
            "prompt_mask": np.zeros((rows, self.prompt.length), bool),
        }
        for row, ((question, _), text) in enumerate(zip(turns, texts, strict=True)):
            length = len(text.tokens)
            arrays["length"][row] = length
            arrays["tokens"][row, :length] = text.tokens
            arrays["loss_mask"][row, :length] = text.loss_mask
            arrays["prompt"][row], arrays["prompt_mask"][row] = self.prompt.encode(question)
        return arrays


def training_batches(
    source: Source,
    conversation: Conversation,
    prompt: PromptEncoder,
    *,
    text: str,
    frames: int,
    size: int,
    batch: int,
    buckets: Sequence[int],
    questions: int = 1,
    sampling: str = "rand",
    augment: Augment | None = None,
    face_crop: FaceCrop | None = None,
    tracks: KeptTracks | None = None,
    workers: int = 0,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Makes the endless, shuffled, deterministic stream of one host's `Batch`es; call `close()` on it when done.

    Args:
        source: all records; this host reads every `process_count`-th, from `process_index` on.
        conversation: tokeniser for the language model.
        prompt: tokeniser for the Q-Formers.
        text: `summary`, `qa`, `face_qa` or `reasoning`: the kind of questions about a clip, see `Example`.
        frames: T. size: H = W in pixels. sampling, augment, face_crop: see `video.decode`.
        batch: B, clips per batch on this host.
        buckets: allowed sequence lengths L of a batch. Text is padded to the smallest that holds it; a longer text is a
            bad record. Several hosts always use the largest, since their shapes must agree.
        questions: Q for `qa` and `face_qa`; the other texts have one question.
        tracks: faces that were found before.
        workers: processes that decode; 0 decodes on a thread of this process.
        seed: seed of the order and of every random draw.

    Raises:
        UserError: `text` is unknown, or there are fewer records than hosts; while running, more than 1 % of the records
            are bad, or none is usable.
    """
    if text not in TEXTS:
        raise UserError(f"unknown training text {text!r}: choose one of {', '.join(TEXTS)}")
    if len(source) < process_count:
        raise UserError(f"the data set has {len(source)} records for {process_count} hosts: give a larger one")
    buckets = sorted(buckets)
    asked, longest = 1 if text in ("summary", "reasoning") else questions, buckets[-1]
    example = Example(
        conversation,
        prompt,
        text,
        frames,
        size,
        sampling,
        augment,
        questions=asked,
        max_length=longest,
        face_crop=face_crop,
        tracks=tracks,
    )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its flags even without an absl app
    rows = grain.MapDataset.source(source)[process_index::process_count]
    examples = rows.seed(seed + process_index).shuffle().repeat().random_map(example)
    stream = examples.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if workers:
        ready = -(-batch // workers) + 1  # a complete batch is ready while the device works on the previous one
        channels = 6 if face_crop else 3
        # A worker holds one more clip that it is making.
        _check_shared_memory(workers, workers * (ready + 1) * (frames * size * size * channels + 5 * asked * longest))
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, ready), worker_init_fn=_start_worker)
    return BatchIterator(
        iter(stream),
        batch=batch,
        buckets=buckets[-1:] if process_count > 1 else buckets,
        pad=conversation.pad,
        dataset_length=len(source),
        records=len(rows),
        layout={"workers": workers, "process_count": process_count},
    )


class BatchIterator(grain.DatasetIterator):
    """Drops bad records and stacks the others to batches.

    Attributes:
        dataset_length: number of records of the data set, over all hosts.
        counted: the records read so far, with the bad ones.
    """

    def __init__(
        self,
        examples: grain.DatasetIterator,
        *,
        batch: int,
        buckets: Sequence[int],
        pad: int,
        dataset_length: int,
        records: int,
        layout: dict[str, int],
    ):
        super().__init__(examples)
        self._batch, self._buckets, self._pad = batch, buckets, pad
        self.dataset_length, self._records, self._layout = dataset_length, records, layout
        self.counted = BadRecords(records)
        self._too_long = 0  # tokens of the longest text that no bucket holds

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            UserError: more than 1 % of the records are bad, or no record has the requested text.
        """
        rows: list[dict[str, Any]] = []
        skipped = 0
        while len(rows) < self._batch:
            row = self._next_row()
            if "skip" in row:
                skipped += 1
                if skipped > 2 * self._records:  # so many in a row include every record at least once
                    self.close()
                    raise UserError(f"none of the {self._records} records is usable: {row['skip']}")
                continue
            skipped = 0
            if "bad" in row:
                self._too_long = max(self._too_long, row.get("length", 0))
            try:
                self.counted.add(row["id"], row.get("bad"))
            except UserError as error:
                self.close()
                raise UserError(f"{error}{self._longer_bucket()}") from None
            if "bad" not in row:
                rows.append(row)
        return self._collate(rows)

    def _longer_bucket(self) -> str:
        """Says which buckets would hold the texts that were too long, if there were any."""
        if not self._too_long:
            return ""
        lengths = ",".join(map(str, [*self._buckets, -(-self._too_long // ROUND) * ROUND]))
        return f"; the longest text so far needs {self._too_long} tokens: set --config.data.buckets=({lengths})"

    def _next_row(self) -> dict[str, Any]:
        """Returns the next example of the workers.

        Raises:
            UserError: a worker died.
        """
        try:
            return next(self._parent)
        except RuntimeError as error:  # Grain's
            died = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if died is None:
                raise
            self.close()
            reasons = {-signal.SIGBUS: f"{SHARED_MEMORY} is full", -signal.SIGKILL: "killed, as when memory runs out"}
            reason = reasons.get(int(died[1]), f"exit code {died[1]}")
            raise UserError(f"a process that decodes clips died ({reason}): {FEWER_WORKERS}") from None

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Stacks examples to a batch, with their text padded to the smallest bucket that holds it."""
        longest = max(row["tokens"].shape[1] for row in rows)
        length = self._buckets[bisect.bisect_left(self._buckets, longest)]
        for row in rows:
            missing = [(0, 0), (0, length - row["tokens"].shape[1])]
            row["tokens"] = np.pad(row["tokens"], missing, constant_values=self._pad)
            row["loss_mask"] = np.pad(row["loss_mask"], missing)
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "id"}
        return Batch(arrays=arrays, ids=tuple(row["id"] for row in rows))

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the stream as JSON."""
        return {"layout": self._layout, "counts": self.counted.get_state(), "examples": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes the stream at the position that `get_state` returned.

        Raises:
            UserError: the state comes from another number of workers or hosts, so the stream cannot resume.
        """
        if state["layout"] != self._layout:
            raise UserError(
                f"the checkpoint's data stream was read with {state['layout']}, this run has {self._layout}: "
                "use the same numbers to resume"
            )
        self.counted.set_state(state["counts"])
        self._parent.set_state(state["examples"])


def _check_shared_memory(workers: int, needed: int) -> None:
    """Raises UserError if the workers' clips do not fit in shared memory, where writing would kill a worker."""
    with contextlib.suppress(OSError):  # another system
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < needed:
            raise UserError(
                f"{SHARED_MEMORY} has {free / 1e6:.1f} MB left, but data.workers={workers} need {needed / 1e6:.1f} MB "
                f"there for clips: {FEWER_WORKERS}"
            )


def _start_worker(index: int, count: int) -> None:
    """Sets up every worker process."""
    del index, count
    cv2.setNumThreads(1)  # the workers are the parallelism
    # Ctrl-C and a scheduler's SIGTERM reach the entire process group, but only the main process handles them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
