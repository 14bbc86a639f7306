"""Searches the frames of a clip for faces.

Most clips show one face at close range. All looks at such a clip fit into one small picture, in which the detector
finds the face at once. Only looks in which it does not are searched at the detector's full resolution.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from favchat_jax.data.faces.detectors import Detector, Faces

LOOKS = 16  # most frames of a clip that are searched
SMALLEST_SIDE = 8  # pixels
SMALL = 48  # shorter side in pixels of a look in the picture of all looks
CLOSE = 0.25  # of the picture's shorter side: height of a face that is found in a look of SMALL pixels
GAP = 3  # looks from one close face to the next between which none is searched again; the gap is filled


class Picture(Protocol):
    """Returns an upright frame by its number, resized to a stored height and width."""

    def __call__(self, number: int, shape: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]: ...


def search(
    detector: Detector, looks: Sequence[int], picture: Picture, shape: tuple[int, int], *, thorough: bool
) -> list[Faces]:
    """Returns the faces in each look.

    Args:
        detector: finds them.
        looks: numbers of the frames that are searched, at most LOOKS.
        picture: see `Picture`.
        shape: stored height and width of the frames.
        thorough: whether to search every look at full resolution, even if it shows a face at close range.
    """
    small = fitted(shape, SMALL, 4 * SMALL)
    found, (high, wide) = _at_close_range(detector, [picture(number, small) for number in looks])
    close = [look for look, faces in enumerate(found) if faces.at_least(CLOSE, high, wide).sure.any()]
    gaps = [range(before, after) for before, after in itertools.pairwise(close) if after - before <= GAP]
    settled = set() if thorough else {*close, *itertools.chain(*gaps)}
    full = fitted(shape, detector.SIDE, detector.LONGEST)
    for look, number in enumerate(looks):
        if look not in settled:
            faces = detector(picture(number, full))
            # At full resolution, detectors miss some faces that fill the picture.
            found[look] = faces if len(faces) else found[look]
    return found


def _at_close_range(
    detector: Detector, pictures: Sequence[UInt8[np.ndarray, "H W 3"]]
) -> tuple[list[Faces], tuple[int, int]]:
    """Searches one sheet of small pictures; returns the faces of each and the pictures' shape."""
    high, wide = pictures[0].shape[:2]
    across = max(1, round((len(pictures) * high / wide) ** 0.5))
    rows = -(-len(pictures) // across)
    sheet = np.zeros((rows, high, across, wide, 3), np.uint8)
    for number, picture in enumerate(pictures):
        sheet[number // across, :, number % across] = picture
    seen = detector(sheet.reshape(rows * high, across * wide, 3))
    places = (divmod(number, across) for number in range(len(pictures)))
    inside = [seen.inside(row / rows, (row + 1) / rows, at / across, (at + 1) / across) for row, at in places]
    return inside, (high, wide)


def fitted(shape: tuple[int, int], side: int, longest: int) -> tuple[int, int]:
    """Returns the height and width of a picture whose shorter side is `side`, or less if its longer is too long."""
    scale = min(side / min(shape), longest / max(shape))
    height, width = (max(SMALLEST_SIDE, round(scale * length)) for length in shape)
    return height, width
