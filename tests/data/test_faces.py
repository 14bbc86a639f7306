"""Faces in clips: search, tracks, and the squares around a face."""

import dataclasses

import cv2
import numpy as np
import pytest

from favchat_jax.data.faces import looking
from favchat_jax.data.faces.crops import cut, squares
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.faces.search import search
from favchat_jax.data.faces.sheet import draw_sheet
from favchat_jax.data.faces.tracks import Track, Tracks, link, listing
from favchat_jax.data.picture import Augment
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError
from tests.data.face_videos import Stub, faces, rendered, video

SQUARE = (0.3, 0.7, 0.3, 0.7)


def moving(looks, start, step, size=0.2):
    """Returns the box of a face in each look."""
    return [(y, y + size, x, x + size) for y, x in (np.add(start, np.multiply(i, step)) for i in range(looks))]


@pytest.fixture
def stub(monkeypatch):
    """Installs a detector that computes boxes from a picture."""

    def install(detect):
        monkeypatch.setattr(looking, "load_detector", lambda *arguments: Stub(detect))
        looking._OF_THREAD.__dict__.pop("detectors", None)

    yield install
    looking._OF_THREAD.__dict__.pop("detectors", None)


def bright(picture):
    """Returns the box of what is brighter than grey."""
    rows, columns = np.nonzero(picture.min(axis=-1) > 170)
    if not len(rows):
        return []
    height, width = picture.shape[:2]
    return [(rows.min() / height, (rows.max() + 1) / height, columns.min() / width, (columns.max() + 1) / width)]


def spot(number, width, height, side=40):
    """Returns a dark picture with a white square that moves right by 4 pixels a frame."""
    picture = np.full((height, width, 3), 30, np.uint8)
    picture[30 : 30 + side, 20 + 4 * number : 20 + side + 4 * number] = 250
    picture[34:40, 24 + 4 * number : 40 + 4 * number] = (250, 180, 180)  # tells up from down
    return picture


def test_two_faces_side_by_side_are_two_tracks_that_do_not_swap():
    left, right = moving(12, (0.3, 0.15), (0.01, 0.01)), moving(12, (0.4, 0.6), (-0.01, -0.005))
    order = np.random.default_rng(0).random(12) < 0.5
    found = [faces([a, b] if first else [b, a]) for a, b, first in zip(left, right, order, strict=True)]
    tracks = link(found, range(12), (100, 100)).tracks
    assert len(tracks) == 2 and all(track.found.all() for track in tracks)
    for track, boxes in zip(sorted(tracks, key=lambda t: t.boxes[0, 2]), (left, right), strict=True):
        assert np.abs(track.boxes - boxes).max() < 1e-3


def test_gaps_are_filled_along_the_way_and_a_long_absence_begins_another_track():
    boxes = moving(16, (0.2, 0.2), (0.02, 0.02))
    gap = [faces([] if look in (5, 6, 7) else [box]) for look, box in enumerate(boxes)]
    (track,) = link(gap, range(16), (100, 100)).tracks
    assert np.abs(track.boxes - boxes).max() < 1e-3 and track.found.sum() == 13
    longer = [faces([] if 4 <= look < 9 else [box]) for look, box in enumerate(boxes)]
    assert len(link(longer, range(16), (100, 100)).tracks) == 2


def test_the_only_face_in_the_picture_stays_one_track_however_far_it_moves():
    places = [(0.1, 0.3, 0.1, 0.3), (0.6, 0.8, 0.7, 0.9), (0.1, 0.3, 0.5, 0.7)] * 4
    (track,) = link([faces([box]) for box in places], range(12), (100, 100)).tracks
    assert track.found.all() and np.abs(track.boxes - places).max() < 1e-3
    far = (0.8, 1.0, 0.0, 0.2)
    faint = [faces([far], sure=False) if number == 5 else faces([box]) for number, box in enumerate(places)]
    (track,) = link(faint, range(12), (100, 100)).tracks  # a faint find elsewhere may be an error
    assert np.flatnonzero(~track.found).tolist() == [5]
    other = (0.7, 0.9, 0.1, 0.3)  # with another person in the picture, a face that jumps may be a third one
    assert len(link([faces([box, other]) for box in places], range(12), (100, 100)).tracks) > 2


def test_a_find_in_one_look_only_is_no_track_unless_there_is_one_look():
    found = [faces([SQUARE] if look == 3 else []) for look in range(8)]
    assert link(found, range(8), (100, 100)).tracks == ()
    assert len(link(found[3:4], [0], (100, 100)).tracks) == 1


def test_faint_finds_count_beside_a_sure_one_only():
    faint = [faces([SQUARE], sure=False) for _ in range(6)]
    assert link(faint, range(6), (100, 100)).tracks == ()
    (track,) = link([faces([SQUARE]), *faint[1:]], range(6), (100, 100)).tracks
    assert track.found.all()


