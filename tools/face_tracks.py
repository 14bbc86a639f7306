"""Draws the tracks of a video's faces: python -m tools.face_tracks --figure=tracks.png [--video=clip.mp4]

Without --video, it draws two rendered faces that move through one picture, as in docs/how-to/faces.md.
"""

from pathlib import Path

import cv2
import numpy as np
from absl import flags
from jaxtyping import UInt8

from favchat_jax import command_line
from favchat_jax.data.faces.detectors import DETECTORS
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.faces.sheet import draw_sheet
from favchat_jax.data.faces.tracks import listing
from favchat_jax.data.video import decode
from favchat_jax.embedded import face_parts
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.errors import UserError

FRAMES, HEIGHT, WIDTH = 32, 288, 512
# Of each face: number of the drawing, side in pixels, and top and left corner in the first and the last frame.
FACES = ((1, 140, (40, 20), (90, 110)), (4, 100, (120, 380), (60, 300)))


def two_faces() -> bytes:
    """Encodes a video in which two rendered faces move."""
    pictures = np.full((FRAMES, HEIGHT, WIDTH, 3), (70, 80, 95), np.uint8)
    for number, side, begin, end in FACES:
        rng = rendered_faces.generator(0, "figure", "face", number)
        classes = {label: rng.choice(rendered_faces.LABELS[label]) for label in rendered_faces.FACE_LABELS}
        look = rendered_faces.sample_look(classes, rng)
        drawn: UInt8[np.ndarray, "T H W 3"] = face_parts.draw_face(
            look, rendered_faces.sample_motion(classes, rng, FRAMES)
        )
        places = np.linspace(begin, end, FRAMES).round().astype(int)
        for picture, frame, (top, left) in zip(pictures, drawn, places, strict=True):
            small = cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA)
            picture[top : top + side, left : left + side] = small
    return rendered_faces.encode(pictures)


def main() -> None:
    """Draws the tracks of the video that the flags name."""
    if not _FIGURE.value:
        raise UserError("needed: --figure=FILE.png")
    command_line.check_output("--figure", _FIGURE.value)
    video = Path(_VIDEO.value) if _VIDEO.value else two_faces()
    crop = FaceCrop(_DETECTOR.value, _DETECTOR_MODEL.value, thorough=True)
    tracks = decode(video, frames=16, size=64, face_crop=crop).tracks
    assert tracks is not None, "asked for"
    draw_sheet(Path(_FIGURE.value), video, tracks, 1)
    print(listing(tracks))


if __name__ == "__main__":
    _FIGURE = flags.DEFINE_string("figure", None, "PNG file to write")
    _VIDEO = flags.DEFINE_string("video", None, "Video; by default two rendered faces")
    _DETECTOR = flags.DEFINE_enum("detector", "centerface", DETECTORS, "Face detector")
    _DETECTOR_MODEL = flags.DEFINE_string("detector_model", "", "The detector's ONNX file")
    command_line.start(main)
