"""Reads the frames that a model sees from a published clip: a video file or a folder of numbered frames."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
from jaxtyping import UInt8

from favchat_jax.data.faces.looking import FaceCrop, FaceReader, with_faces
from favchat_jax.data.picture import Squares
from favchat_jax.data.video import Clip, VideoError, decode, frame_indices, looks
from favchat_jax.files import is_hidden

PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Footage:
    """One clip.

    Attributes:
        name: its name in messages and results.
        content: an encoded video, the path of one, or a folder of frames as pictures.
        first, count: range of the folder's frames that belong to the clip; a count of None takes all from `first` on.
    """

    name: str
    content: bytes | Path
    first: int = 0
    count: int | None = None

    def identity(self) -> list[object]:
        """Identifies this clip without reading it: returns its name, size, and range of frames."""
        if isinstance(self.content, bytes):
            size = len(self.content)
        else:
            size = self.content.stat().st_size if self.content.is_file() else -1
        return [self.name, size, self.first, self.count]

    def read(self, count: int, size: int, crop: FaceCrop | None = None) -> Clip:
        """Returns the middle frames of `count` equal parts of the clip.

        Raises:
            VideoError: the clip is missing, or no frame of it can be decoded.
        """
        if isinstance(self.content, Path) and self.content.is_dir():
            return self._pictures(count, size, crop)
        return decode(self.content, frames=count, size=size, name=self.name, face_crop=crop)

    def _pictures(self, count: int, size: int, crop: FaceCrop | None) -> Clip:
        paths = pictures(self.content)[self.first :][: self.count]
        if not paths:
            raise VideoError(f"{self.name} has no pictures from index {self.first} on: copy its frames again")
        squares, taken = Squares(size), frame_indices(len(paths), count).tolist()
        searched = looks(len(paths), count) if crop else []
        read = {index: _read(paths[index]) for index in {*taken, *searched}}
        frames, numbers = [squares(read[index]) for index in taken], np.array(taken)
        seconds = numbers.astype(np.float32)
        if crop is None:
            return Clip(np.stack(frames), numbers, seconds)
        faces = FaceReader(crop, size, self.name)
        for index, frame in read.items():
            faces.see(index, frame)
        tracks = faces.tracks(searched)
        both = with_faces(frames, faces.cut(tracks, frames, taken, mirrored=False))
        return Clip(both, numbers, seconds, tracks=tracks)


def pictures(folder: Path) -> list[Path]:
    """Lists a folder's frames, ordered by the numbers in their names (0.9.jpg before 0.10.jpg)."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and not is_hidden(path)]
    return sorted(paths, key=lambda path: ([int(n) for n in re.findall(r"\d+", path.stem)], path.name))


def read_joined(clips: Sequence[Footage], frames: int, size: int, crop: FaceCrop | None = None) -> list[Clip]:
    """Reads `frames` frames in all, shared equally among the clips."""
    shares = [len(part) for part in np.array_split(np.arange(frames), len(clips))]
    if min(shares) == 0:
        raise ValueError(f"{frames} frames cannot show {len(clips)} clips")
    return [clip.read(share, size, crop) for clip, share in zip(clips, shares, strict=True)]


def joined_frames(clips: Sequence[Footage], frames: int, size: int) -> UInt8[np.ndarray, "T size size 3"]:
    """Returns the frames of `read_joined`, one clip after the other."""
    return np.concatenate([clip.frames for clip in read_joined(clips, frames, size)])


def _read(path: Path) -> av.VideoFrame:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise VideoError(f"{path} cannot be read as a picture: copy it again")
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:, :, ::-1]), format="rgb24")
