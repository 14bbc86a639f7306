"""Runs one evaluation: asks the model in batches and keeps the answers on disk, so that it can be stopped at any time.

Several processes share out the batches; each keeps its own answers, and learns those of the others after each step.
Batches are cut from the complete list of samples, and an unfinished batch is answered again as one batch. The reason is
that numbers on a device depend slightly on the rest of the batch, and a resumed evaluation must give the same result.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from favchat_jax.data.reasoning import answer_of
from favchat_jax.data.video import VideoError
from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.judge import Judge
from favchat_jax.evaluation.respondents import Ask, FaVChat, Respondent, Unanswered
from favchat_jax.generation.sampler import Sampler
from favchat_jax.processes import gathered, is_first, share_of

log = logging.getLogger("favchat_jax")

THREADS = 4  # decode the next batch while the model answers this one
DESCRIBE = "Describe the person in the video in detail."


class Journal:
    """Keeps the answers so far in a file beside the result, one JSON object per line.

    Args:
        path: the file of the first process; that of another has its number before the ending. Any number of processes
            resumes with what any other number has kept. None keeps answers in memory only.
    """

    def __init__(self, path: Path | None):
        number = jax.process_index()
        self._first, self._path = path, path.with_suffix(f".{number}{path.suffix}") if path and number else path
        self._known: dict[str, Any] = {}
        self._unshared: dict[str, Any] = {}
        for file in self._files():
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line that was being written when the process ended
                    entry = json.loads(line)
                    self._unshared[entry["key"]] = entry["value"]
        self.share()

    def _files(self) -> list[Path]:
        if self._first is None:
            return []
        others = f"{glob.escape(self._first.stem)}.*{self._first.suffix}"
        return [path for path in (self._first, *sorted(self._first.parent.glob(others))) if path.exists()]

    def share(self) -> None:
        """Exchanges answers with the other processes, all of which have to call it."""
        for found in gathered(self._unshared):
            self._known |= found
        self._unshared = {}

    def remove(self) -> None:
        """Deletes the files."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def get(self, keys: Sequence[str]) -> list[Any] | None:
        """Returns the values of these keys, or None if any of them is missing."""
        known = [self._known.get(key) for key in keys]
        return None if None in known else known

    def add(self, keys: Sequence[str], values: Sequence[Any]) -> None:
        """Writes a batch. A batch without any answer stays off the disk: the model or the config may be at fault."""
        self._unshared.update(zip(keys, values, strict=True))
        if self._path is not None and not all(isinstance(value, str) for value in values):
            with self._path.open("a") as file:
                # Starts with a line break, since an earlier process may have ended in the middle of a line.
                file.write(
                    "".join(f"\n{json.dumps({'key': k, 'value': v})}" for k, v in zip(keys, values, strict=True))
                )


