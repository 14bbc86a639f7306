"""From records to padded batches: a Grain pipeline whose order of records is the same for any number of workers.

source (one slice a host) -> seed -> shuffle -> repeat -> decode and tokenise -> worker processes -> drop bad records ->
pad and batch. What depends on how records are spread over workers (dropping, batching) happens after they are merged
again. The iterator's state, with the count of dropped records, goes into checkpoints through
`grain.checkpoint.CheckpointSave` and `CheckpointRestore`.
"""

from __future__ import annotations

import bisect
import logging
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from favchat_jax.data import reasoning
from favchat_jax.data.conversation import Conversation, PromptEncoder
from favchat_jax.data.record import Record
from favchat_jax.data.video import Augment, decode
from favchat_jax.errors import UserError
from favchat_jax.signals import end_with_parent

log = logging.getLogger("favchat_jax")

# Stage 1's question: one is drawn for each clip.
INSTRUCTIONS = (
    "Describe the video in detail.",
    "What can be seen in this video? Describe it.",
    "Give a detailed description of the clip.",
    "Tell me what this clip shows, with all its details.",
    "Summarize what you see in the video.",
    "Write a description of this video.",
)
TEXTS = ("summary", "qa", "face_qa", "reasoning")
BAD_SHARE = 0.01  # a data set with a larger share of bad records is broken, and a run on it stops ...
BAD_AFTER = 100  # ... but not before so many records were read, so that one bad clip among the first is forgiven


class Source(Protocol):
    """Random access to records; picklable, since every worker process opens its own."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass(frozen=True)
class Batch:
    """What one training step sees.

    Attributes:
      arrays: frames uint8 [B, T, H, W, 3]; tokens int32 [B, Q, L]; length int32 [B, Q], tokens that are not padding,
        0 where a clip has fewer than Q questions; loss_mask bool [B, Q, L]; prompt int32 [B, Q, L_prompt] and
        prompt_mask bool [B, Q, L_prompt] for the Q-Formers.
      ids: the clips' ids, to name them where a step goes wrong.
    """

    arrays: dict[str, np.ndarray]
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Example(grain.transforms.RandomMap):
    """One record to one row of a batch, in a worker: arrays of Q rows, the text padded to the record's longest.

    A bad record (a clip that cannot be decoded, a text over the limit) becomes {"id", "bad": reason}, one without the
    text that is asked for {"id", "skip": reason}.

    Attributes:
      text: `summary`, one instruction and the record's summary; `qa`, up to Q of its questions, drawn at random;
        `face_qa`, the same of records that show a face; `reasoning`, one question and a thought before the answer.
      questions: Q. A clip with fewer questions leaves rows empty.
      max_length: the longest sequence, visual tokens included.
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

    def random_map(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        """Encode `record` with the randomness of `rng`."""
        turns = self._turns(record, rng)
        if not turns:
            return {"id": record.id, "skip": f"no text for {self.text}"}
        try:
            return {"id": record.id, **self._encode(record, turns, rng)}
        except UserError as error:
            return {"id": record.id, "bad": str(error)}

    def _turns(self, record: Record, rng: np.random.Generator) -> list[tuple[str, str]]:
        if self.text == "summary":
            return [(str(rng.choice(INSTRUCTIONS)), record.summary)] if record.summary else []
        if self.text == "reasoning":
            return [(reasoning.QUESTION, reasoning.response(record, rng))] if reasoning.can_be_told(record) else []
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
    workers: int = 0,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """An endless, shuffled, deterministic stream of `Batch`es of one host; call `close()` on it when done.

    Args:
      source: all records; this host reads every `process_count`-th, from `process_index` on.
      conversation: tokenises for the language model.
      prompt: tokenises for the Q-Formers.
      text: `summary`, `qa`, `face_qa` or `reasoning`: what is asked about a clip, see `Example`.
      frames: T. size: H = W in pixels. sampling, augment: see `video.decode`.
      batch: B, clips a batch on this host.
      buckets: sequence lengths L that a batch may have; text is padded to the smallest that holds it, and a text over
        the largest is a bad record. Where there are several hosts, always the largest, since their shapes must agree.
      questions: Q of `qa` and `face_qa`; the others have one.
      workers: processes that decode; 0 decodes on a thread of this one.
      seed: of the order and of every random draw.

    Raises:
      UserError: an unknown `text`, fewer records than hosts; while running, more than 1 % bad records, or none usable.
    """
    if text not in TEXTS:
        raise UserError(f"unknown training text {text!r}: choose one of {', '.join(TEXTS)}")
    if len(source) < process_count:
        raise UserError(f"the data set has {len(source)} records for {process_count} hosts: give a larger one")
    buckets = sorted(buckets)
    asked, longest = 1 if text in ("summary", "reasoning") else questions, buckets[-1]
    example = Example(conversation, prompt, text, frames, size, sampling, augment, questions=asked, max_length=longest)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its flags also where no absl app runs
    rows = grain.MapDataset.source(source)[process_index::process_count]
    examples = rows.seed(seed + process_index).shuffle().repeat().random_map(example)
    stream = examples.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if workers:
        ready = -(-batch // workers) + 1  # a whole batch waits while the device works on the one before
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, ready), worker_init_fn=_start_worker)
    return BatchIterator(
        iter(stream),
        batch=batch,
        buckets=buckets[-1:] if process_count > 1 else buckets,
        pad=conversation.pad,
        records=len(rows),
        layout={"workers": workers, "process_count": process_count},
    )


