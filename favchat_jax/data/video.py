"""Decodes T sampled frames of an encoded video on one thread. They equal those of plain decoding from start to end.

Most files state in their packet headers which frames they hold and at which keyframes decoding can begin. Then decoding
starts at the last keyframe before each wanted frame and skips frames that no other frame refers to. All other files are
decoded in order, from the first packet to the last. Sampling is VideoChat2's (`rand`, `middle`; Ask-Anything,
video_chat2/dataset/video_utils.py), and so is resizing: bicubic, squashed to a square.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from jaxtyping import Float, Int, UInt8

from favchat_jax.data.faces.looking import FaceCrop, FaceReader, with_faces
from favchat_jax.data.faces.search import LOOKS
from favchat_jax.data.faces.tracks import Tracks
from favchat_jax.data.keyframes import DamagedError, Reader, read_timeline
from favchat_jax.data.picture import Augment, Squares
from favchat_jax.errors import UserError

log = logging.getLogger("favchat_jax")

SMALLEST_SIDE = 8  # pixels; swscale's chroma filters fail below this, and such pictures show nothing
KEPT_BYTES = 16 << 20  # packets of a video up to this size stay in memory between the two passes
# Opening a file normally decodes up to 20 frames to guess how far frames are reordered. Frames that are identified by
# their times do not need the guess.
QUICK_PROBE = {"skip_frame": "all", "analyzeduration": "1"}
FULL_PROBE: dict[str, str] = {}
# PyAV 18 cannot open a file whose metadata are not UTF-8 without this; PyAV 19 can, and has no such argument.
LENIENT_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# Number of a frame, frame -> its square; None for a frame that is only searched for faces.
Picture = Callable[[int, av.VideoFrame], UInt8[np.ndarray, "H W 3"] | None]
Choose = Callable[[int], list[int]]  # number of frames -> indices of the wanted ones


class VideoError(UserError):
    """Raised if a video is missing, not a video, without frames, or too small; the message names the file."""


@dataclass(frozen=True)
class Clip:
    """Holds the sampled frames of a video.

    Attributes:
        frames: RGB; with a face crop, six channels: the whole picture, and behind it the face.
        numbers: of these frames in the video.
        seconds: time of each after the first frame of the video.
        damaged: number of packets that cannot be decoded, whose frames are left out before sampling, and of frames that
            the decoder could only patch up.
        tracks: the faces that were found; None without a face crop.
    """

    frames: UInt8[np.ndarray, "T H W C"]
    numbers: Int[np.ndarray, " T"]
    seconds: Float[np.ndarray, " T"]
    damaged: int = 0
    tracks: Tracks | None = None


def frame_indices(
    total: int, frames: int, sampling: str = "middle", rng: np.random.Generator | None = None
) -> Int[np.ndarray, " frames"]:
    """Chooses `frames` of `total` frames: one from each of `frames` equal intervals.

    `middle` takes the middle frame of each interval, `rand` a random one. A video with too few frames gives all of them
    and repeats its last one.
    """
    if total < 1 or frames < 1:
        raise ValueError(f"cannot take {frames} of {total} frames")
    taken = min(total, frames)
    edges = [int(i * (total / taken)) for i in range(taken)] + [total]  # rounded down, as in VideoChat2
    if sampling == "middle":
        indices = [(begin + end - 1) // 2 for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    elif sampling == "rand":
        if rng is None:
            raise ValueError("sampling 'rand' needs a random generator")
        indices = rng.integers(edges[:-1], edges[1:]).tolist()
    else:
        raise UserError(f"unknown frame sampling {sampling!r}: choose 'middle' or 'rand'")
    return np.array(indices + indices[-1:] * (frames - taken))


def looks(total: int, frames: int) -> list[int]:
    """Returns the frames that are searched for faces in a video of `total` frames of which `frames` are sampled."""
    return sorted(set(frame_indices(total, min(frames, LOOKS)).tolist()))


def decode(
    clip: bytes | str | Path,
    *,
    frames: int,
    size: int,
    sampling: str = "middle",
    rng: np.random.Generator | None = None,
    augment: Augment | None = None,
    name: str | None = None,
    face_crop: FaceCrop | None = None,
    tracks: Tracks | None = None,
) -> Clip:
    """Decodes `frames` sampled frames of a video, upright, RGB, `size` x `size` pixels.

    Args:
        clip: an encoded video (any container and codec FFmpeg reads) or the path of one.
        frames: T, the number of sampled frames; a shorter video repeats its last frame.
        size: side of the square output in pixels.
        sampling: `middle` (deterministic) or `rand` (needs `rng`), see `frame_indices`.
        augment: random crop and flip, drawn once from `rng`; None squashes the full picture.
        name: the video's name in error messages, by default its path.
        face_crop: how to find the face that is cut out of each frame; None leaves it out.
        tracks: the clip's faces, if they were found before.

    Raises:
        VideoError: the file is missing or not a video, has no video stream or frames, or a side is under 8 pixels.
        UserError: the detector cannot be loaded, or the clip has no face of the wanted number.
    """
    source = clip if isinstance(clip, bytes) else os.fspath(clip)
    label = name or ("the clip" if isinstance(source, bytes) else source)
    _check_file(source, label)
    squares = Squares(size, augment, rng)
    faces = FaceReader(face_crop, size, label, tracks) if face_crop else None
    sampled: set[int] = set()

    def picture(number: int, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"] | None:
        if min(frame.width, frame.height) < SMALLEST_SIDE:
            limit = f"{SMALLEST_SIDE}x{SMALLEST_SIDE}"
            raise VideoError(f"{label} is {frame.width}x{frame.height} pixels: give a video of at least {limit}")
        if faces:
            faces.see(number, frame)
        return squares(frame) if number in sampled else None

    @functools.cache  # every attempt uses one draw
    def choose(total: int) -> list[int]:
        return frame_indices(total, frames, sampling, rng).tolist()

    def wanted(total: int) -> list[int]:
        sampled.update(choose(total))
        searched = looks(total, frames) if faces and tracks is None else []
        return sorted({*sampled, *searched})

    found = _from_keyframes(source, label, wanted, picture) or _in_order(source, label, wanted, picture)
    if not found.pictures:
        raise VideoError(f"{label} holds no video frames that can be decoded: {_advice(source)}")
    if found.damaged:
        _report_damage(label, found.damaged)
    indices = choose(len(found.seconds))
    pictures, crops = [found.pictures[index] for index in indices], None
    if faces:
        tracks = faces.tracks(looks(len(found.seconds), frames))
        crops = faces.cut(tracks, pictures, indices, squares.mirrored)
    return Clip(
        frames=np.stack(pictures) if crops is None else with_faces(pictures, crops),
        numbers=np.array(indices),
        seconds=np.array([found.seconds[index] for index in indices], np.float32),
        damaged=found.damaged,
        tracks=tracks,
    )


@functools.lru_cache(maxsize=1024)  # one line a clip, however often a process reads it
def _report_damage(label: str, damaged: int) -> None:
    log.warning("%s: %d damaged or missing frames are left out or shown as far as possible", label, damaged)


@dataclass(frozen=True)
class _Found:
    """Holds the pictures of the sampled frames by index, and the seconds of all frames after the first."""

    pictures: dict[int, UInt8[np.ndarray, "H W 3"]]
    seconds: list[float]
    damaged: int = 0


def _from_keyframes(source: bytes | str, label: str, choose: Choose, picture: Picture) -> _Found | None:
    """Decodes the wanted frames from their keyframes; returns None where that may not give those of plain decoding."""
    if _container_format(source) is None:
        return None
    try:
        with _open(source, QUICK_PROBE, label) as container:
            stream = _video_stream(container, label)
            timeline = read_timeline(container, stream, KEPT_BYTES)
            if timeline is None:
                return None
            decoded = Reader(container, stream, timeline).frames(choose(len(timeline.times)))
            squares = ((index, picture(index, frame)) for index, frame in decoded)
            found = {index: square for index, square in squares if square is not None}
            missing = _beyond_end(source, stream)
    except (VideoError, DamagedError):  # plain decoding raises it again, or knows better
        return None
    return _Found(found, [(time - timeline.times[0]) * timeline.unit for time in timeline.times], missing)


def _in_order(source: bytes | str, label: str, choose: Choose, picture: Picture) -> _Found:
    """Decodes the video from its first packet to its last.

    The number of packets nearly always is the number of frames. Where it is not, the video is decoded once more.
    """
    with _open(source, FULL_PROBE, label) as container:
        stream = _video_stream(container, label)
        total = sum(packet.size > 0 and not packet.is_discard for packet in read_packets(container, stream))
    while True:
        found = _decode_all(source, label, set(choose(max(total, 1))), picture)
        if len(found.seconds) in (0, total):
            return found
        total = len(found.seconds)


def _decode_all(source: bytes | str, label: str, wanted: set[int], picture: Picture) -> _Found:
    """Decodes all frames and returns the pictures of the wanted ones."""
    pictures: dict[int, np.ndarray] = {}
    times: list[float | None] = []
    damaged = 0
    with _open(source, FULL_PROBE, label) as container:
        stream = _video_stream(container, label)
        rate = float(stream.average_rate or 25)
        for frame in read_frames(container, stream):
            if frame is None:
                damaged += 1
                continue
            if len(times) in wanted and (square := picture(len(times), frame)) is not None:
                pictures[len(times)] = square
            damaged += frame.is_corrupt
            times.append(frame.time)
        damaged += _beyond_end(source, stream)
    known = [time for time in times if time is not None]
    if len(known) < len(times) or known != sorted(known):  # no times, or times that start over
        known = [number / rate for number in range(len(times))]
    return _Found(pictures, [time - known[0] for time in known], damaged)


def _beyond_end(source: bytes | str, stream: av.VideoStream) -> int:
    """Counts the frames that an mp4 or mov lists but does not hold, since it is truncated."""
    if _container_format(source) != "mov":
        return 0
    size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
    return sum(entry.pos + entry.size > size for entry in stream.index_entries)


def read_packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yields the packets of a stream up to its end, or up to where the file is truncated."""
    reading = True
    while reading:
        reading = False
        try:
            yield from container.demux(stream)
        except IndexError:  # PyAV fails at a packet of a stream that begins later in the file; the next is read
            reading = True
        except FFmpegError:
            return