class Session:
    """Holds the model, the journal and the judge that a benchmark works with.

    Args:
        respondent: the evaluated model.
        batch: samples that are answered together.
        journal: keeps answers for a later start.
        judge: scores answers; None if the config sets no judge.
        describer: a model whose description of each clip is put before the question.
        description_tokens: longest description in tokens.

    Attributes:
        missing: samples without an answer, each with its reason.
        without_face: names of the clips in which no face was found; None if none was looked for.
    """

    def __init__(
        self,
        respondent: Respondent,
        *,
        batch: int,
        journal: Journal | None = None,
        judge: Judge | None = None,
        describer: Respondent | None = None,
        description_tokens: int = 200,
    ):
        self.respondent, self.judge = respondent, judge
        self.missing: list[dict[str, str]] = []
        self.without_face: list[str] | None = None
        self._batch, self._journal, self._describer = batch, journal or Journal(None), describer
        self._description_tokens, self._asked = description_tokens, False

    @classmethod
    def of(cls, sampler: Sampler, config: EvaluationConfig) -> "Session":
        """Makes a session for a model in memory; it keeps nothing on disk."""
        return cls(FaVChat(sampler, config.batch, config.questions), batch=config.batch)

    @property
    def is_described(self) -> bool:
        """Whether the model also sees a describer's descriptions."""
        return self._describer is not None

    def ask(self, asks: Sequence[Ask], max_new_tokens: int, step: str = "answering") -> dict[str, list[str]]:
        """Returns the answers to each ask's conversations by the ask's id, without the thoughts before them.

        Asks without an answer go to `missing`.
        """
        asks = self._described(asks)
        work = functools.partial(self.respondent.answer, max_new_tokens=max_new_tokens)
        replies = self._answers_of(self._run(self.respondent, asks, step, [max_new_tokens], work))
        return {id: [answer_of(reply) for reply in replies[id]] for id in replies}

    def likelihoods(
        self, asks: Sequence[Ask], answers: Sequence[str], step: str = "weighing"
    ) -> dict[str, list[float]]:
        """Returns the log-probabilities of the given answers to each ask's only conversation, by the ask's id."""
        asks = self._described(asks)
        work = functools.partial(self.respondent.likelihoods, answers=answers)
        return self._answers_of(self._run(self.respondent, asks, step, list(answers), work))

    def losses(self, asks: Sequence[Ask], step: str = "weighing") -> dict[str, list[float]]:
        """Returns -log p per token, in nats, of the last answers in each ask's conversations, by the ask's id."""
        asks = self._described(asks)
        return self._answers_of(self._run(self.respondent, asks, step, ["loss"], self.respondent.losses))

    def leave_out(self, id: str, reason: str) -> None:
        """Records a listed sample that has no result."""
        log.warning("%s is skipped: %s", id, reason)
        self.missing.append({"id": id, "reason": reason})

    def _described(self, asks: Sequence[Ask]) -> list[Ask]:
        """Puts the describer's descriptions of the clips before each ask's first question."""
        if self._describer is None:
            return list(asks)
        clips = {clip.name: clip for ask in asks for clip in ask.clips}
        wanted = [Ask(name, (clip,), (((DESCRIBE, None),),)) for name, clip in clips.items()]
        work = functools.partial(self._describer.answer, max_new_tokens=self._description_tokens)
        described = self._run(self._describer, wanted, "describing", [self._description_tokens], work)
        # A clip that cannot be described cannot be asked about either; the ask then records it as missing.
        texts = {name: "" if isinstance(value, str) else answer_of(value[0]) for name, value in described.items()}
        return [_with_descriptions(ask, [texts[clip.name] for clip in ask.clips]) for ask in asks]

    def _run(
        self, respondent: Respondent, asks: Sequence[Ask], step: str, options: list, work
    ) -> dict[str, list | str]:
        """Calls `work` on asks and their frames, batch by batch, while the next batch is decoded.

        Returns the value of each ask by its id; a text is the reason why the ask has no answer.
        """
        keys = [_key(step, respondent, ask, options) for ask in asks]
        batches = [slice(start, start + self._batch) for start in range(0, len(asks), self._batch)]
        self._check_processes(len(batches))
        todo = [batch for batch in batches if self._journal.get(keys[batch]) is None]
        done = len(asks) - sum(len(asks[batch]) for batch in todo)
        if done:
            log.info("%s: %d of %d answers from an earlier start are reused", step, done, len(asks))
        todo, ends = share_of(todo), [time.perf_counter()]
        total, silent = done + sum(len(asks[batch]) for batch in todo), not (asks and is_first())
        with tqdm(total=total, initial=done, desc=step, unit="clip", mininterval=1, disable=silent) as bar:
            for batch, prepared in _prepared(respondent, asks, todo):
                self._journal.add(keys[batch], _answered(asks[batch], prepared, work))
                faceless = [respondent.without_face(ask) for ask in asks[batch]]
                if None not in faceless:
                    self._journal.add(_face_keys(keys[batch]), faceless)
                bar.update(len(asks[batch]))
                ends.append(time.perf_counter())
        if len(ends) > 2:
            rate = sum(len(asks[batch]) for batch in todo[1:]) / (ends[-1] - ends[1])
            log.info("%s: %.1f s, %.1f clips a second after the first batch", step, ends[-1] - ends[0], rate)
        self._journal.share()
        if faceless := self._journal.get(_face_keys(keys)):
            self.without_face = sorted({*(self.without_face or ()), *itertools.chain(*faceless)})
        return dict(zip((ask.id for ask in asks), self._journal.get(keys), strict=True))

    def _check_processes(self, batches: int) -> None:
        """Raises UserError if a process has nothing to do in the first step; later ones may ask about fewer clips."""
        count = jax.process_count()
        if not self._asked and count > max(1, batches):
            raise UserError(
                f"{count} processes are more than the {batches} batches of batch={self._batch}: start fewer processes, "
                "or lower --config.batch"
            )
        self._asked = True

    def _answers_of(self, values: dict[str, list | str]) -> dict[str, list]:
        """Returns the answers among the values, and records the asks without an answer.

        Raises:
            RunError: no ask has an answer.
        """
        for id, value in values.items():
            if isinstance(value, str):
                self.leave_out(id, value)
        answers = {id: value for id, value in values.items() if not isinstance(value, str)}
        if values and not answers:
            raise RunError(f"none of {len(values)} samples was answered; the first: {next(iter(values.values()))}")
        return answers