class BatchIterator(grain.DatasetIterator):
    """Drops bad records, counting and naming them, and stacks what is left.

    Attributes:
      seen: records read so far, bad ones included.
      bad: how many of them were bad.
      bad_ids: the ids of the bad ones and why, each once.
    """

    def __init__(
        self,
        examples: grain.DatasetIterator,
        *,
        batch: int,
        buckets: Sequence[int],
        pad: int,
        records: int,
        layout: dict[str, int],
    ):
        super().__init__(examples)
        self._batch, self._buckets, self._pad = batch, buckets, pad
        self._records, self._layout = records, layout
        self.seen = 0
        self.bad = 0
        self.bad_ids: dict[str, str] = {}

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          UserError: more than 1 % of the records are bad, or none has the text that is asked for.
        """
        rows: list[dict[str, Any]] = []
        skipped = 0
        while len(rows) < self._batch:
            row = next(self._parent)
            if "skip" in row:
                skipped += 1
                if skipped > 2 * self._records:  # two shuffled epochs in a row hold every record at least once
                    self.close()
                    raise UserError(
                        f"none of the {self._records} records is usable: {row['skip']}; choose another text"
                    )
                continue
            skipped = 0
            self.seen += 1
            if "bad" in row:
                self._name_bad(row["id"], row["bad"])
            else:
                rows.append(row)
            self._judge()
        return self._collate(rows)

    def _name_bad(self, name: str, reason: str) -> None:
        self.bad += 1
        if name not in self.bad_ids:
            self.bad_ids[name] = reason
            log.warning("record %s is left out (%d of %d so far): %s", name, self.bad, self.seen, reason)

    def _judge(self) -> None:
        if self.seen >= self._records:  # the whole data set is known, and epochs that are not over do not matter
            too_many = len(self.bad_ids) > BAD_SHARE * self._records
        else:  # the share is an estimate: two standard deviations are left to chance
            expected = BAD_SHARE * self.seen
            too_many = self.bad > expected + 2 * math.sqrt(expected)
        if self.seen < BAD_AFTER or not too_many:
            return
        self.close()
        named = ", ".join(list(self.bad_ids)[:5]) + (" and others" if len(self.bad_ids) > 5 else "")
        raise UserError(
            f"{self.bad} of {self.seen} records are bad, more than {BAD_SHARE:.0%}: mend or remove {named} "
            f"(the last: {list(self.bad_ids.values())[-1]})"
        )

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        longest = max(row["tokens"].shape[1] for row in rows)
        length = self._buckets[bisect.bisect_left(self._buckets, longest)]
        fill = {"tokens": self._pad, "loss_mask": False}
        arrays = {}
        for name in rows[0]:
            if name == "id":
                continue
            if name in fill:
                stacked = np.full((len(rows), len(rows[0][name]), length), fill[name], rows[0][name].dtype)
                for into, row in zip(stacked, rows, strict=True):
                    into[:, : row[name].shape[1]] = row[name]
            else:
                stacked = np.stack([row[name] for row in rows])
            arrays[name] = stacked
        return Batch(arrays=arrays, ids=tuple(row["id"] for row in rows))

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON can hold it."""
        counts = {"seen": self.seen, "bad": self.bad, "bad_ids": self.bad_ids}
        return {"layout": self._layout, "counts": counts, "examples": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called.

        Raises:
          UserError: the state is of another number of workers or hosts, whose streams cannot be continued here.
        """
        if state["layout"] != self._layout:
            raise UserError(
                f"the checkpoint's data stream was read with {state['layout']}, this run has {self._layout}: "
                "continue with the same numbers"
            )
        self.seen, self.bad = state["counts"]["seen"], state["counts"]["bad"]
        self.bad_ids = dict(state["counts"]["bad_ids"])
        self._parent.set_state(state["examples"])


def _start_worker(index: int, count: int) -> None:
    """Runs first in every worker process."""
    del index, count
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process decides what becomes of the run.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