def read_frames(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame | None]:
    """Yields the frames of plain decoding, in order of showing, and None for a packet that cannot be decoded."""
    for packet in read_packets(container, stream):
        try:
            yield from packet.decode()
        except FFmpegError:  # the frames around it may still be usable
            yield None


def _check_file(source: bytes | str, label: str) -> None:
    """Raises clear errors for files that FFmpeg would only call an invalid argument."""
    size = len(source)
    if isinstance(source, str):
        try:
            status = os.stat(source)
        except (OSError, ValueError) as error:
            raise VideoError(f"{label} does not exist or cannot be accessed: give the path of a video file") from error
        if stat.S_ISDIR(status.st_mode):
            raise VideoError(f"{label} is a folder: give a video file")
        if not stat.S_ISREG(status.st_mode) or not os.access(source, os.R_OK):
            raise VideoError(f"{label} cannot be read: check its permissions")
        size = status.st_size
    if size == 0:
        raise VideoError(f"{label} is empty: give a video file")


def _container_format(source: bytes | str) -> str | None:
    """Recognises mp4 and Matroska by their first bytes: FFmpeg's own detection takes a tenth of a short clip's time."""
    head = _first_bytes(source, 8)
    if head[4:8] == b"ftyp":
        return "mov"
    return "matroska" if head[:4] == b"\x1a\x45\xdf\xa3" else None


