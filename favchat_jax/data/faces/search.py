"""Searches the frames of a clip for faces.

Most clips show one face at close range. All looks at such a clip fit into one small picture, in which the detector
finds the face at once. Looks in which it does not go into a second, larger one. Only what is left is searched at the
detector's full resolution, and of a clip without any find so far, only some looks.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from favchat_jax.data.faces.detectors import Detector, Faces

LOOKS = 16  # most frames of a clip that are searched
SMALLEST_SIDE = 8  # pixels
# Shorter side in pixels of a look in a sheet of looks, and height of a face that is found in it for certain, as a share
# of that side.
SHEETS = ((48, 0.25), (160, 0.12))
FIRST = 4  # one look in so many is searched first at full resolution; if none shows a face, the others are left out
GAP = 3  # looks from one face to the next between which none is searched again; the gap is filled


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
        thorough: whether to search every look at full resolution, even if a sheet shows a face in it.
    """
    found: dict[int, Faces] = {}
    shown: set[int] = set()  # looks that show a face for certain
    for side, least in SHEETS:
        small, rest = fitted(shape, side, 4 * side), sorted({*range(len(looks))} - _settled(shown))
        pictures = [picture(looks[look], small) for look in rest]
        for look, faces in zip(rest, _in_one_sheet(detector, pictures) if rest else [], strict=True):
            found[look] = faces if len(faces) or look not in found else found[look]
            if faces.at_least(least, *pictures[0].shape[:2]).sure.any():
                shown.add(look)
    full = fitted(shape, detector.SIDE, detector.LONGEST)
    rest = sorted({*range(len(looks))} - (set() if thorough else _settled(shown)))
    some = rest[::FIRST]
    for part in (some, [look for look in rest if look not in some]):
        for look in part:
            faces = detector(picture(looks[look], full))
            # At full resolution, detectors miss some faces that fill the picture.
            found[look] = faces if len(faces) else found[look]
        if not thorough and not any(map(len, found.values())):
            break
    return [found[look] for look in range(len(looks))]


def _settled(shown: set[int]) -> set[int]:
    """Returns looks that show a face, with the short gaps between them."""
    gaps = (range(before, after) for before, after in itertools.pairwise(sorted(shown)) if after - before <= GAP)
    return {*shown, *itertools.chain(*gaps)}


def _in_one_sheet(detector: Detector, pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> list[Faces]:
    """Searches all pictures in one sheet; returns the faces of each."""
    high, wide = pictures[0].shape[:2]
    across = max(1, round((len(pictures) * high / wide) ** 0.5))
    rows = -(-len(pictures) // across)
    sheet = np.zeros((rows, high, across, wide, 3), np.uint8)
    for number, picture in enumerate(pictures):
        sheet[number // across, :, number % across] = picture
    seen = detector(sheet.reshape(rows * high, across * wide, 3))
    places = (divmod(number, across) for number in range(len(pictures)))
    return [seen.inside(row / rows, (row + 1) / rows, at / across, (at + 1) / across) for row, at in places]


def fitted(shape: tuple[int, int], side: int, longest: int) -> tuple[int, int]:
    """Returns the height and width of a picture whose shorter side is `side`, or less if its longer is too long."""
    scale = min(side / min(shape), longest / max(shape))
    height, width = (max(SMALLEST_SIDE, round(scale * length)) for length in shape)
    return height, width
