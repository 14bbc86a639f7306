"""Decodes T sampled frames of an encoded video on one thread, and decodes as few other frames as possible.

The first pass reads only packet headers, which give the exact time of every frame and keyframe, also at variable frame
rates. The second pass decodes from the last keyframe before each wanted frame; the decoder drops unwanted frames that
no other frame refers to. Sampling is VideoChat2's (`rand`, `middle`; Ask-Anything,
video_chat2/dataset/video_utils.py), and so is resizing: bicubic, squashed to a square.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.stream import Disposition
from jaxtyping import Float, Int, UInt8

from favchat_jax.data.picture import Augment, Squares
from favchat_jax.errors import UserError

SMALLEST_SIDE = 8  # pixels; swscale's chroma filters fail below this, and such pictures show nothing
KEPT_BYTES = 16 << 20  # packets of a video up to this size stay in memory between the two passes
NEAR = 64  # packets; in a larger video, skipping reaches a keyframe this close, and seeking a more distant one
# Opening a file normally decodes up to 20 frames to guess how far frames are reordered. Streams almost always state it,
# so the first attempt skips the guess; a stream that needs it is opened again with it.
QUICK_PROBE = {"skip_frame": "all", "analyzeduration": "1"}
FULL_PROBE: dict[str, str] = {}
# PyAV 18 cannot open a file whose metadata are not UTF-8 without this; PyAV 19 can, and has no such argument.
LENIENT_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

Picture = Callable[[av.VideoFrame], UInt8[np.ndarray, "H W 3"]]


class VideoError(UserError):
    """Raised if a video is missing, not a video, without frames, or too small; the message names the file."""


@dataclass(frozen=True)
class Clip:
    """Holds sampled RGB frames, and the time of each in seconds after the first frame of the video."""

    frames: UInt8[np.ndarray, "T H W 3"]
    seconds: Float[np.ndarray, " T"]


@dataclass(frozen=True)
class _Keyframe:
    """Holds the presentation time, the seek time and the packet's index of a keyframe, at which decoding can begin."""

    time: int
    seek: int
    position: int


@dataclass(frozen=True)
class _Timeline:
    """Holds the presentation times of all frames and all keyframes, both sorted; `unit` is one tick in seconds.

    `timed` is False for a stream without times (raw streams, some AVI): its frames are identified by counting.
    `packets` holds all packets of a stream of at most KEPT_BYTES, else None.
    """

    times: list[int]
    keys: list[_Keyframe]
    packets: list[av.Packet] | None
    unit: float
    timed: bool


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


