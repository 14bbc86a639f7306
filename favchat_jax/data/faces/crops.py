"""Cuts squares around a tracked face, as FaceXFormer expects them: the detector's box, widened by half.

The square holds still while the face stays well inside it. If it followed every move, a nod would not be seen.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import ArrayLike

from favchat_jax.data.faces.tracks import Track, Tracks

WIDENED = 1.5  # side of the square in sides of the box
AWAY = 0.15  # of the box's side: how far the face gets from the square's middle before the square follows
RESIZED = 1.15  # how much larger or smaller the face gets before the square does


def squares(tracks: Tracks, track: Track, frames: Sequence[int], align: bool) -> Float[np.ndarray, "T 4"]:
    """Returns middle y and x, side and angle of the face's square in each frame, in pixels and degrees.

    A square that would leave the picture moves inside. It is never larger than the picture's shorter side. Between two
    looks it moves on a straight line.

    Args:
        frames: numbers of the frames.
        align: whether squares turn with the line between the eyes, if the detector has points.
    """
    height, width = tracks.shape
    top, bottom, left, right = track.boxes.T * [[height], [height], [width], [width]]
    box = np.maximum(np.maximum(bottom - top, right - left), 1)
    box = np.exp(_held(np.log(box), np.full(len(box), np.log(RESIZED))))
    middles = (_held((low + high) / 2, AWAY * box) for low, high in ((top, bottom), (left, right)))
    y, x, side = between(tracks, np.stack([*middles, WIDENED * box], axis=1), frames).T
    side = np.minimum(side, min(height, width))
    y = np.clip(y, side / 2, height - side / 2)
    x = np.clip(x, side / 2, width - side / 2)
    angle = np.zeros(len(side))
    if align:
        one_y, one_x, other_y, other_x = between(tracks, track.eyes.reshape(-1, 4), frames).T
        angle = np.degrees(np.arctan2((other_y - one_y) * height, (other_x - one_x) * width))
    return np.stack([y, x, side, np.nan_to_num(angle)], axis=1)


def _held(path: Float[np.ndarray, " M"], slack: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """Returns a path that follows another one, but only moves when the other is more than `slack` away."""
    low, high = path - slack, path + slack
    held = [np.clip((path.min() + path.max()) / 2, low[0], high[0])]
    for least, most in zip(low[1:], high[1:], strict=True):
        held.append(np.clip(held[-1], least, most))
    return np.array(held)


def between(tracks: Tracks, rows: Float[np.ndarray, "M K"], frames: ArrayLike) -> Float[np.ndarray, "T K"]:
    """Interpolates rows of the looks at other frames; before the first and after the last look, theirs hold."""
    return np.stack([np.interp(np.asarray(frames, float), tracks.places, column) for column in rows.T], axis=1)


def cut(
    picture: UInt8[np.ndarray, "H W 3"], square: Float[np.ndarray, " 4"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the part of an upright picture inside a square, resized to `size`.

    What a turned square shows outside of the picture repeats the picture's border.
    """
    y, x, side, angle = square.tolist()
    if angle:
        turn = cv2.getRotationMatrix2D((x - 0.5, y - 0.5), angle, size / side)
        turn[:, 2] += [size / 2 - x, size / 2 - y]
        return cv2.warpAffine(picture, turn, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    whole = max(1, round(side))
    top = max(0, min(round(y - side / 2), picture.shape[0] - whole))
    left = max(0, min(round(x - side / 2), picture.shape[1] - whole))
    part = picture[top : top + whole, left : left + whole]
    while whole >= 2 * size:  # halves, which is fast; the average of all pixels takes five times as long
        whole //= 2
        part = cv2.resize(part[: 2 * whole, : 2 * whole], (whole, whole), interpolation=cv2.INTER_AREA)
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC)
