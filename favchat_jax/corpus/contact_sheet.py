"""Draws one picture of many clips side by side, so that a selection can be judged at a glance."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
from jaxtyping import UInt8

from favchat_jax.corpus import footage
from favchat_jax.errors import UserError
from favchat_jax.files import replace_file

TILES, ACROSS, SIDE = 96, 12, 160  # most tiles, tiles in a row, pixels a tile
LINE, LETTERS = 12, 25  # pixels and letters of a line of text
FONT, INK = (cv2.FONT_HERSHEY_SIMPLEX, 0.34), (230, 230, 230)


def draw_sheet(path: Path, clips: Sequence[tuple[str, Path]]) -> None:
    """Writes a PNG with one captioned frame of each of up to 96 clips, chosen evenly from all."""
    chosen = [clips[i] for i in np.linspace(0, len(clips) - 1, min(len(clips), TILES)).astype(int)]
    tiles = [_tile(caption, video) for caption, video in chosen] or [_captioned(None, "none")]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % min(ACROSS, len(tiles)))
    across = min(ACROSS, len(tiles))
    sheet = np.concatenate([np.concatenate(tiles[i : i + across], 1) for i in range(0, len(tiles), across)])
    replace_file(path, cv2.imencode(".png", sheet)[1].tobytes())


def _tile(caption: str, video: Path) -> UInt8[np.ndarray, "H W 3"]:
    try:
        frame = next(islice(footage.frames(video), 12, None), None) or next(footage.frames(video), None)
    except (UserError, OSError):
        frame = None
    return _captioned(frame, caption)


def _captioned(frame: av.VideoFrame | None, caption: str) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the frame in a square, with up to three lines of text below."""
    tile = np.full((SIDE + 3 * LINE, SIDE, 3), 32, np.uint8)
    if frame is not None:
        scale = SIDE / max(frame.width, frame.height)
        width, height = max(2, round(frame.width * scale)), max(2, round(frame.height * scale))
        left, top = (SIDE - width) // 2, (SIDE - height) // 2
        tile[top : top + height, left : left + width] = frame.reformat(width, height, "bgr24").to_ndarray()
    text = caption.encode("ascii", "replace").decode()  # the font has only ASCII
    for line in range(3):
        part = text[line * LETTERS : (line + 1) * LETTERS]
        cv2.putText(tile, part, (2, SIDE + (line + 1) * LINE - 3), *FONT, INK, 1, cv2.LINE_AA)
    return tile