def present(listed: Sequence[tuple[str, Path | None]], session: Session, where: Path) -> list[tuple[str, Path]]:
    """Returns the listed samples whose clips exist, and records the others as missing.

    Raises:
        UserError: none of the clips exists.
    """
    found = []
    for id, path in listed:
        if path is None or not path.exists():
            session.leave_out(id, f"its clip is not in {where}")
        else:
            found.append((id, path))
    if not found:
        raise UserError(f"{where} holds none of the {len(listed)} listed clips: copy the data set's clips there")
    return found


def _prepared(respondent: Respondent, asks: Sequence[Ask], batches: Sequence[slice]) -> Iterator[tuple[slice, list]]:
    """Yields each batch with its frames; a clip that cannot be decoded has its error instead."""

    def prepare(ask: Ask) -> Any:
        try:
            return respondent.prepare(ask)
        except VideoError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        ahead = None
        for batch, following in zip(batches, [*batches[1:], None], strict=False):
            now = ahead or [pool.submit(prepare, ask) for ask in asks[batch]]
            ahead = [pool.submit(prepare, ask) for ask in asks[following]] if following else None
            yield batch, [future.result() for future in now]


def _answered(asks: Sequence[Ask], prepared: Sequence[Any], work) -> list[list | str]:
    """Returns the answers to a batch; for an ask without an answer, the reason as a text."""
    good = [i for i, frames in enumerate(prepared) if not isinstance(frames, VideoError)]
    replies = work([asks[i] for i in good], [prepared[i] for i in good]) if good else []
    values: list[Any] = [str(frames) if isinstance(frames, VideoError) else None for frames in prepared]
    for i, answers in zip(good, replies, strict=True):
        values[i] = str(answers) if isinstance(answers, Unanswered) else answers
    return values


def _with_descriptions(ask: Ask, descriptions: Sequence[str]) -> Ask:
    names = ["the video"] if len(ask.clips) == 1 else [f"video {number}" for number in range(1, len(ask.clips) + 1)]
    prefix = "\n".join(f"Description of {name}: {text}" for name, text in zip(names, descriptions, strict=True))
    conversations = []
    for turns in ask.conversations:
        (question, answer), *rest = turns
        conversations.append(((f"{prefix}\n{question}", answer), *rest))
    return dataclasses.replace(ask, conversations=tuple(conversations))


def _face_keys(keys: Sequence[str]) -> list[str]:
    """Returns the keys under which the clips without a face are kept."""
    return [f"{key} without face" for key in keys]


def _key(step: str, respondent: Respondent, ask: Ask, options: list) -> str:
    clips = [clip.identity() for clip in ask.clips]
    content = json.dumps([step, respondent.identity, ask.id, clips, ask.conversations, options], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
