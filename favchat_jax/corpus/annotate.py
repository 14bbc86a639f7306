"""The texts of a corpus: features, a summary and question-answer pairs for every kept clip (paper, section 3.2).

Writes `annotations.jsonl`, sorted by id, and `unannotated.jsonl` with the reason for each clip that has no text. Both
follow from the kept clips, the replies in `calls.sqlite` and the reviews, and from nothing else: however often a run
was killed, the bytes are the same.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from absl import flags
from tqdm import tqdm

from favchat_jax.corpus.annotations import UNANNOTATED, Annotation
from favchat_jax.corpus.calls import Calls
from favchat_jax.corpus.describe import Clip, Describer, Unannotated
from favchat_jax.corpus.endpoint import Endpoint, Limits, OutOfBudget, model_of_environment
from favchat_jax.corpus.estimate import forecast
from favchat_jax.corpus.kept import Kept, read_kept
from favchat_jax.corpus.manifest import ANNOTATIONS
from favchat_jax.corpus.reviews import Reviews
from favchat_jax.corpus.templates import TemplateWriter
from favchat_jax.errors import RunError, UserError
from favchat_jax.files import replace_file
from favchat_jax.openai_client import NoAnswer, Stopped
from favchat_jax.signals import termination

log = logging.getLogger("favchat_jax")

DUPLICATE_ROUNDS = 3  # how often a summary that another clip has already is written anew
READ = 1 << 20


class Writer(Protocol):
    """What writes the text of a clip: an endpoint's answers, or templates."""

    def write(self, clip: Clip, refused: Sequence[str] = ()) -> Annotation:
        """See `describe.Describer.write`."""


@dataclass
class Texts:
    """What became of the clips: an annotation each, or the reason why there is none."""

    annotations: dict[str, Annotation] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unanswered: int = 0  # clips that the same command may still annotate


def annotate(out: Path, backend: str, limits: Limits, attempts: int, dry_run: bool) -> None:
    """Writes the texts of all kept clips of the corpus folder `out`, or says what that would cost.

    Raises:
      UserError: bad input, or an endpoint that refuses the key, the model or the account.
      RunError: some clips got no answer, or the limit of what may be spent is reached; what is paid for is kept.
    """
    clips, reviews = read_kept(out), Reviews(out)
    if backend == "template":
        if dry_run:
            raise UserError("--backend=template calls nobody: --dry_run is for --backend=openai")
        texts = write_texts(clips, TemplateWriter(), reviews, 1, threading.Event())
    else:
        with contextlib.closing(Calls(out)) as calls:
            if dry_run:
                print(forecast(_readable(clips, reviews), calls, model_of_environment(), attempts, limits))
                return
            with termination("calls under way are awaited and kept") as stop:
                try:
                    endpoint = Endpoint(calls, limits, stop)
                    writer = Describer(endpoint, model_of_environment(), attempts)
                    texts = write_texts(clips, writer, reviews, limits.concurrency, stop)
                except Stopped:
                    log.info("stopped: what is paid for is kept, and the same command goes on")
                    return
                log.info("$%.2f paid in all", endpoint.spent)
    save(out, texts, len(clips))


def save(out: Path, texts: Texts, clips: int) -> None:
    """Writes both files and says what is in them."""
    reasons = sorted(texts.reasons.items())
    without = (json.dumps({"id": name, "reason": why}, ensure_ascii=False) for name, why in reasons)
    replace_file(out / UNANNOTATED, "".join(f"{line}\n" for line in without))
    replace_file(
        out / ANNOTATIONS, "".join(f"{texts.annotations[name].line()}\n" for name in sorted(texts.annotations))
    )
    doubtful = sum(bool(annotation.problems) for annotation in texts.annotations.values())
    told = (
        f"{len(texts.annotations)} of {clips} clips have texts, {doubtful} of them with problems for review; "
        f"the {len(reasons)} without are in {out / UNANNOTATED} with their reasons"
    )
    if texts.unanswered:
        raise RunError(f"{told}; {texts.unanswered} got no answer, and the same command tries them again")
    log.info("%s", told)


def write_texts(
    clips: Sequence[Kept], writer: Writer, reviews: Reviews, concurrency: int, stop: threading.Event
) -> Texts:
    """Every clip's text. A summary that an earlier clip has too is written anew, but for templates'.

    Raises:
      Stopped: `stop` was set.
      UserError, RunError: what ends a run. Calls under way are awaited and kept before.
    """
    texts, pending = Texts(), list(clips)
    refused = {clip.id: reviews.refused(clip.id) for clip in clips}
    for _ in range(1 + DUPLICATE_ROUNDS):
        _write_all(pending, writer, refused, texts, concurrency, stop)
        repeated = _duplicates(texts)
        pending = [clip for clip in clips if clip.id in repeated]
        if not pending:
            return texts
        for clip in pending:
            refused[clip.id] += (texts.annotations[clip.id].summary,)
    for clip in pending:
        problem = f"its summary is that of clip {repeated[clip.id]}"
        annotation = texts.annotations[clip.id]
        texts.annotations[clip.id] = dataclasses.replace(annotation, problems=(*annotation.problems, problem))
    return texts


