"""The `annotate` command writes features, a summary and question-answer pairs for every kept clip (paper, section 3.2).

It writes `annotations.jsonl`, sorted by id, and `unannotated.jsonl` with the reason for each clip without a text. Both
files depend only on the kept clips, the replies in `calls.sqlite` and the reviews. A run that was killed and resumed
writes the same bytes as a run without interruption.
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

DUPLICATE_ROUNDS = 3  # most times that a summary equal to another clip's is rewritten
READ = 1 << 20  # bytes of a file that are read at a time


class Writer(Protocol):
    """Writes the text of a clip: from an endpoint's answers, or from templates."""

    def write(self, clip: Clip, refused: Sequence[str] = ()) -> Annotation:
        """See `describe.Describer.write`."""


@dataclass
class Texts:
    """Holds an annotation for each clip, or the reason why it has none, by the clip's id."""

    annotations: dict[str, Annotation] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unanswered: int = 0  # clips without an answer, which a repeated command may still annotate


def annotate(out: Path, backend: str, limits: Limits, attempts: int, dry_run: bool) -> None:
    """Writes the texts of all kept clips of the corpus folder `out`, or with `dry_run` prints an estimate of the cost.

    Raises:
      UserError: the input is invalid, or the endpoint refuses the key, the model or the account.
      RunError: some clips got no answer, or the spending limit is reached. All paid replies are kept.
    """
    clips, reviews = read_kept(out), Reviews(out)
    if backend == "template":
        if dry_run:
            raise UserError("--dry_run needs --backend=openai: --backend=template costs nothing, so leave it out")
        if clips and not any(map(_is_labelled, clips)):
            raise UserError(
                f"--backend=template writes from labels alone, and none of the {len(clips)} clips has any: use "
                "--backend=openai, or give scan a folder with labels"
            )
        texts = write_texts(clips, TemplateWriter(), reviews, 1, threading.Event())
    else:
        with contextlib.closing(Calls(out)) as calls:
            if dry_run:
                print(forecast(_readable(clips, reviews), calls, model_of_environment(), attempts, limits))
                return
            with termination("calls in progress are finished and kept") as stop:
                try:
                    endpoint = Endpoint(calls, limits, stop)
                    writer = Describer(endpoint, model_of_environment(), attempts)
                    texts = write_texts(clips, writer, reviews, limits.concurrency, stop)
                except Stopped:
                    log.info("stopped: all paid replies are kept, and the same command resumes")
                    return
                log.info("$%.2f paid so far", endpoint.spent)
    save(out, texts, len(clips))


def save(out: Path, texts: Texts, clips: int) -> None:
    """Writes annotations.jsonl and unannotated.jsonl, and logs their counts.

    Raises:
      RunError: some clips got no answer.
    """
    reasons = sorted(texts.reasons.items())
    without = (json.dumps({"id": name, "reason": reason}, ensure_ascii=False) for name, reason in reasons)
    replace_file(out / UNANNOTATED, "".join(f"{line}\n" for line in without))
    lines = (texts.annotations[name].line() for name in sorted(texts.annotations))
    replace_file(out / ANNOTATIONS, "".join(f"{line}\n" for line in lines))
    doubtful = sum(bool(annotation.problems) for annotation in texts.annotations.values())
    counts = (
        f"{len(texts.annotations)} of {clips} clips have texts, {doubtful} of them with problems for review; "
        f"{out / UNANNOTATED} lists the {len(reasons)} clips without a text and the reasons"
    )
    if texts.unanswered:
        raise RunError(f"{counts}; {texts.unanswered} got no answer, and the same command tries them again")
    log.info("%s", counts)


def write_texts(
    clips: Sequence[Kept], writer: Writer, reviews: Reviews, concurrency: int, stop: threading.Event
) -> Texts:
    """Writes every clip's text. A summary equal to an earlier clip's is rewritten, unless a template wrote it.

    Raises:
      Stopped: `stop` was set.
      UserError, RunError: no further call can succeed. Calls in progress are finished and kept first.
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
                _record(texts, futures[future], future)
        except BaseException:
            stop.set()  # no further call starts; those in progress will be charged, so they are finished
            pool.shutdown(cancel_futures=True)
            raise


def _record(texts: Texts, name: str, future: Future) -> None:
    """Records the outcome of one clip in `texts`."""
    texts.annotations.pop(name, None)  # from an earlier round
    try:
        texts.annotations[name] = future.result()
    except Unannotated as error:
        texts.reasons[name] = str(error)
    except NoAnswer as error:
        texts.reasons[name] = f"no answer: {error}"
        texts.unanswered += 1
    except OutOfBudget:
        texts.reasons[name] = "the spending limit is reached: raise --spend_limit"
        texts.unanswered += 1


def _duplicates(texts: Texts) -> dict[str, str]:
    """Returns clip -> the first clip with the same summary; template texts are not compared."""
    first: dict[str, str] = {}
    repeated = {}
    for name, annotation in sorted(texts.annotations.items()):
        if annotation.backend != "template":
            found = first.setdefault(" ".join(annotation.summary.lower().split()), name)
            if found != name:
                repeated[name] = found
    return repeated


def read_clip(kept: Kept) -> Clip:
    """Reads a clip's labels and the hash of its content; raises Unannotated if either cannot be read."""
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


def _is_labelled(kept: Kept) -> bool:
    with contextlib.suppress(UserError):
        return any(kept.labels().values())
    return False


def _readable(clips: Sequence[Kept], reviews: Reviews) -> Iterator[tuple[Clip, Sequence[str]]]:
    """Yields every clip that can be read, with its refused summaries."""
    for kept in tqdm(clips, unit=" clips", mininterval=1, disable=None):
        with contextlib.suppress(Unannotated):
            yield read_clip(kept), reviews.refused(kept.id)


def define_flags() -> None:
    """Defines the options of `annotate`."""
    known = Limits()
    flags.DEFINE_enum("backend", "openai", ["openai", "template"], "Source of the texts: an endpoint, or templates")
    flags.DEFINE_bool("dry_run", False, "Print the number of calls left and their cost, and make none")
    flags.DEFINE_integer("attempts", 3, "Most answers per step until one passes the checks", lower_bound=1)
    flags.DEFINE_integer("concurrency", known.concurrency, "Simultaneous calls", lower_bound=1, upper_bound=256)
    flags.DEFINE_float("calls_per_minute", known.calls_per_minute, "Rate limit, including retries", lower_bound=0.1)
    flags.DEFINE_float("spend_limit", known.spend, "Dollars for all runs on this folder; 0: no limit", lower_bound=0)
    flags.DEFINE_float("input_price", known.input_price, "Dollars per million input tokens", lower_bound=0)
    flags.DEFINE_float("output_price", known.output_price, "Dollars per million output tokens", lower_bound=0)
    flags.DEFINE_integer("retries", known.retries, "Retries of a call without an answer", lower_bound=0)
    flags.DEFINE_float("timeout", known.timeout, "Seconds to wait for a byte of an answer", lower_bound=0.1)


def run(out: Path) -> None:
    """Annotates according to the flags."""
    given = flags.FLAGS
    limits = Limits(
        concurrency=given.concurrency,
        calls_per_minute=given.calls_per_minute,
        spend=given.spend_limit,
        input_price=given.input_price,
        output_price=given.output_price,
        retries=given.retries,
        timeout=given.timeout,
    )
    annotate(out, given.backend, limits, given.attempts, given.dry_run)
