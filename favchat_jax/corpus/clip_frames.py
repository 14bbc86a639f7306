"""Reads the pictures of a kept clip that are sent to an endpoint: one frame in four (paper, section 3.2), as JPEG."""

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from favchat_jax.corpus import footage
from favchat_jax.data.video import VideoError
from favchat_jax.errors import UserError

EVERY = 4
MOST = 64  # pictures; a longer clip is thinned evenly to this many
SIDE = 512  # most pixels of the longer side: the size that GPT-4o sees with `detail: low`
QUALITY = 85  # of the JPEG files
SETTINGS = [EVERY, MOST, SIDE, QUALITY]


class ClipError(UserError):
    """Raised for a kept clip that cannot be decoded."""


def pictures(path: Path) -> list[bytes]:
    """Returns the pictures as JPEG files in order of time.

    Raises:
      ClipError: the clip cannot be decoded.
    """
    frames = []
    try:
        for number, frame in enumerate(footage.frames(path)):
            if number % EVERY == 0:
                frames.append(_jpeg(frame.to_ndarray(format="bgr24")))
    except VideoError as error:
        raise ClipError(f"{error}; run clip again") from None
    if not frames:
        raise ClipError("the clip holds no frames: run clip again")
    taken = np.unique(np.linspace(0, len(frames) - 1, min(MOST, len(frames))).round().astype(int))
    return [frames[i] for i in taken]


def count(frames: int) -> int:
    """Returns the number of pictures of a clip with `frames` frames."""
    return min(MOST, -(-frames // EVERY))


def _jpeg(frame: UInt8[np.ndarray, "H W 3"]) -> bytes:
    scale = SIDE / max(frame.shape[:2])
    if scale < 1:
        frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