def test_the_largest_and_longest_face_comes_first():
    large_but_short, long, small = (0.0, 0.5, 0.0, 0.5), (0.5, 0.9, 0.5, 0.9), (0.0, 0.1, 0.8, 0.9)
    found = [faces([large_but_short, long, small] if look < 2 else [long, small]) for look in range(10)]
    tracks = link(found, range(10), (100, 100)).tracks
    assert [track.boxes[0, 0] for track in tracks] == [0.5, 0.0, 0.0] and tracks[2].boxes[0, 1] == 0.1


def test_a_crowd_of_30_faces_is_30_tracks():
    places = [
        (0.16 * row, 0.16 * row + 0.08, 0.19 * column, 0.19 * column + 0.08) for row in range(6) for column in range(5)
    ]
    drift = np.random.default_rng(0).normal(scale=0.01, size=(10, 30, 4))
    found = [faces((np.array(places) + moved).clip(0, 1).tolist()) for moved in drift]
    tracks = link(found, range(10), (300, 400))
    assert len(tracks.tracks) == 30 and all(track.found.all() for track in tracks.tracks)
    assert listing(tracks).startswith("30 faces: 1 (")


def tracks_of(boxes, shape, eyes=None):
    """Returns the tracks of one face."""
    points = np.full((len(boxes), 2, 2), np.nan) if eyes is None else np.array(eyes)
    return Tracks(np.arange(len(boxes)), shape, (Track(np.array(boxes, float), points, np.ones(len(boxes), bool)),))


@pytest.mark.parametrize(
    "box, shape, expected",
    [
        ((0.4, 0.6, 0.4, 0.6), (100, 200), (50, 100, 60, 0)),  # 20 x 40 pixels, widened by half
        ((0.0, 0.2, 0.0, 0.1), (100, 200), (15, 15, 30, 0)),  # at a corner: moved inside
        ((0.05, 0.95, 0.0, 0.3), (200, 400), (100, 100, 200, 0)),  # larger than the picture allows
        ((0.0, 1.0, 0.0, 1.0), (80, 60), (40, 30, 60, 0)),  # fills the picture
    ],
)
def test_the_square_is_the_widened_box_inside_the_picture(box, shape, expected):
    tracks = tracks_of([box], shape)
    assert squares(tracks, tracks.tracks[0], [0], False)[0] == pytest.approx(expected)


def test_between_two_looks_the_square_moves_on_a_straight_line():
    tracks = dataclasses.replace(
        tracks_of([(0.2, 0.4, 0.2, 0.4), (0.4, 0.6, 0.6, 0.8)], (100, 100)), places=np.array([10, 20])
    )
    y, x, side, _ = squares(tracks, tracks.tracks[0], [0, 10, 15, 20, 99], False).T
    assert y == pytest.approx([33, 33, 40, 47, 47]) and x == pytest.approx([33, 33, 50, 67, 67])  # 3 px: 0.15 of 20
    assert np.ptp(side) < 1e-9


def test_the_square_holds_still_while_a_head_nods_and_its_size_does_not_shake():
    nods = [(0.4 + dy, 0.6 + dy + grown, 0.4, 0.6) for dy, grown in ((0, 0), (0.02, 0.02), (-0.02, 0), (0.03, 0.03))]
    tracks = tracks_of(nods, (200, 300))
    assert np.ptp(squares(tracks, tracks.tracks[0], range(len(nods)), False), axis=0).max() < 1e-9


def test_the_face_never_leaves_its_square():
    rng = np.random.default_rng(0)
    steps, sizes = rng.normal(0, 0.1, (200, 2)).cumsum(axis=0), 0.3 * np.exp(rng.normal(0, 0.1, 200).cumsum())
    low = 50 + steps - sizes[:, None] / 2
    boxes = np.stack([low[:, 0], low[:, 0] + sizes, low[:, 1], low[:, 1] + sizes], axis=1) / 100
    tracks = tracks_of([tuple(box) for box in boxes], (10000, 10000))
    y, x, side, _ = squares(tracks, tracks.tracks[0], range(200), False).T
    top, bottom, left, right = 10000 * boxes.T
    assert (y - side / 2 <= top).all() and (bottom <= y + side / 2).all()
    assert (x - side / 2 <= left).all() and (right <= x + side / 2).all()
    assert (np.abs(np.log(side / (1.5 * (bottom - top)))) <= np.log(1.15) + 1e-9).all()


