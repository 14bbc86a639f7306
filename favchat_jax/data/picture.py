"""Turns decoded frames into upright RGB squares: one field, display matrix, bicubic resize, random crop, mirror image.

The transform is VideoChat2's (Ask-Anything, video_chat2/dataset/__init__.py): it squashes the full picture to a square
or, for training, takes torchvision's random resized crop. It is the same for all frames of a clip.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

from favchat_jax.data.colour import READABLE, is_hdr, to_rgb

# Full chroma resolution keeps small coloured detail. Without resizing it only takes a slower path.
RESIZING = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
EXIF = 31  # FFmpeg's AV_FRAME_DATA_EXIF
GRAPHS = 8  # graphs of filters that a thread keeps
Axes = tuple[tuple[float, float], tuple[float, float]]
UPRIGHT: Axes = (1, 0), (0, 1)
_OF_THREAD = threading.local()  # holds a VideoReformatter and graphs, so that clips of one size share their set-up


@dataclass(frozen=True)
class Augment:
    """Random resized crop, the same for all frames of a clip, and an optional mirror image.

    Attributes:
        scale: smallest and largest kept share of the picture's area (VideoChat2: 0.5 to 1).
        ratio: smallest and largest width / height of the kept part, drawn log-uniformly.
        flip: mirror half of the clips. Off by default, since it makes answers with left or right wrong.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False


