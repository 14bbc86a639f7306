"""Detectors and videos for the tests of faces."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from favchat_jax.data.faces.detectors import Faces
from favchat_jax.embedded import face_parts
from favchat_jax.embedded import faces as rendered_faces
from tests.data.video_files import encode_video

Box = tuple[float, float, float, float]


class Stub:
    """A detector that knows where the faces are; it sees none in the sheet of small pictures.

    Args:
        detect: picture -> boxes (top, bottom, left, right in shares of the picture), the largest first.
    """

    SIDE, LONGEST = 360, 1440

    def __init__(self, detect: Callable[[np.ndarray], Sequence[Box]]):
        self._detect = detect

    def __call__(self, picture: np.ndarray) -> Faces:
        full = min(picture.shape[:2]) == self.SIDE
        return faces(self._detect(picture) if full else [])


def faces(boxes: Sequence[Box], sure: bool = True) -> Faces:
    """Returns finds without points."""
    array = np.array(boxes, float).reshape(-1, 4)
    return Faces(array, np.full((len(array), 2, 2), np.nan), np.full(len(array), sure))


def rendered(count, index=1):
    """Returns frames of a rendered face [count, 128, 128, 3]."""
    rng = rendered_faces.generator(0, "corpus", "face", index)
    classes = {label: rendered_faces.LABELS[label][0] for label in rendered_faces.FACE_LABELS}
    look, motion = rendered_faces.sample_look(classes, rng), rendered_faces.sample_motion(classes, rng, count)
    return face_parts.draw_face(look, motion)


def video(frames, **options):
    """Encodes frames, almost without loss."""
    height, width = frames[0].shape[:2]
    return encode_video(
        len(frames), width=width, height=height, options={"crf": "4"}, picture=lambda i, w, h: frames[i], **options
    )


def beside(one, other, width=480, height=270):
    """Returns pictures with two clips in one, each half as high as the picture."""
    pictures = []
    for left, right in zip(one, other, strict=True):
        picture = np.full((height, width, 3), 90, np.uint8)
        for frame, x in ((left, width // 8), (right, width * 5 // 8)):
            picture[70 : 70 + height // 2, x : x + height // 2] = cv2.resize(frame, (height // 2,) * 2)
        pictures.append(picture)
    return pictures