def _write_all(
    clips: Sequence[Kept],
    writer: Writer,
    refused: Mapping[str, Sequence[str]],
    texts: Texts,
    concurrency: int,
    stop: threading.Event,
) -> None:
    def write(kept: Kept) -> Annotation:
        return writer.write(read_clip(kept), refused[kept.id])

    with ThreadPoolExecutor(concurrency) as pool:
        futures = {pool.submit(write, kept): kept.id for kept in clips}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), unit=" clips", mininterval=1, disable=None):
                _note(texts, futures[future], future)
        except BaseException:
            stop.set()  # no further call is begun; those under way are paid for and awaited
            pool.shutdown(cancel_futures=True)
            raise


def _note(texts: Texts, name: str, future: Future) -> None:
    texts.annotations.pop(name, None)  # of an earlier round
    try:
        texts.annotations[name] = future.result()
    except Unannotated as error:
        texts.reasons[name] = str(error)
    except NoAnswer as error:
        texts.reasons[name] = f"no answer: {error}"
        texts.unanswered += 1
    except OutOfBudget:
        texts.reasons[name] = "the limit of what may be spent was reached: raise --spend_limit"
        texts.unanswered += 1


def _duplicates(texts: Texts) -> dict[str, str]:
    """Clip -> the clip before it that has the same summary."""
    first: dict[str, str] = {}
    repeated = {}
    for name in sorted(texts.annotations):
        annotation = texts.annotations[name]
        if annotation.backend != "template":
            found = first.setdefault(" ".join(annotation.summary.lower().split()), name)
            if found != name:
                repeated[name] = found
    return repeated


def read_clip(kept: Kept) -> Clip:
    """A clip with its labels and its content's hash; raises Unannotated where either cannot be read."""
    digest = hashlib.sha256()
    try:
        labels = kept.labels()
        with kept.path.open("rb") as file:
            while block := file.read(READ):
                digest.update(block)
    except UserError as error:
        raise Unannotated(str(error)) from None
    except OSError as error:
        raise Unannotated(f"{kept.path.name} cannot be read ({error.strerror}): run clip again") from None
    return Clip(kept.id, kept.path, labels, kept.frames, digest.hexdigest())


def _readable(clips: Sequence[Kept], reviews: Reviews) -> Iterator[tuple[Clip, Sequence[str]]]:
    for kept in tqdm(clips, unit=" clips", mininterval=1, disable=None):
        with contextlib.suppress(Unannotated):
            yield read_clip(kept), reviews.refused(kept.id)


def define_flags() -> None:
    """The options of `annotate`."""
    known = Limits()
    flags.DEFINE_enum("backend", "openai", ["openai", "template"], "Who writes: an endpoint, or templates from labels")
    flags.DEFINE_bool("dry_run", False, "Print what is left to ask and what it costs, and ask nothing")
    flags.DEFINE_integer("attempts", 3, "Answers that a step may take until the checks pass", lower_bound=1)
    flags.DEFINE_integer("concurrency", known.concurrency, "Calls at a time", lower_bound=1, upper_bound=256)
    flags.DEFINE_float("calls_per_minute", known.calls_per_minute, "Rate limit, retries included", lower_bound=0.1)
    flags.DEFINE_float("spend_limit", known.spend, "Dollars for all runs on this folder; 0: no limit", lower_bound=0)
    flags.DEFINE_float("input_price", known.input_price, "Dollars for a million input tokens", lower_bound=0)
    flags.DEFINE_float("output_price", known.output_price, "Dollars for a million output tokens", lower_bound=0)
    flags.DEFINE_integer("retries", known.retries, "Further tries of a call without an answer", lower_bound=0)
    flags.DEFINE_float("timeout", known.timeout, "Seconds to wait for a byte of an answer", lower_bound=0.1)


def run(out: Path) -> None:
    """Annotates as the flags say."""
    given = flags.FLAGS
    limits = Limits(
        given.concurrency,
        given.calls_per_minute,
        given.spend_limit,
        given.input_price,
        given.output_price,
        given.retries,
        given.timeout,
    )
    annotate(out, given.backend, limits, given.attempts, given.dry_run)
