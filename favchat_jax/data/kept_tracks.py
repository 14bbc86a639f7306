"""Keeps the tracks of a packed data set beside it, so that training looks for each clip's faces once.

A split's file has one JSON object per clip, in the split's order: the clip's id, the numbers of the searched frames,
the picture's shape, and the boxes and eyes of the largest face, if there is one. A stopped search goes on where it
stopped.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.faces.search import LOOKS
from favchat_jax.data.faces.tracks import Track, Tracks
from favchat_jax.data.storage import RecordSource
from favchat_jax.data.video import VideoError, decode
from favchat_jax.errors import UserError
from favchat_jax.files import write_errors
from favchat_jax.signals import end_with_parent

log = logging.getLogger("favchat_jax")

CHUNK = 16  # clips that a process searches at a time


class KeptTracks:
    """The tracks of a data set's clips, read from their file one at a time. It can be pickled to worker processes."""

    def __init__(self, path: Path):
        self._path = path
        self._places: dict[str, int] | None = None  # id -> where its line begins

    def of(self, id: str) -> Tracks | None:
        """Returns a clip's tracks, or None if it was not searched."""
        place = self._index().get(id)
        if place is None:
            return None
        with self._path.open("rb") as file:
            file.seek(place)
            return _read(_entry(file.readline(), self._path))

    def _index(self) -> dict[str, int]:
        if self._places is None:
            self._places = {}
            place = 0
            for line in self._path.read_bytes().splitlines(keepends=True):
                self._places[_entry(line, self._path)["id"]] = place
                place += len(line)
        return self._places

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": None}


def file_of(source: RecordSource, crop: FaceCrop, frames: int) -> Path:
    """Returns the file of a split's tracks, which is another for other settings of the search."""
    model = hashlib.sha256(Path(crop.model).read_bytes()).hexdigest() if crop.model else ""
    settings = json.dumps([crop.detector, model, crop.smallest, min(frames, LOOKS)])
    return source.folder / f"faces-{source.split}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.jsonl"


def find_all(source: RecordSource, crop: FaceCrop, *, frames: int, size: int, processes: int) -> None:
    """Searches the clips of a split for faces and keeps their tracks; clips that were searched before are skipped.

    A second process that searches the same clips waits for the first.

    Args:
        source: the split.
        crop: how faces are found.
        frames: number of frames that a run samples from a clip.
        size: side of the model's input in pixels.
        processes: number of processes that search; 0 searches in this one.

    Raises:
        UserError: the detector cannot be loaded, or the file cannot be written.
    """
    crop.load()  # raises before any process starts
    path = file_of(source, crop, frames)
    with write_errors(path), path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = _whole_lines(path)
        if done == len(source):
            return
        search, numbers = _Search(source, crop, frames, size), range(done, len(source))
        with _mapping(processes) as mapped:
            lines = mapped(search, numbers)
            for line in tqdm(lines, "finding faces", len(source), initial=done, unit=" clips", mininterval=1):
                file.write(line)
    faceless = sum(not _entry(line, path).get("boxes") for line in path.read_bytes().splitlines())
    log.info("%d of %d clips show no face: the facial encoder reads their whole frames", faceless, len(source))


@dataclass(frozen=True)
class _Search:
    """Searches a clip by its number; a picklable function."""

    source: RecordSource
    crop: FaceCrop
    frames: int
    size: int

    def __call__(self, number: int) -> bytes:
        record = self.source[number]
        entry: dict[str, Any] = {"id": record.id}
        with contextlib.suppress(VideoError):  # a bad record, which the loader counts
            clip = decode(record.clip, frames=self.frames, size=self.size, face_crop=self.crop, name=record.id)
            assert clip.tracks is not None, "asked for"
            entry |= _written(clip.tracks)
        return f"{json.dumps(entry)}\n".encode()


@contextlib.contextmanager
def _mapping(processes: int) -> Iterator[Callable[[Callable[[int], bytes], range], Iterator[bytes]]]:
    """Yields `map`, which in several processes keeps the order too."""
    if not processes:
        yield map
        return
    with get_context("spawn").Pool(processes, _start_process) as pool:
        yield functools.partial(pool.imap, chunksize=CHUNK)


def _start_process() -> None:
    cv2.setNumThreads(1)
    end_with_parent()


def _whole_lines(path: Path) -> int:
    """Counts the lines of a file, and cuts off one that was being written when a process ended."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    return content.count(b"\n")


def _entry(line: bytes, path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or "id" not in entry:
        raise UserError(f"{path} is damaged: delete it, and the clips are searched for faces again")
    return entry


def _written(tracks: Tracks) -> dict[str, Any]:
    main = tracks.tracks[:1]
    return {
        "frames": tracks.places.tolist(),
        "shape": tracks.shape,
        "boxes": [track.boxes.tolist() for track in main],
        "eyes": [track.eyes.tolist() for track in main],
        "found": [track.found.astype(int).tolist() for track in main],
    }


def _read(entry: Mapping[str, Any]) -> Tracks | None:
    if "frames" not in entry:
        return None
    rows = zip(*(entry[name] for name in ("boxes", "eyes", "found")), strict=True)
    tracks = (Track(np.array(boxes), np.array(eyes), np.array(found, bool)) for boxes, eyes, found in rows)
    height, width = entry["shape"]
    return Tracks(np.array(entry["frames"]), (height, width), tuple(tracks))
