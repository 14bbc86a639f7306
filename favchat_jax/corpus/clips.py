"""Selects videos that show a face for long enough, and cuts the best stretch of each as a clip (Section 3.1).

CelebV-HQ's clips are kept in full. Other videos are kept if enough of their sampled frames show a face.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from favchat_jax.corpus import footage
from favchat_jax.corpus.manifest import OK
from favchat_jax.data.colour import to_rgb
from favchat_jax.data.faces.detectors import Detector, Faces, load_detector, overlap
from favchat_jax.data.faces.search import LOOKS, search
from favchat_jax.data.faces.tracks import linked
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError
from favchat_jax.files import replace_file

VIDEOS = "kept"  # the folder of clips


@dataclass(frozen=True)
class Settings:
    """Holds the settings for choosing and cutting clips.

    Attributes:
        detector, model: see `data/faces/detectors.load_detector`.
        min_share: share of the sampled frames that must show a face.
        min_face: height of the smallest face that counts, as a share of the picture's shorter side. With 0.1, even
            a distant player on a field counts.
        crop: keep only the part of the picture around the face.
        every: one of this many frames is sampled.
        shortest, longest: length of a clip in frames.
        filter_celebvhq: judge CelebV-HQ's clips too.
        largest_side: in pixels; larger pictures are shrunk.
    """

    detector: str = "centerface"
    model: str = ""
    min_share: float = 0.6
    min_face: float = 0.2
    crop: bool = False
    every: int = 4
    shortest: int = 36
    longest: int = 60
    filter_celebvhq: bool = False
    largest_side: int = 1280


@dataclass(frozen=True)
class Sighting:
    """Holds the times of all frames in seconds, and the boxes of faces in each sampled frame."""

    times: list[float | None]
    boxes: list[np.ndarray]

    @property
    def share(self) -> float:
        return sum(len(boxes) > 0 for boxes in self.boxes) / max(1, len(self.boxes))


def make_clip(row: dict[str, Any], settings: Settings, out: str) -> dict[str, Any]:
    """Judges one video of the manifest, and writes its clip if it is kept.

    Returns:
        {"kept": row of kept.parquet} or {"dropped": the reason}.

    Raises:
        UserError: the detector cannot be loaded.
    """
    if row["status"] != OK:
        return {"dropped": f"{row['status']}: {row['reason']}"}
    target = Path(out, VIDEOS, f"{row['id']}.mp4")
    detector = _detector(settings.detector, settings.model)
    try:
        if row["source"] == "celebvhq" and not settings.filter_celebvhq:
            content, facts = _complete_clip(row, settings)
        else:
            content, facts = _filtered(row, settings, detector)
    except (UserError, OSError) as error:  # from reading; the clip is written below
        return {"dropped": str(error)}
    target.parent.mkdir(exist_ok=True)
    replace_file(target, content)
    columns = {name: row[name] for name in ("id", "source", "group", "attributes")}
    facts["sha256"] = hashlib.sha256(content).hexdigest()
    return {"kept": {**columns, "path": f"{VIDEOS}/{target.name}", **facts}}


def _complete_clip(
    row: dict[str, Any], settings: Settings, face_share: float | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Returns a clip that is kept in full: copied, or cut out of the longer video."""
    path = Path(row["path"])
    first = round((row["start"] or 0) * row["fps"])
    facts = {"fps": row["fps"], "face_share": face_share, "start_frame": first}
    if row["end"] is None and not row["box"] and path.suffix.lower() == ".mp4":
        decode(path, frames=3, size=footage.SMALLEST_SIDE)  # raises for a damaged file
        return path.read_bytes(), {**facts, "frames": row["frames"]}
    content, count = footage.encode(_frames(row), row["fps"], settings.largest_side)
    if not count:
        raise UserError("no frame can be decoded: fetch the video again")
    return content, {**facts, "frames": count}


