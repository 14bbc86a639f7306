"""Looks for faces while a clip is decoded, and cuts the chosen one out of the sampled frames."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

from favchat_jax.config import FaceConfig
from favchat_jax.data.colour import to_rgb
from favchat_jax.data.faces.crops import cut, squares
from favchat_jax.data.faces.detectors import Detector, load_detector
from favchat_jax.data.faces.search import search
from favchat_jax.data.faces.tracks import Tracks, link, listing
from favchat_jax.data.picture import UPRIGHT, as_shown, display_axes, one_field
from favchat_jax.errors import UserError

_OF_THREAD = threading.local()  # holds detectors, since several threads cannot share one


@dataclass(frozen=True)
class FaceCrop:
    """How the facial stream's crops are found.

    Attributes:
        detector, model: see `detectors.load_detector`.
        smallest: height of the smallest face that counts, as a share of the picture's shorter side.
        align: whether crops turn with the line between the eyes.
        face: which face is cut out, from 1, the largest and longest.
        thorough: whether to find all faces of a clip, not only those at close range where there are some.
    """

    detector: str = "centerface"
    model: str = ""
    smallest: float = 0.1
    align: bool = False
    face: int = 1
    thorough: bool = False

    @classmethod
    def of(cls, config: FaceConfig, **more: Any) -> FaceCrop:
        """Returns the crop as a config describes it; `more` sets the fields that no config has."""
        return cls(config.detector, config.detector_model, config.smallest_face, config.align_faces, **more)

    def load(self) -> Detector:
        """Returns this thread's detector.

        Raises:
            UserError: see `load_detector`.
        """
        loaded = _OF_THREAD.__dict__.setdefault("detectors", {})
        key = self.detector, self.model
        if key not in loaded:
            loaded[key] = load_detector(*key)
        return loaded[key]


class FaceReader:
    """Reads the faces of one clip from its decoded frames.

    Args:
        crop: how.
        size: side of the crops in pixels.
        name: the clip's name in messages.
        known: the clip's tracks, if they are known already.
    """

    def __init__(self, crop: FaceCrop, size: int, name: str, known: Tracks | None = None):
        self._crop, self._size, self._name, self._known = crop, size, name, known
        self._frames: dict[int, av.VideoFrame] = {}
        self._axes, self._shape = UPRIGHT, (0, 0)  # of the first frame; its shape is stored height and width
        # Clips of one shape share their set-up, that of small pictures and that of whole ones.
        self._small, self._whole = _OF_THREAD.__dict__.setdefault(
            "reformatters", (VideoReformatter(), VideoReformatter())
        )

    def see(self, number: int, frame: av.VideoFrame) -> None:
        """Keeps a decoded frame."""
        if not self._frames:
            self._axes, self._shape = display_axes(frame), (frame.height, frame.width)
        self._frames[number] = one_field(frame)

    def tracks(self, looks: Sequence[int]) -> Tracks:
        """Returns the clip's tracks from looks at these frames, which `see` has seen."""
        if self._known is None:
            turned = abs(self._axes[0][1]) > abs(self._axes[0][0])
            height, width = self._shape[::-1] if turned else self._shape
            found = search(self._crop.load(), looks, self._picture, self._shape, thorough=self._crop.thorough)
            found = [faces.at_least(self._crop.smallest, height, width) for faces in found]
            self._known = link(found, looks, (height, width))
        return self._known

    def cut(
        self, tracks: Tracks, whole: Sequence[UInt8[np.ndarray, "size size 3"]], numbers: Sequence[int], mirrored: bool
    ) -> Sequence[UInt8[np.ndarray, "size size 3"]]:
        """Returns the chosen face in the frames of these numbers; the whole frames if the clip shows no face.

        Raises:
            UserError: the clip has fewer faces than the chosen one's number.
        """
        if not tracks.tracks and self._crop.face == 1:
            return whole
        if self._crop.face > len(tracks.tracks):
            advice = "choose one of these" if tracks.tracks else "leave out the number, and whole frames are read"
            raise UserError(f"face={self._crop.face}: {self._name} has {listing(tracks)}; {advice}")
        track = tracks.tracks[self._crop.face - 1]
        chosen = sorted(set(numbers))
        crops = {
            number: cut(self._picture(number, self._shape), square, self._size)
            for number, square in zip(chosen, squares(tracks, track, chosen, self._crop.align), strict=True)
        }
        return [crops[number][:, :: -1 if mirrored else 1] for number in numbers]

    def _picture(self, number: int, shape: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns an upright frame; `shape` is its height and width as stored."""
        height, width = shape
        shrunk = height < self._shape[0]
        reformatter, interpolation = (
            (self._small, Interpolation.AREA) if shrunk else (self._whole, Interpolation.BICUBIC)
        )
        return as_shown(to_rgb(reformatter, self._frames[number], width, height, interpolation), self._axes)


def with_faces(
    whole: Sequence[UInt8[np.ndarray, "H W 3"]], faces: Sequence[UInt8[np.ndarray, "H W 3"]]
) -> UInt8[np.ndarray, "T H W 6"]:
    """Stacks frames, and puts the channels of the faces behind their own."""
    both = np.empty((len(whole), *whole[0].shape[:2], 6), np.uint8)
    for pair, frame in zip(zip(whole, faces, strict=True), both, strict=True):
        cv2.merge([np.ascontiguousarray(part) for part in pair], frame)  # numpy takes five times as long
    return both
