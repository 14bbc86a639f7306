"""Processes many videos in an Apache Beam pipeline that can be killed at any point and started again.

Every video's result is a small file below `work/`, written as a draft and renamed. A result of the same input and
settings is reused. On one machine, Beam's DirectRunner works in this process. Other runners work as well if all their
workers see the videos and the corpus folder under the same paths.
"""

import contextlib
import errno
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from tqdm import tqdm

from favchat_jax.errors import UserError
from favchat_jax.files import replace_file, write_errors

log = logging.getLogger("favchat_jax")

Work = Callable[[Any], dict[str, Any]]

# Videos per pipeline on one machine: DirectRunner keeps all its intermediate data until its pipeline ends.
PORTION = 500
LOOK_EVERY = 1.0  # seconds between two looks at how many results there are, at least


def run(
    step: str,
    work: Work,
    items: Iterable[tuple[str, Any, Any]],
    out: Path,
    options: Sequence[str] = (),
    still_there: Callable[[dict[str, Any]], bool] = lambda result: True,
) -> list[dict[str, Any]]:
    """Returns the result of every item, in the order of the items.

    Args:
        step: name of the folder below `work/`.
        work: (item) -> result, both JSON values; it is pickled for the workers.
        items: (name, key, item): the name of the result's file, everything that the result depends on, and the input.
        out: the corpus folder.
        options: options of Beam, such as --runner=FlinkRunner; see Beam's documentation of each runner.
        still_there: (result) -> whether the other files that the work wrote still exist.

    Raises:
        UserError, OSError: Beam is not installed, or the run has to end, for OSError because the disk is full;
            finished results are kept.
    """
    check_beam()
    folder = str((out / "work" / step).resolve())
    todo = Path(f"{folder}.todo.jsonl")  # a file, since Beam limits the size of a pipeline's description
    Path(folder).mkdir(parents=True, exist_ok=True)
    keys, left = {}, 0
    with todo.open("w", encoding="utf-8") as file:
        for name, key, item in items:
            keys[name] = _digest(key)
            if not _is_done(_finished(folder, name, keys[name]), still_there):
                file.write(json.dumps([name, keys[name], item]) + "\n")
                left += 1
    _remove_stale(folder, keys)
    log.info("%s: %d of %d videos remain", step, left, len(keys))
    here = all(not option.startswith("--runner=") or option == "--runner=DirectRunner" for option in options)
    portion = PORTION if here else max(1, left)
    with _progress(step, folder, todo, left):
        for start in range(0, left, portion):
            _run_pipeline(work, todo, range(start, start + portion), folder, options)
    todo.unlink()
    return [_finished(folder, name, key) for name, key in keys.items()]


@contextlib.contextmanager
def _progress(step: str, folder: str, todo: Path, left: int) -> Iterator[None]:
    """Shows how many results are newer than the list of what is left, whichever worker or machine wrote them."""
    started, ended = todo.stat().st_mtime_ns, threading.Event()
    bar = tqdm(total=left, desc=step, unit=" videos", mininterval=1, disable=None if left else True)

    def watch() -> None:
        pause = LOOK_EVERY
        while not ended.wait(pause):
            before = time.monotonic()
            bar.update(_count(folder, started) - bar.n)
            pause = max(LOOK_EVERY, 20 * (time.monotonic() - before))  # counting takes 5 % of the time at most

    thread = threading.Thread(target=watch, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if not bar.disable:
            thread.join()
            bar.update(_count(folder, started) - bar.n)
        bar.close()


def _count(folder: str, started: int) -> int:
    """Returns the number of results that were written since `started`, in nanoseconds."""
    found = 0
    for path in Path(folder).glob("*/*.json"):
        with contextlib.suppress(OSError):  # a draft that was renamed meanwhile
            found += path.stat().st_mtime_ns >= started
    return found


def _run_pipeline(work: Work, todo: Path, lines: range, folder: str, options: Sequence[str]) -> None:
    with (
        quiet_beam() as beam,
        beam.Pipeline(options=beam.options.pipeline_options.PipelineOptions(list(options))) as pipeline,
    ):
        # Without Reshuffle, a runner keeps the lines of one file in one worker.
        each = pipeline | beam.Create([str(todo)]) | beam.FlatMap(_lines, lines) | beam.Reshuffle()
        _ = each | beam.Map(_do, work=work, folder=folder)


def _lines(path: str, lines: range) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from itertools.islice(file, lines.start, lines.stop)


def _do(line: str, work: Work, folder: str) -> None:
    name, key, item = json.loads(line)
    file = _result(folder, name)
    with write_errors(file):
        result = work(item)
        file.parent.mkdir(exist_ok=True)
        replace_file(file, json.dumps({"key": key, "result": result}), sync=False)  # a damaged file is made again


def check_beam() -> None:
    """Raises UserError if Apache Beam is not installed."""
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("apache_beam is not installed: pip install -e '.[corpus]'")


@contextlib.contextmanager
def quiet_beam() -> Iterator[ModuleType]:
    """Yields Apache Beam without its notes on missing clouds and its log of errors that it raises anyway.

    Raises:
        UserError: Beam is not installed, or the worker's own error. Beam adds its location, and from other processes
            passes on only its text.
        OSError: the disk is full, which ArrayRecord reports only as text.
    """
    check_beam()
    logging.disable(logging.WARNING)
    try:
        import apache_beam
    finally:
        logging.disable(logging.NOTSET)
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield apache_beam
    except Exception as error:
        ours = re.search("(.*)" if isinstance(error, UserError) else "UserError: (.*)", str(error))
        if ours is not None:
            raise UserError(re.split(r" \[while running|\\n", ours[1])[0]) from None
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise
    finally:
        logger.setLevel(level)


def _is_done(result: dict[str, Any] | None, still_there: Callable[[dict[str, Any]], bool]) -> bool:
    return result is not None and still_there(result)


def _finished(folder: str, name: str, key: str) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(_result(folder, name).read_bytes(), object_pairs_hook=_with_shared_names)
        if found["key"] == key:
            return found["result"]
    return None


def _with_shared_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object with shared field names, which otherwise take as much memory as the values."""
    return {sys.intern(name): value for name, value in pairs}


def _result(folder: str, name: str) -> Path:
    """Returns the path of a result, in a subfolder: tens of thousands of names in one folder are slow."""
    return Path(folder, hashlib.sha256(name.encode()).hexdigest()[:2], f"{name}.json")


def _remove_stale(folder: str, names: Collection[str]) -> None:
    """Removes results that are no longer needed, and drafts of a killed run."""
    for path in Path(folder).glob("*/*"):
        if path.suffix != ".json" or path.stem not in names:
            path.unlink()


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def define_flags() -> None:
    """Defines the option of every step that runs as a pipeline."""
    flags.DEFINE_multi_string(
        "beam", [], "Option of Apache Beam without its dashes, such as runner=FlinkRunner; repeatable"
    )


def chosen_options() -> list[str]:
    """Returns Beam's options from the flags."""
    return [f"--{option}" for option in flags.FLAGS.beam]