def decode(
    clip: bytes | str | Path,
    *,
    frames: int,
    size: int,
    sampling: str = "middle",
    rng: np.random.Generator | None = None,
    augment: Augment | None = None,
    name: str | None = None,
) -> Clip:
    """Decodes `frames` sampled frames of a video, upright, RGB, `size` x `size` pixels.

    Args:
        clip: an encoded video (any container and codec FFmpeg reads) or the path of one.
        frames: T, the number of sampled frames; a shorter video repeats its last frame.
        size: side of the square output in pixels.
        sampling: `middle` (deterministic) or `rand` (needs `rng`), see `frame_indices`.
        augment: random crop and flip, drawn once from `rng`; None squashes the full picture.
        name: the video's name in error messages, by default its path.

    Raises:
        VideoError: the file is missing or not a video, has no video stream or frames, or a side is under 8 pixels.
    """
    source = clip if isinstance(clip, bytes) else os.fspath(clip)
    label = name or ("the clip" if isinstance(source, bytes) else source)
    _check_file(source, label)
    squares = Squares(size, augment, rng)

    def picture(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        if min(frame.width, frame.height) < SMALLEST_SIDE:
            limit = f"{SMALLEST_SIDE}x{SMALLEST_SIDE}"
            raise VideoError(f"{label} is {frame.width}x{frame.height} pixels: give a video of at least {limit}")
        return squares(frame)

    choose = functools.cache(lambda total: frame_indices(total, frames, sampling, rng))  # both attempts use one draw
    for probe in (QUICK_PROBE, FULL_PROBE):
        try:
            timeline, found = _sample(source, probe, label, choose, picture)
        except VideoError:
            if probe is FULL_PROBE:
                raise
            continue
        indices = choose(len(timeline.times)).tolist()
        if found.keys() == set(indices):
            break
    if not found:
        raise VideoError(f"no frame of {label} can be decoded, so the file is damaged: give an intact video file")
    times = np.array([timeline.times[index] - timeline.times[0] for index in indices])
    return Clip(
        frames=np.stack([_nearest(found, index) for index in indices]),
        seconds=(times * timeline.unit).astype(np.float32),
    )


def _sample(
    source: bytes | str, probe: dict[str, str], label: str, choose: Callable[[int], np.ndarray], picture: Picture
) -> tuple[_Timeline, dict[int, UInt8[np.ndarray, "H W 3"]]]:
    """Returns the times of all frames, and index -> picture of the chosen frames that can be decoded."""
    with _open(source, probe, label) as container:
        stream = _video_stream(container, label)
        timeline = _read_timeline(container, stream)
        if not timeline.times:
            raise VideoError(f"{label} holds no video frames, so it is truncated or empty: give an intact video file")
        indices = choose(len(timeline.times)).tolist()
        if timeline.timed:
            return timeline, _read_frames(container, stream, timeline, indices, picture)
    with _open(source, probe, label) as container:  # reopened, since untimed streams often cannot seek to their start
        return timeline, _count_frames(container, _video_stream(container, label), set(indices), picture)


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
    """Recognises mp4 by its first bytes: FFmpeg's own detection takes a tenth of a short clip's time."""
    if isinstance(source, str):
        with open(source, "rb", buffering=0) as file:
            source = file.read(8)
    return "mov" if source[4:8] == b"ftyp" else None


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
            return stream
    raise VideoError(f"{label} has no video stream (only sound, or nothing): give a video file")


def _read_timeline(container: InputContainer, stream: av.VideoStream) -> _Timeline:
    """Reads all packets of the stream without decoding."""
    times: list[int | None] = []
    keys: list[_Keyframe] = []
    packets: list[av.Packet] = []
    position = size = 0
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            size += packet.size
            if size <= KEPT_BYTES:
                packets.append(packet)
            if not packet.is_discard:
                time = packet.pts
                times.append(time)
                if packet.is_keyframe and time is not None:
                    keys.append(_Keyframe(time, time if packet.dts is None else min(time, packet.dts), position))
            position += 1
    except InvalidDataError:
        pass  # a truncated file: its first part is still usable
    known = [time for time in times if time is not None]
    timed = bool(keys) and len(known) == len(times)
    unit = stream.time_base if timed else None
    return _Timeline(
        times=sorted(known) if timed else list(range(len(times))),
        keys=sorted(keys, key=lambda key: key.time),
        packets=packets if size <= KEPT_BYTES else None,
        unit=float(unit or 1 / (stream.average_rate or 25)),
        timed=timed,
    )


def _read_frames(
    container: InputContainer,
    stream: av.VideoStream,
    timeline: _Timeline,
    indices: list[int],
    picture: Picture,
) -> dict[int, UInt8[np.ndarray, "H W 3"]]:
    """Decodes the frames of `indices`, run by run from their keyframes. Frames that cannot be decoded are missing."""
    found: dict[int, np.ndarray] = {}
    runs: dict[int, dict[int, int]] = {}  # keyframe -> {time: index} of the wanted frames that follow it
    key_times = [key.time for key in timeline.keys]
    for index in indices:
        time = timeline.times[index]
        runs.setdefault(max(bisect_right(key_times, time) - 1, 0), {})[time] = index
    reader = _Reader(container, stream, timeline.packets)
    for key, wanted in runs.items():
        for time, frame in reader.decode_run(timeline.keys[key], set(wanted)):
            found[wanted[time]] = picture(frame)
    return found


def _count_frames(
    container: InputContainer, stream: av.VideoStream, wanted: set[int], picture: Picture
) -> dict[int, UInt8[np.ndarray, "H W 3"]]:
    """Decodes from the start up to the last wanted frame: the only way if packets have no times."""
    found: dict[int, np.ndarray] = {}
    decoded = (frame for packet in container.demux(stream) for frame in _decode_packet(packet))
    for index, frame in zip(range(max(wanted) + 1), decoded, strict=False):
        if index in wanted:
            found[index] = picture(frame)
    return found


def _decode_packet(packet: av.Packet) -> list[av.VideoFrame]:
    try:
        return packet.decode()
    except InvalidDataError:  # a damaged part: the frames around it may still be usable
        return []


class _Reader:
    """Decodes runs of a stream that start at keyframes.

    It finds a keyframe in the list of kept packets, or else skips packets or seeks, whichever is cheaper.
    """

    def __init__(self, container: InputContainer, stream: av.VideoStream, packets: list[av.Packet] | None):
        self._container, self._stream, self._kept = container, stream, packets
        self._packets: Iterator[av.Packet] = iter(())
        self._position: int | None = None  # index of the next packet in the stream; None before the first seek

    def decode_run(self, key: _Keyframe, wanted: set[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields the wanted times and their frames; decodes from `key` to the last of their packets."""
        packet = self._go_to(key)
        context = self._stream.codec_context
        context.flush_buffers()
        unfed: set[int | None] = set(wanted)
        while packet is not None and packet.size:
            # The decoder skips unwanted frames that no other frame refers to.
            context.skip_frame = "DEFAULT" if packet.pts in unfed else "NONREF"
            unfed.discard(packet.pts)
            for frame in _decode_packet(packet):
                if frame.pts in wanted:
                    yield frame.pts, frame
            packet = self._next() if unfed else None
        # Draining returns the frames that the decoder holds back for reordering.
        with contextlib.suppress(InvalidDataError):
            yield from ((frame.pts, frame) for frame in context.decode(None) if frame.pts in wanted)

    def _go_to(self, key: _Keyframe) -> av.Packet | None:
        """Returns the packet of a keyframe, or None if the stream does not contain it."""
        if self._kept is not None:
            self._packets = iter(self._kept[key.position :])
            return next(self._packets)
        if self._position is None or not 0 <= key.position - self._position <= NEAR:
            self._seek(key.seek)
        packet = self._skip_to(key)
        if packet is None:  # the container's index is wrong: search for the keyframe from the start
            self._seek(0)
            packet = self._skip_to(key)
        if packet is not None:
            self._position = key.position + 1
        return packet

    def _seek(self, time: int) -> None:
        self._container.seek(time, stream=self._stream)
        self._packets = iter(self._container.demux(self._stream))

    def _skip_to(self, key: _Keyframe) -> av.Packet | None:
        while (packet := self._next()) is not None and packet.size:
            if packet.is_keyframe and packet.pts == key.time:
                return packet
            if packet.is_keyframe and packet.pts is not None and packet.pts > key.time:
                return None
        return None

    def _next(self) -> av.Packet | None:
        try:
            packet = next(self._packets, None)
        except InvalidDataError:
            return None
        if self._position is not None:
            self._position += 1
        return packet


def _nearest(found: dict[int, np.ndarray], index: int) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the frame, or if it could not be decoded the last frame before it, or the first after it."""
    if index in found:
        return found[index]
    before = [other for other in found if other < index]
    return found[max(before) if before else min(found)]