class Squares:
    """Turns the decoded frames of one clip into upright RGB squares with the same crop and mirroring.

    Args:
        size: side of the squares in pixels.
        augment: random crop and mirroring, drawn from `rng` at the first frame; None keeps the full picture.

    Attributes:
        mirrored: whether the draw mirrors the clip; known after the first frame.
    """

    def __init__(self, size: int, augment: Augment | None = None, rng: np.random.Generator | None = None):
        if augment is not None and rng is None:
            raise ValueError("augmentation needs a random generator")
        self._size, self._augment, self._rng = size, augment, rng
        self._reformatter = _OF_THREAD.__dict__.setdefault("reformatter", VideoReformatter())
        self._begun, self.mirrored = False, False

    def __call__(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        if not self._begun:
            self._begin(frame)
        frame = one_field(frame)
        flags = Interpolation.BICUBIC if (frame.width, frame.height) == self._scaled else RESIZING
        picture = to_rgb(self._reformatter, frame, *self._scaled, flags)
        if self._turned:
            picture = picture.swapaxes(0, 1)
        return picture[self._rows, self._columns][:: self._down, :: self._across]

    def _begin(self, frame: av.VideoFrame) -> None:
        """Computes from the first frame the transform of all frames."""
        x_axis, y_axis = display_axes(frame)
        self._turned = abs(x_axis[1]) > abs(x_axis[0])
        if self._turned:
            x_axis, y_axis = y_axis, x_axis
        # The crop is taken before the picture is mirrored upright, which does not matter for a random crop.
        self._across, self._down = (-1 if x_axis[0] < 0 else 1), (-1 if y_axis[1] < 0 else 1)
        shape = (frame.height, frame.width) if self._turned else (frame.width, frame.height)
        left, top, width, height = 0.0, 0.0, 1.0, 1.0
        if self._augment is not None:
            assert self._rng is not None, "checked in __init__"
            left, top, width, height = _random_box(self._augment, *shape, self._rng)
            if self._augment.flip and self._rng.random() < 0.5:
                self._across, self.mirrored = -self._across, True
        # Resizing the full picture, so that the crop has `size`, keeps swscale's filter exact at the crop's borders.
        across, down = round(self._size / width), round(self._size / height)
        x, y = min(round(left * across), across - self._size), min(round(top * down), down - self._size)
        self._columns, self._rows = slice(x, x + self._size), slice(y, y + self._size)
        self._scaled = (down, across) if self._turned else (across, down)
        self._begun = True


def upright(frame: av.VideoFrame, axes: Axes) -> av.VideoFrame:
    """Returns a frame as a player shows it: of one moment, in standard dynamic range, turned and mirrored by its axes.

    A frame that is so already is returned itself. Others become RGB; `pts` and `time_base` stay.
    """
    x_axis, y_axis = axes
    shown_already = x_axis[0] > 0 and y_axis[1] > 0 and not frame.interlaced_frame and not is_hdr(frame)
    if shown_already and int(frame.colorspace) in READABLE:
        return frame
    picture = as_shown(to_rgb(VideoReformatter(), one_field(frame), frame.width, frame.height, RESIZING), axes)
    shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    shown.pts, shown.time_base = frame.pts, frame.time_base
    return shown


def as_shown(picture: UInt8[np.ndarray, "H W 3"], axes: Axes) -> UInt8[np.ndarray, "_H _W 3"]:
    """Returns a stored picture turned and mirrored by its axes."""
    x_axis, y_axis = axes
    if abs(x_axis[1]) > abs(x_axis[0]):
        picture, x_axis, y_axis = picture.swapaxes(0, 1), y_axis, x_axis
    return picture[:: -1 if y_axis[1] < 0 else 1, :: -1 if x_axis[0] < 0 else 1]


def one_field(frame: av.VideoFrame) -> av.VideoFrame:
    """Returns the upper field of an interlaced frame, which shows one moment in half of the lines; others unchanged."""
    return _filtered(frame, ("field", "type=top")) if frame.interlaced_frame else frame


def display_axes(frame: av.VideoFrame) -> Axes:
    """Returns the displayed directions of the stored picture's x and y axes: right is (1, 0), down is (0, 1)."""
    # PyAV 18 crashes on a colour profile with a name, and does not know EXIF.
    known = _filtered(frame, ("sidedata", "mode=delete:type=ICC_PROFILE"), ("sidedata", f"mode=delete:type={EXIF}"))
    try:
        data: Any = known.side_data.get("DISPLAYMATRIX")
    except ValueError:  # another kind that PyAV does not know: it still tells quarter turns
        turns = round(frame.rotation / 90) % 4
        return ((1, 0), (0, -1), (-1, 0), (0, 1))[turns], ((0, 1), (1, 0), (0, -1), (-1, 0))[turns]
    if data is None:
        return UPRIGHT
    matrix = np.frombuffer(data, np.int32).tolist()
    return (matrix[0], matrix[1]), (matrix[3], matrix[4])


def _filtered(frame: av.VideoFrame, *filters: tuple[str, str]) -> av.VideoFrame:
    """Returns a frame after FFmpeg's filters, each given by its name and options."""
    unit = frame.time_base or Fraction(1, 25)
    kind = frame.width, frame.height, frame.format.name, unit, int(frame.colorspace), int(frame.color_range), filters
    # Making a graph takes a fifth of the time of a short clip, so a thread keeps those that it made last.
    graphs: dict[tuple, Graph] = _OF_THREAD.__dict__.setdefault("graphs", {})
    graph = graphs.pop(kind, None)
    if graph is None:
        graph = Graph()
        source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=unit)
        graph.link_nodes(source, *(graph.add(*each) for each in filters), graph.add("buffersink")).configure()
    graph.push(frame)
    result = graph.pull()
    assert isinstance(result, av.VideoFrame)
    graphs[kind] = graph
    if len(graphs) > GRAPHS:
        del graphs[next(iter(graphs))]
    return result


def _random_box(
    augment: Augment, width: int, height: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draws a crop in shares of the picture like torchvision's RandomResizedCrop: area, shape, position."""
    for _ in range(10):
        area = width * height * rng.uniform(*augment.scale)
        ratio = np.exp(rng.uniform(*np.log(augment.ratio)))
        w, h = np.sqrt(area * ratio) / width, np.sqrt(area / ratio) / height
        if w <= 1 and h <= 1:
            return rng.uniform(0, 1 - w), rng.uniform(0, 1 - h), w, h
    # The picture is too long for such a crop: take its middle in the nearest allowed shape.
    ratio = np.clip(width / height, *augment.ratio)
    w, h = min(1.0, ratio * height / width), min(1.0, width / ratio / height)
    return (1 - w) / 2, (1 - h) / 2, w, h
