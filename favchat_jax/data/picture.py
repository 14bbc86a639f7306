"""Turns decoded frames into upright RGB squares: display matrix, bicubic resize, random crop and mirror image.

The transform is VideoChat2's (Ask-Anything, video_chat2/dataset/__init__.py): it squashes the full picture to a square
or, for training, takes torchvision's random resized crop. It is the same for all frames of a clip.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

# Full chroma resolution keeps small coloured detail. Without resizing it only takes a slower path.
RESIZING = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
_OF_THREAD = threading.local()  # holds a VideoReformatter, so that clips of one size share swscale's set-up


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
    """

    def __init__(self, size: int, augment: Augment | None = None, rng: np.random.Generator | None = None):
        if augment is not None and rng is None:
            raise ValueError("augmentation needs a random generator")
        self._size, self._augment, self._rng = size, augment, rng
        self._reformatter = _OF_THREAD.__dict__.setdefault("reformatter", VideoReformatter())
        self._begun = False

    def __call__(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        if not self._begun:
            self._begin(frame)
        width, height = self._scaled
        flags = Interpolation.BICUBIC if (frame.width, frame.height) == self._scaled else RESIZING
        picture = self._reformatter.reformat(frame, width, height, "rgb24", interpolation=flags, threads=1).to_ndarray()
        if self._turned:
            picture = picture.swapaxes(0, 1)
        return picture[self._rows, self._columns][:: self._down, :: self._across]

    def _begin(self, frame: av.VideoFrame) -> None:
        """Computes from the first frame the transform of all frames."""
        x_axis, y_axis = _display_axes(frame)
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
                self._across = -self._across
        # Resizing the full picture, so that the crop has `size`, keeps swscale's filter exact at the crop's borders.
        across, down = round(self._size / width), round(self._size / height)
        x, y = min(round(left * across), across - self._size), min(round(top * down), down - self._size)
        self._columns, self._rows = slice(x, x + self._size), slice(y, y + self._size)
        self._scaled = (down, across) if self._turned else (across, down)
        self._begun = True


def _display_axes(frame: av.VideoFrame) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the displayed directions of the stored picture's x and y axes: right is (1, 0), down is (0, 1)."""
    stored: Mapping[str, Any] = frame.side_data
    data = stored.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0), (0, 1)
    matrix = np.frombuffer(data, np.int32).tolist()
    return (matrix[0], matrix[1]), (matrix[3], matrix[4])


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