@contextlib.contextmanager
def open_video(path: str | Path, label: str) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Opens a video file to read all of it on one thread; yields its container and its stream of pictures.

    Raises:
        VideoError: as in `decode`, also while the file is read; `label` names the video.
    """
    _check_file(os.fspath(path), label)
    with _open(os.fspath(path), FULL_PROBE, label) as container:
        yield container, _video_stream(container, label)


@contextlib.contextmanager
def _open(source: bytes | str, probe: dict[str, str], label: str) -> Iterator[InputContainer]:
    # "file:" keeps a colon in a name from being read as a protocol. The white list keeps playlists, which FFmpeg
    # recognises by content under any name, off the network.
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    options = {"protocol_whitelist": "file", **probe}
    try:
        with av.open(file, "r", format=_container_format(source), options=options, **LENIENT_METADATA) as container:
            yield container
    except (FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise VideoError(f"{label} cannot be read as a video ({reason}): give an intact video file") from error


def _video_stream(container: InputContainer, label: str) -> av.VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # a cover picture is not a video
            if stream.codec_context is None:
                raise VideoError(f"{label} uses a codec that this FFmpeg lacks: re-encode it, for example as H.264")
            stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
            if stream.codec_context.name == "mjpeg":  # it fills the missing part of a truncated JPEG with one colour
                stream.codec_context.options = {"err_detect": "explode"}
            return stream
    raise VideoError(f"{label} has no video stream (only sound, or nothing): give a video file")


def _advice(source: bytes | str) -> str:
    """Says why a file that FFmpeg opens has no frames, and what to do."""
    head = _first_bytes(source, 21)
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and head[20] & 2:
        return "FFmpeg does not read animated WebP; convert it to mp4 or GIF"
    return "it is truncated, empty or damaged; give an intact video file"


def _first_bytes(source: bytes | str, count: int) -> bytes:
    if isinstance(source, bytes):
        return source[:count]
    with open(source, "rb", buffering=0) as file:
        return file.read(count)
