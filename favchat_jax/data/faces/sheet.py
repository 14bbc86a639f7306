"""Draws a contact sheet of a clip with boxes around its faces, so that one sees at a glance who was followed."""

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from favchat_jax.data.faces.crops import between
from favchat_jax.data.faces.tracks import Tracks
from favchat_jax.data.video import decode
from favchat_jax.files import replace_file

FRAMES, ACROSS, HEIGHT = 16, 4, 180  # pictures of a sheet, in a row, and pixels of a picture
LINE = 3  # pixels between two pictures
COLOURS = ((70, 200, 70), (80, 140, 255), (255, 170, 60), (200, 90, 220), (60, 200, 220))  # RGB, for one track each


def draw_sheet(path: Path, video: str | Path | bytes, tracks: Tracks, chosen: int) -> None:
    """Writes a PNG of frames from the whole clip; the chosen face (from 1) has the thickest box.

    Boxes are thin where the detector did not find the face and the track fills a gap.
    """
    height, width = tracks.shape
    clip = decode(video, frames=FRAMES, size=HEIGHT)
    wide = max(8, round(HEIGHT * width / height))
    pictures = [cv2.resize(frame, (wide, HEIGHT), interpolation=cv2.INTER_LINEAR) for frame in clip.frames]
    for number, track in enumerate(tracks.tracks, start=1):
        colour = COLOURS[(number - 1) % len(COLOURS)]
        found = between(tracks, track.found[:, None].astype(float), clip.numbers)[:, 0] > 0.5
        for picture, box, seen in zip(pictures, between(tracks, track.boxes, clip.numbers), found, strict=True):
            _draw(picture, box, str(number), colour, (3 if number == chosen else 2) if seen else 1)
    for picture in pictures:
        picture[-LINE:] = picture[:, -LINE:] = 255
    rows = [np.concatenate(pictures[i : i + ACROSS], axis=1) for i in range(0, len(pictures), ACROSS)]
    replace_file(path, cv2.imencode(".png", np.concatenate(rows)[:, :, ::-1])[1].tobytes())


def _draw(picture: UInt8[np.ndarray, "H W 3"], box: np.ndarray, label: str, colour: tuple, thickness: int) -> None:
    height, width = picture.shape[:2]
    top, bottom, left, right = (box * [height, height, width, width]).round().astype(int).tolist()
    cv2.rectangle(picture, (left, top), (right, bottom), colour, thickness)
    cv2.putText(picture, label, (left, max(14, top - 5)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
