"""Reads the properties and the frames of a video file or a folder of frames, one frame at a time."""

import contextlib
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Colorspace, VideoReformatter

from favchat_jax.corpus.manifest import FPS
from favchat_jax.data.colour import matrix_of, to_rgb
from favchat_jax.data.picture import RESIZING, display_axes, upright
from favchat_jax.data.video import SMALLEST_SIDE, VideoError, open_video, read_frames, read_packets
from favchat_jax.files import is_hidden

RATE = 25.0  # frames a second of folders of frames, and of files that state no rate
PICTURES = {".jpg", ".jpeg", ".png", ".bmp"}
NOT_VIDEOS = re.compile(r"tty|image2|.*_pipe")  # FFmpeg's formats for text and single pictures
INSTANT = 1e-4  # seconds: times of frames are rounded to ticks
QUALITY = {"preset": "veryfast", "crf": "18"}  # almost indistinguishable from the original
AVCOL_SPC_BT709 = 1  # FFmpeg's tag of BT.709's matrix
LARGEST = 16384  # pixels a side; a larger value means a damaged header, and the frame would not fit in memory

Box = tuple[float, float, float, float]  # top, bottom, left, right as shares of the picture


@dataclass(frozen=True)
class Facts:
    """Holds the properties of a video: seconds, frames per second, frames, pixels, the codec's name and bytes."""

    duration: float
    fps: float
    frames: int
    width: int
    height: int
    codec: str
    size: int
    sha256: str


def facts(path: Path) -> Facts:
    """Reads the headers and packets of a video without decoding it, or the files of a folder of frames.

    Raises:
        VideoError: the video cannot be read.
    """
    return _folder_facts(path) if path.is_dir() else _file_facts(path)


def _file_facts(path: Path) -> Facts:
    with open_video(path, _shown(path)) as (container, stream):
        if NOT_VIDEOS.fullmatch(container.format.name.partition(",")[0]):
            raise VideoError(f"{_shown(path)} holds text or a single picture: give a video file")
        times, frames = [], 0
        for packet in read_packets(container, stream):
            if packet.size and not packet.is_discard:
                frames += 1
                times += [packet.pts] if packet.pts is not None else []
        _check_size(path, frames, stream.width, stream.height)
        fps = _rate(stream)
        duration = (max(times) - min(times)) * float(stream.time_base) + 1 / fps if times else frames / fps
        return Facts(
            duration=duration,
            fps=fps,
            frames=frames,
            width=stream.width,
            height=stream.height,
            codec=stream.codec_context.name,
            size=path.stat().st_size,
            sha256=_digest([path]),
        )


def _folder_facts(folder: Path) -> Facts:
    files = frame_files(folder)
    picture = _read_picture(files[0]) if files else None
    height, width = picture.shape[:2] if picture is not None else (0, 0)
    if files and picture is None:
        raise VideoError(f"{_shown(files[0])} cannot be read as a picture: fetch the folder of frames again")
    _check_size(folder, len(files), width, height)
    return Facts(
        duration=len(files) / RATE,
        fps=RATE,
        frames=len(files),
        width=width,
        height=height,
        codec=files[0].suffix[1:].lower(),
        size=sum(file.stat().st_size for file in files),
        sha256=_digest(files),
    )


def frames(path: Path, start: float | None = None, end: float | None = None) -> Iterator[av.VideoFrame]:
    """Decodes the frames of a video or a folder of frames, upright and in order, each with its `time`.

    Args:
        start, end: seconds from the video's first frame; None stands for its beginning or end.

    Raises:
        VideoError: the video cannot be read.
    """
    if path.is_dir():
        for number, file in enumerate(frame_files(path)):
            picture = _read_picture(file)
            if picture is not None and (start or 0) <= number / RATE and (end is None or number / RATE < end):
                yield _at(av.VideoFrame.from_ndarray(picture, format="bgr24"), number, 1 / Fraction(RATE))
        return
    with open_video(path, _shown(path)) as (container, stream):
        first = stream.start_time or 0
        if start:
            container.seek(first + int(start / stream.time_base), stream=stream)
        axes = None
        for frame in read_frames(container, stream):
            if frame is None:
                continue
            axes = axes or display_axes(frame)
            if frame.pts is not None:
                moment = float((frame.pts - first) * stream.time_base)
                if end is not None and moment >= end - INSTANT:
                    return
                if start and moment < start - INSTANT:
                    continue
            yield upright(frame, axes)