def test_an_aligned_crop_puts_the_eyes_on_one_level():
    eyes = [[[0.4, 0.4], [0.5, 0.6]]]  # the right one lower
    tracks = tracks_of([SQUARE], (200, 200), eyes)
    picture = np.zeros((200, 200, 3), np.uint8)
    for y, x in eyes[0]:
        cv2.circle(picture, (round(200 * x), round(200 * y)), 4, (255, 255, 255), -1)
    turned = cut(picture, squares(tracks, tracks.tracks[0], [0], True)[0], 120)
    halves = [turned[:, :60, 0].astype(float), turned[:, 60:, 0].astype(float)]
    rows = [(half.sum(axis=1) @ np.arange(120)) / half.sum() for half in halves]
    assert abs(rows[0] - rows[1]) < 1
    plain = cut(picture, squares(tracks, tracks.tracks[0], [0], False)[0], 120)
    assert (plain == cut(picture, np.array([100, 100, 120, 0.0]), 120)).all()


def test_the_crop_follows_the_face_and_the_general_stream_keeps_the_whole_frame(stub):
    stub(bright)
    clip = video([spot(i, 240, 160) for i in range(24)])
    cropped = decode(clip, frames=6, size=60, face_crop=FaceCrop())
    assert cropped.frames.shape == (6, 60, 60, 6)
    assert (cropped.frames[..., :3] == decode(clip, frames=6, size=60).frames).all()
    for face in cropped.frames[..., 3:]:  # 40 of 60 pixels; in the middle, but for how far the square may lag behind
        top, bottom, left, right = bright(face)[0]
        assert (top, bottom, right - left) == pytest.approx((1 / 6, 5 / 6, 2 / 3), abs=0.05)
        assert left == pytest.approx(1 / 6, abs=0.1 + 0.02)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_video_gives_the_crops_of_the_upright_one(stub, degrees):
    stub(bright)
    frames = [spot(i, 240, 160) for i in range(24)]
    stored = [np.ascontiguousarray(np.rot90(frame, -degrees // 90)) for frame in frames]
    upright = decode(video(frames), frames=6, size=60, face_crop=FaceCrop())
    turned = decode(video(stored, rotation=degrees), frames=6, size=60, face_crop=FaceCrop())
    assert turned.tracks.shape == (160, 240)
    assert np.abs(turned.frames[..., 3:].astype(int) - upright.frames[..., 3:]).mean() < 2


def test_a_mirrored_draw_mirrors_the_crop_and_a_random_crop_leaves_it(stub):
    stub(lambda picture: [(0.2, 0.8, 0.1, 0.5)])
    clip = video(list(rendered(12)))
    plain = decode(clip, frames=4, size=60, face_crop=FaceCrop()).frames[..., 3:]
    seen = set()
    for seed in range(8):
        augment = Augment(scale=(0.5, 0.6), flip=True)
        rng = np.random.default_rng(seed)
        drawn = decode(clip, frames=4, size=60, augment=augment, rng=rng, face_crop=FaceCrop()).frames[..., 3:]
        mirrored = not (drawn == plain).all()
        assert (drawn == (plain[:, :, ::-1] if mirrored else plain)).all()
        seen.add(mirrored)
    assert seen == {True, False}


def test_tracks_do_not_depend_on_the_sampled_frames(stub):
    stub(bright)
    clip = video([spot(i, 240, 160) for i in range(24)])
    middle = decode(clip, frames=6, size=32, face_crop=FaceCrop())
    for seed in range(3):
        rng = np.random.default_rng(seed)
        drawn = decode(clip, frames=6, size=32, sampling="rand", rng=rng, face_crop=FaceCrop())
        known = decode(
            clip,
            frames=6,
            size=32,
            sampling="rand",
            rng=np.random.default_rng(seed),
            face_crop=FaceCrop(),
            tracks=middle.tracks,
        )
        assert (drawn.tracks.tracks[0].boxes == middle.tracks.tracks[0].boxes).all()
        assert (drawn.frames == known.frames).all()


def test_a_clip_without_a_face_is_seen_as_a_whole(stub):
    stub(lambda picture: [])
    frames = decode(video(list(rendered(12))), frames=4, size=60, face_crop=FaceCrop()).frames
    assert (frames[..., 3:] == frames[..., :3]).all()


def test_a_face_that_the_clip_lacks_is_refused_with_the_list(stub):
    stub(lambda picture: [(0.1, 0.6, 0.6, 0.9), (0.5, 0.8, 0.1, 0.3)])
    clip = video(list(rendered(12)))
    second = decode(clip, frames=4, size=60, face_crop=FaceCrop(face=2)).frames[..., 3:]
    first = decode(clip, frames=4, size=60, face_crop=FaceCrop()).frames[..., 3:]
    assert (first != second).any()
    with pytest.raises(UserError, match=r"face=3: clip a has 2 faces: 1 \(right, 50% .*2 \(left, 30% .*choose"):
        decode(clip, frames=4, size=60, face_crop=FaceCrop(face=3), name="clip a")


class InSheets:
    """Finds faces in those looks of the first and of the second sheet that are marked 1, faint ones where marked ?."""

    SIDE, LONGEST = 360, 1440

    def __init__(self, first, second):
        self._marks, self.searched = {48: first, 160: second}, []

    def __call__(self, picture):
        if picture.shape[0] == self.SIDE:
            self.searched.append(int(picture[0, 0, 0]))
            return faces([])
        below = np.flatnonzero(picture[1:, 0, 0] != picture[:-1, 0, 0])  # where another look begins
        side = int(below[0]) + 1 if len(below) else picture.shape[0]
        high, wide = (length // side for length in picture.shape[:2])
        looks = picture[::side, ::side, 0].ravel()[: np.count_nonzero(picture[::side, ::side, 1])]
        marks = np.array([self._marks[side][look] for look in looks])
        boxes = [(row / high, (row + 0.9) / high, at / wide, (at + 0.9) / wide) for row, at in cells(len(looks), wide)]
        return dataclasses.replace(faces(boxes), sure=marks == "1")[marks != "0"]


def cells(count, wide):
    return [divmod(number, wide) for number in range(count)]


@pytest.mark.parametrize(
    "first, second, thorough, expected",
    [
        ("1111111111111111", "", False, ""),
        ("1111111111111111", "", True, "0123456789abcdef"),
        ("1001001001001001", "", False, ""),  # short gaps are filled
        ("1000111111111111", "0" * 16, False, "123"),
        ("0111111111111110", "0" * 16, False, "0f"),  # the ends are no gaps
        ("11111111?1111111", "", False, ""),
        ("????????????????", "?" * 16, False, "0123456789abcdef"),  # faint finds alone may be errors
        ("0000000000000000", "0" * 16, False, "048c"),  # most likely, nobody is there
        ("0000000000000000", "0" * 16, True, "0123456789abcdef"),
        ("0000000000000000", "1" * 16, False, ""),
        ("1110000000000000", "0000010010010000", False, "cdef"),
    ],
)
def test_only_looks_that_show_no_face_are_searched_again(first, second, thorough, expected):
    def picture(number, shape):
        return np.full((*shape, 3), (number, 255, number), np.uint8)

    detector = InSheets(first, second)
    found = search(detector, range(16), picture, (100, 100), thorough=thorough)
    assert sorted(detector.searched) == [int(look, 16) for look in expected]
    last = [a if b == "0" else b for a, b in zip(first, second or first, strict=True)]
    assert all(len(faces) == 1 for faces, mark in zip(found, last, strict=True) if mark != "0")


def test_the_smallest_face_that_counts_is_a_share_of_the_shorter_side(stub):
    stub(lambda picture: [(0.1, 0.19, 0.6, 0.9)])
    clip = video(list(rendered(12)))
    assert not decode(clip, frames=4, size=60, face_crop=FaceCrop()).tracks.tracks
    assert decode(clip, frames=4, size=60, face_crop=FaceCrop(smallest=0.05)).tracks.tracks


def test_the_boxes_of_a_short_clip_are_on_its_faces(tmp_path, stub):
    """A sheet of 16 pictures repeats the last frame of a clip of four."""
    stub(bright)
    clip = video([spot(8 * i, 240, 160) for i in range(4)])
    draw_sheet(tmp_path / "sheet.png", clip, decode(clip, frames=4, size=32, face_crop=FaceCrop()).tracks, 1)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    rows, columns = sheet.shape[0] // 4, sheet.shape[1] // 4
    for number in range(16):
        picture = sheet[rows * (number // 4) :, columns * (number % 4) :][: rows - 4, : columns - 4].astype(int)
        face = bright(picture[..., ::-1])[0]
        green = (picture[..., 1] - picture[..., 2] > 60) & (picture[..., 1] - picture[..., 0] > 60)
        box = [np.flatnonzero(green.any(axis=axis)) for axis in (1, 0)]
        shown = (box[0][-1] / picture.shape[0], box[1][-1] / picture.shape[1])  # lower right corner
        assert shown == pytest.approx((face[1], face[3]), abs=0.05)


def test_the_sheet_shows_the_boxes(tmp_path, stub):
    stub(bright)
    clip = video([spot(i, 240, 160) for i in range(24)])
    tracks = decode(clip, frames=8, size=32, face_crop=FaceCrop()).tracks
    draw_sheet(tmp_path / "sheet.png", clip, tracks, 1)
    picture = cv2.imread(str(tmp_path / "sheet.png"))
    assert picture.shape == (4 * 180, 4 * 270, 3)
    green = (picture == (70, 200, 70)).all(axis=-1)
    assert all(green[y : y + 180, x : x + 270].sum() > 200 for y in range(0, 720, 180) for x in range(0, 1080, 270))
