"""Reads the samples of the reinforcement stage: a clip, a question about it, and what the rewards compare with."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8

from favchat_jax.checkpoints.run import Assembly
from favchat_jax.data import reasoning
from favchat_jax.data.bad_records import BadRecords
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.record import Question, Record
from favchat_jax.data.sources import open_dataset
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError
from favchat_jax.processes import gathered
from favchat_jax.rl import published
from favchat_jax.rl.pool import Pool

DESCRIBE = Question(reasoning.QUESTION, answer="", kind="description")


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Holds a question about a clip.

    Attributes:
        record: of the clip.
        question: with its answer, which is empty for the request to describe the clip.
        prompt: the question in the words that the policy reads.
        tokens: the prompt as the language model's sequence, with the clip's placeholders.
        frames: the decoded clip.
    """

    record: Record
    question: Question
    prompt: str
    tokens: Int32[np.ndarray, " L"]
    frames: UInt8[np.ndarray, "T H W C"]


class Samples:
    """Reads the first `limit` samples of a split (0: all), each when it is needed.

    With `rl.prompt=description`, a sample is a clip that shows a face and has all targets. With `rl.prompt=question`,
    it is a question about a clip that shows a face.

    Attributes:
        counted: the samples that were read, with the bad ones; each counts once.

    Raises:
        UserError: the split has no such clip.
    """

    def __init__(self, parts: Assembly, split: str, limit: int):
        config = parts.config
        self._parts, self._as_published = parts, config.reinforcement.prompt == "question"
        self._source = open_dataset(config.data.name, config.data.packed, split)
        numbered = ((i, question) for i in range(len(self._source)) for question in self._questions(self._source[i]))
        self._places = list(itertools.islice(numbered, limit or None))
        if not self._places:
            lacking = "a face and a question" if self._as_published else "attribute, emotion and action targets"
            raise UserError(
                f"no clip of split {split} has {lacking}: name another split in rl.split or rl.heldout_split"
            )
        self._split, self._tried = split, set[int]()
        self.counted = BadRecords(len(self._places))

    def _questions(self, record: Record) -> Sequence[Question]:
        if self._as_published:
            return record.questions if record.has_face else ()
        return (DESCRIBE,) if reasoning.has_face_and_targets(record) else ()

    def __len__(self) -> int:
        return len(self._places)

    def read(self, place: int) -> Sample | None:
        """Returns a sample, or None for a bad one: a clip that cannot be decoded, or a question over the limit.

        The first time, a bad one is named in a warning.

        Raises:
            UserError: more than 1 % of the samples are bad.
        """
        index, question = self._places[place]
        record, sample, reason = self._source[index], None, None
        try:
            sample = self._decoded(record, question)
        except UserError as error:
            reason = str(error)
        # A clip that one of several processes cannot read is bad in all of them.
        reason = next(filter(None, (found["reason"] for found in gathered({"reason": reason}))), None)
        if place not in self._tried:
            self._tried.add(place)
            self.counted.add(record.id, reason)
        return None if reason else sample

    def _decoded(self, record: Record, question: Question) -> Sample:
        size, data, prompt = self._parts.config.model, self._parts.config.data, self._prompt(question)
        tokens = self._tokens(prompt)
        clip = decode(
            record.clip,
            frames=size.frames,
            size=size.image_size,
            name=f"clip {record.id}",
            face_crop=FaceCrop.of(data) if data.face_crop else None,
        )
        return Sample(record, question, prompt, tokens, clip.frames)

    def _prompt(self, question: Question) -> str:
        return published.prompt(question.question, question.kind) if self._as_published else question.question

    def _tokens(self, prompt: str) -> Int32[np.ndarray, " L"]:
        config = self._parts.config
        return self._parts.conversation.encode([(prompt, None)], config.model.frames, max(config.data.buckets)).tokens

    def __iter__(self) -> Iterator[Sample]:
        """Yields all samples except bad ones.

        Raises:
            UserError: all samples are bad, or more than 1 %.
        """
        read = 0
        for sample in map(self.read, range(len(self))):
            if sample is not None:
                read += 1
                yield sample
        if not read:
            raise self.unusable()

    def unusable(self) -> UserError:
        """Returns the error for a split in which all samples are bad."""
        last = list(self.counted.reasons.values())[-1]
        return UserError(f"all {len(self)} samples of split {self._split} are bad (the last: {last}): fix their clips")

    @functools.cached_property
    def longest_prompt(self) -> int:
        """Number of tokens of the longest prompt that fits a sequence."""
        lengths = [0]
        for prompt in {self._prompt(question) for _, question in self._places}:
            with contextlib.suppress(UserError):  # too long: its samples are bad
                lengths.append(len(self._tokens(prompt)))
        return max(lengths)

    def get_state(self) -> dict[str, Any]:
        """Returns which samples were read, and the counts, as JSON."""
        return {"tried": sorted(self._tried), **self.counted.get_state()}

    def set_state(self, state: dict[str, Any] | None) -> None:
        """Resumes where `get_state` was called; older checkpoints have no state."""
        if state is not None:
            self._tried = set(state["tried"])
            self.counted.set_state(state)


def draw(pool: Pool, samples: Samples, count: int) -> tuple[Int[np.ndarray, " b"], list[Sample]]:
    """Draws samples of a pool for an iteration and reads them; bad ones leave the pool, and others replace them.

    Returns:
        Their places in the pool, and the samples: fewer than `count`, or none, if more are discarded or bad.

    Raises:
        UserError: all samples are bad, or more than 1 %.
    """
    kept: list[int] = []
    read: list[Sample] = []
    places = pool.draw(count)
    while len(places):
        bad = 0
        for place in places.tolist():
            sample = samples.read(place)
            if sample is None:
                pool.leave_out(place)
                bad += 1
            else:
                kept.append(place)
                read.append(sample)
        places = pool.draw_more(bad, kept) if bad else places[:0]
    if len(pool.bad) == pool.size:
        raise samples.unusable()
    return np.array(kept, np.int64), read