def _at(frame: av.VideoFrame, pts: int | None, time_base: Fraction) -> av.VideoFrame:
    frame.pts, frame.time_base = pts, time_base
    return frame


def crop(frame: av.VideoFrame, box: Box, *, square: bool = False) -> av.VideoFrame:
    """Returns the part of a frame inside a box, or the largest square in the middle of the box."""
    top, bottom = (round(share * frame.height) for share in box[:2])
    left, right = (round(share * frame.width) for share in box[2:])
    if square:
        half = min(bottom - top, right - left) // 2
        top, left = (top + bottom) // 2 - half, (left + right) // 2 - half
        bottom, right = top + 2 * half, left + 2 * half
    rgb = to_rgb(VideoReformatter(), frame, frame.width, frame.height, RESIZING)
    picture = rgb[top : max(bottom, top + 2), left : max(right, left + 2)]
    return _at(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"), frame.pts, frame.time_base)


def encode(pictures: Iterable[av.VideoFrame], fps: float, largest_side: int) -> tuple[bytes, int]:
    """Encodes pictures as H.264 mp4 at a constant rate, in BT.709's colours; those over `largest_side` are shrunk.

    With one thread and no dates, equal frames give equal bytes.

    Returns:
        The bytes of the file and the number of frames.

    Raises:
        VideoError: the pictures are too small to be read again.
    """
    buffer, count, stream = io.BytesIO(), 0, None
    with av.open(buffer, "w", format="mp4") as container:
        for picture in pictures:
            if stream is None:
                width, height = _encoded_size(picture, largest_side)
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=QUALITY)
                stream.width, stream.height = width, height
                stream.pix_fmt = "yuv420p"
                stream.thread_count = 1
                stream.codec_context.colorspace = AVCOL_SPC_BT709
            frame = picture.reformat(
                stream.width,
                stream.height,
                "yuv420p",
                src_colorspace=matrix_of(picture),
                dst_colorspace=Colorspace.ITU709,
            )
            frame.pts, frame.pict_type = None, PictureType.NONE
            container.mux(stream.encode(frame))
            count += 1
        if stream is not None:
            container.mux(stream.encode())
    return buffer.getvalue(), count


def _encoded_size(picture: av.VideoFrame, largest_side: int) -> tuple[int, int]:
    """Returns the width and height of the clip, both even."""
    shrunk = min(1.0, largest_side / max(picture.width, picture.height))
    width, height = (2 * round(side * shrunk / 2) for side in (picture.width, picture.height))
    if min(width, height) < SMALLEST_SIDE:
        raise VideoError(f"its clip would be {width}x{height} pixels; at least {SMALLEST_SIDE} a side are needed")
    return width, height


def frame_files(folder: Path) -> list[Path]:
    """Returns the pictures of a folder, ordered by the numbers in their names."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not is_hidden(file)]
    files = [file for file in files if file.is_file()]
    return sorted(files, key=lambda file: ([int(number) for number in re.findall(r"\d+", file.stem)], file.name))


def _read_picture(file: Path) -> np.ndarray | None:
    data = np.frombuffer(file.read_bytes(), np.uint8)
    with contextlib.suppress(cv2.error):  # the header claims more pixels than OpenCV accepts
        return cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None


def _rate(stream: av.VideoStream) -> float:
    """Returns the frames a second that the file states, or RATE if that is not plausible."""
    rate = float(stream.average_rate or stream.base_rate or 0)
    return rate if FPS[0] <= rate <= FPS[1] else RATE


def _check_size(path: Path, frames: int, width: int, height: int) -> None:
    if not frames:
        raise VideoError(f"{_shown(path)} holds no video frames: fetch it again")
    if min(width, height) < SMALLEST_SIDE or max(width, height) > LARGEST:
        limits = f"{SMALLEST_SIDE} to {LARGEST} pixels a side"
        raise VideoError(f"{_shown(path)} is {width}x{height}: give a video of {limits}")


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _shown(path: Path) -> str:
    """Returns a path as one printable line, whatever characters it contains."""
    name = str(path)
    return name if name.isprintable() else ascii(name)
