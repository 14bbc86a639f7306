"""Links the faces of a clip's frames to tracks, one for each person, and fills the gaps in them.

A face that is found in one of several frames only is no track: detectors err now and then, but seldom twice in one
place. For the same reason a faint find counts beside a sure one of the same face (ByteTrack; Zhang et al., 2022).
Nobody is recognised: a face that is alone in the picture in two looks is taken for one person's, however far it moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from favchat_jax.data.faces.detectors import Faces

REACH = 1.0  # of a face's size: the farthest that it moves between two looks
GROWTH = 2.0  # largest ratio of a face's sizes in two looks
PATIENCE = 4  # looks without the face after which it is another face
DIGITS = 4  # of a share of the picture


@dataclass(frozen=True)
class Track:
    """One face over a clip.

    Attributes:
        boxes: top, bottom, left and right in each look, in shares of the picture; filled in where the face was not
            found.
        eyes: y and x of both eyes likewise; NaN if the detector has no points.
        found: the looks in which the detector found the face.
    """

    boxes: Float[np.ndarray, "M 4"]
    eyes: Float[np.ndarray, "M 2 2"]
    found: Bool[np.ndarray, " M"]

    @property
    def area(self) -> float:
        """The average share of the clip that the face covers, over pictures and time."""
        sides = self.boxes[:, 1] - self.boxes[:, 0], self.boxes[:, 3] - self.boxes[:, 2]
        return float(np.mean(sides[0] * sides[1] * self.found))


@dataclass(frozen=True)
class Tracks:
    """The faces of a clip, the largest and longest first.

    Attributes:
        places: numbers of the frames that were looked at.
        shape: height and width of the upright picture in pixels.
        tracks: the faces.
    """

    places: Int[np.ndarray, " M"]
    shape: tuple[int, int]
    tracks: tuple[Track, ...]


def link(found: Sequence[Faces], places: Sequence[int], shape: tuple[int, int]) -> Tracks:
    """Returns the tracks of the faces found in each look.

    Args:
        found: faces of each look.
        places: numbers of the frames that were looked at.
        shape: height and width of the upright picture in pixels.
    """
    tracks = [_track(numbers, found) for numbers in linked(found, shape)]
    tracks.sort(key=lambda track: -track.area)
    return Tracks(np.array(places), shape, tuple(tracks))


def linked(found: Sequence[Faces], shape: tuple[int, int]) -> list[dict[int, int]]:
    """Returns for each track the number of its face in each look that shows it.

    In each look, the nearest pairs of a track and a face join first. A face that is near no track begins a new one,
    unless it is the only one in the picture before and now.
    """
    begun: list[dict[int, int]] = []
    alive: list[dict[int, int]] = []
    height, width = shape
    scale = np.array([height, height, width, width]) / min(height, width)
    boxes = [faces.boxes * scale for faces in found]
    for look, seen in enumerate(boxes):
        alive = [track for track in alive if look - max(track) <= PATIENCE]
        last = [boxes[max(track)][track[max(track)]] for track in alive]
        free = set(range(len(seen)))
        for _, i, j in sorted(_near(last, seen)):
            if j in free and look not in alive[i]:
                alive[i][look] = j
                free.remove(j)
        people = [track for track in alive if _is_sure(track, found)]
        if len(people) == len(seen) == len(free) == 1 and found[look].sure[0]:  # alone, but too far away for a pair
            people[0][look] = free.pop()
        new = [{look: j} for j in sorted(free)]
        begun += new
        alive += new
    least = min(2, len(found))
    return [track for track in begun if len(track) >= least and _is_sure(track, found)]


def _is_sure(track: dict[int, int], found: Sequence[Faces]) -> bool:
    return any(found[look].sure[j] for look, j in track.items())


def _near(tracks: Sequence[Float[np.ndarray, " 4"]], faces: Float[np.ndarray, "N 4"]) -> list[tuple[float, int, int]]:
    """Returns (distance, number of the track, number of the face) of all pairs that may be one person."""
    pairs = []
    for i, track in enumerate(tracks):
        for j, face in enumerate(faces):
            sizes = [float(box[1] - box[0] + box[3] - box[2]) / 2 for box in (track, face)]
            moved = np.hypot(*(track - face).reshape(2, 2).mean(axis=1)) / max(sizes)
            if moved <= REACH and max(sizes) <= GROWTH * min(sizes):
                pairs.append((float(moved) + np.log(max(sizes) / min(sizes)), i, j))
    return pairs


def _track(numbers: dict[int, int], found: Sequence[Faces]) -> Track:
    looks = np.arange(len(found))
    seen = np.array(sorted(numbers))
    rows = np.array([np.concatenate([found[i].boxes[numbers[i]], found[i].eyes[numbers[i]].ravel()]) for i in seen])
    filled = np.stack([np.interp(looks, seen, column) for column in rows.T], axis=1)
    rows = filled.round(DIGITS)
    return Track(rows[:, :4], rows[:, 4:].reshape(-1, 2, 2), np.isin(looks, seen))


def listing(tracks: Tracks) -> str:
    """Returns a clip's faces in words, with their numbers."""
    if not tracks.tracks:
        return "no face"
    names = []
    for number, track in enumerate(tracks.tracks, start=1):
        top, bottom, left, right = track.boxes[track.found].mean(axis=0)
        side = ("left", "middle", "right")[min(2, int(3 * (left + right) / 2))]
        names.append(f"{number} ({side}, {bottom - top:.0%} of the height, in {track.found.mean():.0%} of the looks)")
    return f"{len(names)} face{'s' * (len(names) > 1)}: {', '.join(names)}"
