"""The measurement of face detectors, with a detector that sees bright squares, and with CenterFace."""

import numpy as np
import pytest

from favchat_jax.data.faces.detectors import load_detector
from tests.data.face_videos import faces
from tools import detector_accuracy
from tools.detector_accuracy import darkened, measure, shrunk, turned

BOX = np.array([0.25, 0.5, 0.5, 0.75])


class Bright:
    """Finds the part of a picture that is at least this bright, if it is so high."""

    SIDE, LONGEST = 200, 800

    def __init__(self, least, height=8, wrong=False):
        self._least, self._height, self._wrong = least, height, wrong

    def __call__(self, picture):
        rows, columns = np.nonzero(picture[..., 0] >= self._least)
        found = [(0.8, 1.0, 0.0, 0.2)] if self._wrong else []
        if len(rows) and np.ptp(rows) >= self._height:
            box = (rows.min() / 200, (rows.max() + 1) / 200, columns.min() / 200, (columns.max() + 1) / 200)
            found.insert(0, box)
        return faces(found)


def square():
    picture = np.zeros((200, 200, 3), np.uint8)
    picture[50:100, 100:150] = 250
    return picture


def rows_of(detector, faceless=()):
    return {row["frames"]: row for row in measure(detector, iter([square()]), iter(faceless))}


def test_every_change_keeps_the_place_of_the_face():
    assert darkened(square(), BOX)[0].max() == round(0.15 * 250) and (darkened(square(), BOX)[1] == BOX).all()
    picture, box = turned(square(), BOX)
    assert (box == BOX).all() and picture[75, 125, 0] == 250 and picture[53, 103, 0] == 0  # a corner turned away
    picture, box = shrunk(square(), BOX)
    rows, columns = np.nonzero(picture[..., 0] == 250)
    assert np.ptp(rows) + 1 == 24 == np.ptp(columns) + 1
    assert 200 * box == pytest.approx([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1], abs=1)


def test_recall_and_precision_count_finds_at_the_face_and_elsewhere():
    rows = rows_of(Bright(200))
    assert rows["as they are"]["recall"] == rows["turned"]["recall"] == rows["shrunk"]["recall"] == 1
    assert rows["darkened"]["recall"] == 0 and rows["darkened"]["precision"] is None  # it finds nothing
    assert rows_of(Bright(200, height=30))["shrunk"]["recall"] == 0
    rows = rows_of(Bright(200, wrong=True), faceless=[np.zeros((200, 200, 3), np.uint8)] * 3)
    assert rows["turned"]["recall"] == 1 and rows["turned"]["precision"] == 0.5
    assert rows["without a face"]["wrong_finds"] == rows["without a face"]["searched"] == 3


def test_finds_too_small_to_count_are_left_out_where_no_face_is():
    tiny = np.zeros((200, 200, 3), np.uint8)
    tiny[:15, :15] = 250
    assert rows_of(Bright(200), faceless=[tiny])["without a face"]["wrong_finds"] == 0


def test_centerface_finds_rendered_faces(monkeypatch):
    monkeypatch.setattr(detector_accuracy, "RENDERED", 2)
    frames = (detector_accuracy.rendered(kind, 8) for kind in ("faces", "shapes"))
    rows = measure(load_detector("centerface"), *frames)
    assert rows[0]["searched"] == 4 and rows[0]["recall"] >= 0.5
    assert rows[-1] == rows[-1] | {"frames": "without a face", "searched": 4, "recall": None}