def _filtered(row: dict[str, Any], settings: Settings, detector: Detector) -> tuple[bytes, dict[str, Any]]:
    """Returns the best stretch of a video that shows a face for long enough.

    Raises:
        UserError: the video does not qualify; the message is the reason.
    """
    seen = look_for_faces(_frames(row), detector, settings.every, settings.min_face)
    if not seen.times:
        raise UserError("no frame can be decoded: fetch the video again")
    if seen.share < settings.min_share:
        raise UserError(f"a face in {seen.share:.0%} of the sampled frames; {settings.min_share:.0%} are required")
    if row["source"] == "celebvhq":
        return _complete_clip(row, settings, round(seen.share, 4))
    if len(seen.times) < settings.shortest:
        raise UserError(f"{len(seen.times)} frames; at least {settings.shortest} are required")
    found = [len(boxes) > 0 for boxes in seen.boxes]
    start, length = best_stretch(found, settings.every, len(seen.times), settings.shortest, settings.longest)
    pictures = _stretch(row, seen.times, start, length)
    if settings.crop:
        box = track_box(seen.boxes[start // settings.every : -(-(start + length) // settings.every)])
        pictures = (footage.crop(picture, box) for picture in pictures)
    content, count = footage.encode(pictures, row["fps"], settings.largest_side)
    return content, {"fps": row["fps"], "face_share": round(seen.share, 4), "start_frame": start, "frames": count}


@functools.lru_cache(maxsize=1)
def _detector(name: str, model: str) -> Detector:
    cv2.setNumThreads(1)  # parallel work is up to the pipeline's workers
    return load_detector(name, model)


def _frames(row: dict[str, Any], start: float | None = None) -> Iterator[av.VideoFrame]:
    """Returns the frames of a row's part of the video, cut to a square like CelebV-HQ's if the row has a box.

    A model sees every clip as a square, so only a square box leaves faces their shape.
    """
    pictures = footage.frames(Path(row["path"]), row["start"] if start is None else start, row["end"])
    if not row["box"]:
        return pictures
    box = json.loads(row["box"])
    return (footage.crop(picture, box, square=True) for picture in pictures)


def look_for_faces(pictures: Iterator[av.VideoFrame], detector: Detector, every: int, smallest: float) -> Sighting:
    """Looks for faces in one of `every` frames, from the first on; keeps few pictures at a time.

    A face counts if it is found in several looks and is not below `smallest`, a share of the picture's shorter side. It
    counts in the looks between, too, where the detector missed it (`data/faces/tracks.py`).
    """
    times: list[float | None] = []
    found: list[Faces] = []
    looks: list[av.VideoFrame] = []
    shape = (1, 1)
    for number, picture in enumerate(pictures):
        times.append(picture.time)
        shape = picture.height, picture.width
        if number % every == 0:
            looks.append(picture)
        if len(looks) == LOOKS:
            found += _faces(looks, detector, smallest)
            looks = []
    if looks:
        found += _faces(looks, detector, smallest)
    boxes = [[] for _ in found]
    for track in linked(found, shape):
        seen = sorted(track)
        rows = np.array([found[look].boxes[track[look]] for look in seen])
        for look in range(seen[0], seen[-1] + 1):
            boxes[look].append(np.array([np.interp(look, seen, column) for column in rows.T]))
    return Sighting(times, [np.array(sorted(faces, key=_area, reverse=True)).reshape(-1, 4) for faces in boxes])


def _faces(looks: Sequence[av.VideoFrame], detector: Detector, smallest: float) -> list[Faces]:
    reformatter, shape = VideoReformatter(), (looks[0].height, looks[0].width)

    def picture(number: int, size: tuple[int, int]) -> np.ndarray:
        return to_rgb(reformatter, looks[number], size[1], size[0], Interpolation.BICUBIC)

    found = search(detector, range(len(looks)), picture, shape, thorough=False)
    return [faces.at_least(smallest, *shape) for faces in found]


def best_stretch(found: Sequence[bool], every: int, frames: int, shortest: int, longest: int) -> tuple[int, int]:
    """Returns the first frame and the length of the stretch with the most sampled frames that show a face.

    Among equals, the earliest that begins with a face wins. Ends without a face are trimmed, down to `shortest`.

    Args:
        found: whether a face was found in frame 0, `every`, 2 `every`, ...
        frames: length of the video, at least `shortest`.
    """
    length = min(longest, frames)
    faces = np.zeros(frames + 1, int)  # faces[i]: finds before frame i
    faces[1:] = np.cumsum([number % every == 0 and found[number // every] for number in range(frames)])
    inside = faces[length:] - faces[: frames + 1 - length]
    best = np.flatnonzero(inside == inside.max()).tolist()
    start = next((first for first in best if first % every == 0 and found[first // every]), best[0])
    end = start + length
    while end - start > shortest and not found[(end - 1) // every]:
        end -= 1
    while end - start > shortest and not found[start // every]:
        start += 1
    return start, end - start


def track_box(boxes: Sequence[np.ndarray]) -> footage.Box:
    """Returns one box for the entire stretch, around the face that most frames show.

    The track starts at the largest face and follows it in both directions by overlap. The box encloses the track, with
    a margin of half a face on each side.
    """
    first = max(range(len(boxes)), key=lambda i: _area(boxes[i][0]) if len(boxes[i]) else 0.0)
    track = [boxes[first][0]]
    for direction in (boxes[first + 1 :], boxes[:first][::-1]):
        last = boxes[first][0]
        for faces in direction:
            near = max(faces, key=lambda face: overlap(face, last), default=None)  # noqa: B023
            if near is not None and overlap(near, last) > 0:
                track.append(last := near)
    top, bottom, left, right = np.array(track).T
    margin_y, margin_x = np.median(bottom - top) / 2, np.median(right - left) / 2
    box = np.array([top.min() - margin_y, bottom.max() + margin_y, left.min() - margin_x, right.max() + margin_x])
    return tuple(float(side) for side in box.clip(0, 1))


def _area(box: np.ndarray) -> float:
    return float(max(0, box[1] - box[0]) * max(0, box[3] - box[2]))


def _stretch(row: dict[str, Any], times: list[float | None], start: int, length: int) -> Iterator[av.VideoFrame]:
    """Returns the frames of a stretch, decoded from the keyframe before it if times and keyframes allow."""
    wanted = times[start]
    if start and wanted is not None and times[0] is not None:
        pictures = _frames(row, (row["start"] or 0) + wanted - times[0])
        first = next(pictures, None)
        if first is not None and first.time == wanted:
            return itertools.chain([first], itertools.islice(pictures, length - 1))
    return itertools.islice(_frames(row), start, start + length)
