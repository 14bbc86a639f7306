"""From raw videos to clips: the kept videos, their frames, and the reasons for the unusable ones."""

import io
import json
import os
import shutil
import struct
import zlib

import av
import cv2
import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest

from favchat_jax.corpus import clips, footage
from favchat_jax.corpus.clip import clip
from favchat_jax.corpus.clips import Settings, best_stretch, track_box
from favchat_jax.corpus.manifest import DROPPED, KEPT, MANIFEST, read_table, write_table
from favchat_jax.corpus.scan import scan
from favchat_jax.data.faces.detectors import load_detector
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError
from tests.corpus.corpus_files import celebvhq_entry, celebvhq_info, contents, face_video, shapes_video, write
from tests.data.face_videos import Stub
from tests.data.video_files import audio_only, encode_video, read_number

EXACT = {"crf": "10"}


def build(root, out, **settings):
    """Scans and clips; returns the kept rows and the reasons of the dropped ones, by file name."""
    rows = scan([str(root)], out)
    named = {row["id"]: os.path.basename(row["path"]) for row in rows}
    kept, dropped = clip(out, Settings(**settings))
    return {named[row["id"]]: row for row in kept}, {named[row["id"]]: row["reason"] for row in dropped}


def numbers(path, size=96):
    """Returns the numbers that the frames of a clip show."""
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [read_number(cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)) for picture in pictures]


@pytest.fixture
def face_between(monkeypatch):
    """Installs a detector that sees a face in pictures whose number is in a range."""

    def set_range(first, last):
        def detect(picture):
            return [(0.2, 0.8, 0.2, 0.8)] if first <= read_number(picture) <= last else []

        monkeypatch.setattr(clips, "load_detector", lambda *arguments: Stub(detect))
        clips._detector.cache_clear()

    yield set_range
    clips._detector.cache_clear()


def test_rendered_faces_are_kept_and_shapes_and_noise_are_dropped(tmp_path):
    for index in range(4):
        write(tmp_path / "raw" / f"face{index}.mp4", face_video(index))
        write(tmp_path / "raw" / f"shapes{index}.mp4", shapes_video(index))
    kept, dropped = build(tmp_path / "raw", tmp_path / "out")
    assert set(kept) == {f"face{i}.mp4" for i in range(4)} and set(dropped) == {f"shapes{i}.mp4" for i in range(4)}
    for row in kept.values():
        assert 36 <= row["frames"] <= 40 and row["face_share"] >= 0.6
        assert len(numbers(tmp_path / "out" / row["path"])) == row["frames"]
    assert all("of the sampled frames" in reason for reason in dropped.values())
    for sheet in ("kept.png", "dropped.png"):
        picture = cv2.imread(str(tmp_path / "out" / sheet))
        assert picture.shape == (160 + 36, 4 * 160, 3) and picture.std() > 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_precision_and_recall_of_the_keep_decision_are_at_least_95_percent(tmp_path):
    for index in range(200):
        write(tmp_path / "raw" / f"face{index}.mp4", face_video(index))
        write(tmp_path / "raw" / f"shapes{index}.mp4", shapes_video(index))
    kept, _ = build(tmp_path / "raw", tmp_path / "out")
    right = sum(name.startswith("face") for name in kept)
    print(f"precision {right / len(kept):.3f}, recall {right / 200:.3f}")
    assert right / len(kept) >= 0.95 and right / 200 >= 0.95


def test_a_clip_is_the_stretch_of_its_video_that_shows_a_face(tmp_path, face_between):
    write(tmp_path / "raw" / "long.mp4", encode_video(120, options=EXACT))
    face_between(41, 110)
    kept, _ = build(tmp_path / "raw", tmp_path / "out", min_share=0.5)
    row = kept["long.mp4"]
    assert row["face_share"] == pytest.approx(17 / 30, abs=1e-4)  # frames 44, 48, ..., 108 of 0, 4, ..., 116
    assert row["start_frame"] == 44 and row["frames"] == 60
    assert numbers(tmp_path / "out" / row["path"]) == list(range(44, 104))


def test_the_share_of_frames_with_a_face_decides(tmp_path, face_between):
    write(tmp_path / "raw" / "half.mp4", encode_video(80, options=EXACT))
    face_between(0, 39)
    assert not build(tmp_path / "raw", tmp_path / "out", min_share=0.51)[0]
    assert build(tmp_path / "raw", tmp_path / "out", min_share=0.5)[0]


@pytest.mark.parametrize(
    ("found", "frames", "expected"),
    [
        ("1111111111111111111111111", 100, (0, 60)),  # the earliest of equals
        ("0000000000111111111111111", 100, (40, 60)),  # 60 frames hold all 15 finds from frame 37 on; 40 shows a face
        ("1111111111", 40, (0, 40)),  # shorter than the longest
        ("0000001111111111110000000", 100, (24, 48)),  # ends without a face are cut off
        ("0000000000100000000000000", 100, (40, 36)),  # but not below the shortest
        ("0000000000000000000000001", 100, (61, 36)),
    ],
)
def test_the_best_stretch_holds_the_most_faces(found, frames, expected):
    assert best_stretch([c == "1" for c in found], 4, frames, 36, 60) == expected


def test_a_track_follows_one_face_and_leaves_a_margin_around_it():
    def face(x, y=0.5, size=0.2):
        return [y - size / 2, y + size / 2, x - size / 2, x + size / 2]

    still = [np.array([face(0.3), face(0.9, size=0.1)])] * 2
    moved = [np.array([face(0.9, size=0.12), face(0.35)]), np.zeros((0, 4))]
    assert track_box([*still, *moved]) == pytest.approx((0.3, 0.7, 0.1, 0.55))
    assert track_box([np.array([face(0.1, 0.1, 0.3)])]) == pytest.approx((0, 0.4, 0, 0.4))


def test_crop_keeps_the_part_around_the_face(tmp_path, face_between):
    write(tmp_path / "raw" / "a.mp4", encode_video(40, width=100, height=100, options=EXACT))
    face_between(0, 100)
    row = build(tmp_path / "raw", tmp_path / "out", crop=True)[0]["a.mp4"]
    with av.open(str(tmp_path / "out" / row["path"])) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (100, 100)
    clips._detector.cache_clear()
    small = Stub(lambda picture: [(0.39, 0.61, 0.39, 0.61)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "load_detector", lambda *arguments: small)
        row = build(tmp_path / "raw", tmp_path / "small", crop=True)[0]["a.mp4"]
    with av.open(str(tmp_path / "small" / row["path"])) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (44, 44)


def test_celebvhq_clips_are_kept_byte_for_byte_and_judged_only_on_request(tmp_path):
    write(tmp_path / "raw" / "celebvhq_info.json", celebvhq_info(a=celebvhq_entry()))
    write(tmp_path / "raw" / "clips" / "a.mp4", content := shapes_video(0))
    kept, _ = build(tmp_path / "raw", tmp_path / "out")
    assert (tmp_path / "out" / "kept" / "a.mp4").read_bytes() == content
    assert kept["a.mp4"]["face_share"] is None and kept["a.mp4"]["group"] == "celebvhq/video"
    assert json.loads(kept["a.mp4"]["attributes"])["emotion"] == ["happy"]
    assert not build(tmp_path / "raw", tmp_path / "out", filter_celebvhq=True)[0]
    assert not list((tmp_path / "out" / "kept").iterdir())


def test_celebvhq_clips_are_cut_and_cropped_out_of_full_videos(tmp_path):
    write(tmp_path / "raw" / "celebvhq_info.json", celebvhq_info(a=celebvhq_entry()))
    write(tmp_path / "raw" / "video.mp4", encode_video(75, width=120, options={**EXACT, "g": "10"}))
    row = build(tmp_path / "raw", tmp_path / "out")[0]["video.mp4"]
    with av.open(str(tmp_path / "out" / row["path"])) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert pictures[0].shape == (50, 50, 3) and len(pictures) == row["frames"] == 25
    full = encode_video(75, width=120, options={**EXACT, "g": "10"})
    with av.open(io.BytesIO(full)) as container:
        # As the authors' script: the box widened to rows 0 to 50 and columns 28 to 120, and the square in its middle.
        wanted = [frame.to_ndarray(format="rgb24")[:50, 49:99] for frame in container.decode(video=0)][13:38]
    assert np.abs(np.stack(pictures).astype(int) - np.stack(wanted)).mean() < 3  # from 0.5 s: frame 13 of 25 a second


def test_a_folder_of_frames_becomes_a_clip(tmp_path):
    with av.open(io.BytesIO(face_video(1))) as container:
        for number, frame in enumerate(container.decode(video=0)):
            picture = cv2.imencode(".jpg", frame.to_ndarray(format="bgr24"))[1].tobytes()
            write(tmp_path / "raw" / "frame_images_DB" / "Ann" / "1" / f"1.{number + 8}.jpg", picture)
    row = build(tmp_path / "raw", tmp_path / "out")[0]["1"]
    assert row["frames"] == 40 and row["fps"] == 25 and row["group"] == "youtube_faces/Ann"
    assert decode(tmp_path / "out" / row["path"], frames=8, size=64).frames.std() > 10


def test_invalid_frames_are_skipped(tmp_path):
    """The header of one of them claims 60,000 x 60,000 pixels."""
    folder = tmp_path / "raw" / "person" / "0"
    picture = cv2.imencode(".png", np.zeros((100, 100, 3), np.uint8))[1].tobytes()
    large = picture[:16] + struct.pack(">II", 60_000, 60_000) + picture[24:29]
    large += struct.pack(">I", zlib.crc32(large[12:])) + picture[33:]
    for number, content in enumerate([picture] * 38 + [large, b"", b"no picture"]):
        write(folder / f"0.{number}.jpg", content)
    write(tmp_path / "raw" / "another" / "0" / "0.1.jpg", large)
    kept, dropped = build(f"youtube_faces:{tmp_path / 'raw'}", tmp_path / "out", min_share=0.0, shortest=38)
    assert [row["frames"] for row in kept.values()] == [38]
    assert "cannot be read as a picture" in dropped["0"]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_videos_become_upright(tmp_path, rotation):
    path = write(tmp_path / "turned.mp4", encode_video(3, width=120, height=96, rotation=rotation))
    frame = next(footage.frames(path)).to_ndarray(format="rgb24")
    expected = decode(path, frames=3, size=64).frames[0]
    assert np.abs(cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA).astype(int) - expected).mean() < 12


def test_every_unusable_file_is_recorded_with_its_reason(tmp_path):
    raw, good = tmp_path / "raw", face_video(0)
    files = {
        "good face 🙂\n.mp4": good,
        "renamed.txt": face_video(1),
        "twin.mp4": good,
        "empty.mp4": b"",
        "cut.mp4": good[: len(good) // 8],
        "noise.mp4": bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8)),
        "sound.mp4": audio_only(),
        "notes.mp4": "words " * 100,
        "picture.jpg": cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8))[1].tobytes(),
        "short.mp4": face_video(2, frames=20),
    }
    for name, content in files.items():
        write(raw / name, content)
    kept, dropped = build(f"folder:{raw}", tmp_path / "out")
    assert set(kept) | set(dropped) == set(files) and not set(kept) & set(dropped)
    assert set(kept) == {"good face 🙂\n.mp4", "renamed.txt"}
    reasons = {
        "twin": "duplicate",
        "empty": "is empty",
        "cut": "unreadable",
        "noise": "cannot be read",
        "short": "frames",
    }
    for name, reason in {**reasons, "sound": "no video stream", "notes": "unreadable"}.items():
        assert reason in dropped[f"{name}.mp4"], name
    assert "single picture" in dropped["picture.jpg"]
    assert all(reason.isprintable() for reason in dropped.values())
    kept_files = {row["path"] for row in read_table(tmp_path / "out", KEPT)}
    assert {f"kept/{path.name}" for path in (tmp_path / "out" / "kept").iterdir()} == kept_files


def test_a_corpus_folder_inside_a_source_is_refused(tmp_path):
    write(tmp_path / "a.mp4", encode_video(3))
    with pytest.raises(UserError, match="choose a folder beside it"):
        scan([str(tmp_path)], tmp_path / "out")


def test_a_name_that_is_not_utf8_is_recorded(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    with open(os.fsencode(raw) + b"/bad\xff.mp4", "wb") as file:
        file.write(face_video(0))
    (row,) = scan([str(raw)], tmp_path / "out")
    assert row["status"] == "unreadable" and "UTF-8" in row["reason"] and "\\xff" in row["path"]


def test_a_video_without_a_frame_rate_has_25_frames_a_second(tmp_path):
    write(tmp_path / "raw" / "raw.h264", encode_video(40, container="h264"))
    (row,) = scan([str(tmp_path / "raw")], tmp_path / "out")
    assert (row["status"], row["fps"], row["frames"]) == ("ok", 25.0, 40)
    assert row["duration"] == pytest.approx(1.6)


def test_an_8k_video_is_shrunk(tmp_path, face_between):
    write(tmp_path / "raw" / "large.mp4", encode_video(3, width=7680, height=4320, options={"preset": "ultrafast"}))
    face_between(0, 5000)
    row = build(tmp_path / "raw", tmp_path / "out", shortest=3)[0]["large.mp4"]
    with av.open(str(tmp_path / "out" / row["path"])) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (1280, 720)


@pytest.mark.parametrize("size", [(4000, 16), (16, 4000)])
def test_a_banner_is_judged_like_any_other_video(tmp_path, size):
    width, height = size
    content = encode_video(5, width=width, height=height, options={"preset": "ultrafast"})
    write(tmp_path / "raw" / "banner.mp4", content)
    assert "a face in 0%" in build(tmp_path / "raw", tmp_path / "out")[1]["banner.mp4"]


def test_a_clip_that_would_be_too_small_to_read_is_dropped(tmp_path):
    box = {"top": 0.5, "bottom": 0.501, "left": 0.0, "right": 1.0}
    write(tmp_path / "raw" / "celebvhq_info.json", celebvhq_info(c=celebvhq_entry(bbox=box)))
    write(tmp_path / "raw" / "video.mp4", encode_video(40))
    kept, dropped = build(tmp_path / "raw", tmp_path / "out")
    assert not kept and "its clip would be 4x4 pixels" in dropped["video.mp4"]


def test_a_circle_in_celebvhqs_box_is_round_in_what_a_model_sees(tmp_path):
    def circle(number: int, width: int, height: int) -> np.ndarray:
        return cv2.circle(np.full((height, width, 3), 40, np.uint8), (96, 90), 22, (240, 240, 240), -1)

    box = {"top": 0.3, "bottom": 0.7, "left": 0.2, "right": 0.4}
    write(tmp_path / "raw" / "celebvhq_info.json", celebvhq_info(a=celebvhq_entry(bbox=box)))
    write(tmp_path / "raw" / "video.mp4", encode_video(50, width=320, height=180, picture=circle))
    row = build(tmp_path / "raw", tmp_path / "out")[0]["video.mp4"]
    rows, columns = np.where(decode(tmp_path / "out" / row["path"], frames=1, size=224).frames[0].mean(-1) > 140)
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(1, abs=0.03)


def edited(out, change):
    rows = pq.read_table(out / MANIFEST).to_pylist()
    table = change(rows)
    if table is not None:
        pq.write_table(table, out / MANIFEST)
    else:
        write_table(out, MANIFEST, rows)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: rows[0].update(id="../up"), "is not a file name"),
        (lambda rows: rows[0].update(id=rows[1]["id"]), "occurs twice"),
        (lambda rows: rows[0].update(status="fine"), "status 'fine'"),
        (lambda rows: rows[0].update(path=None), "has no path"),
        (lambda rows: rows[0].update(attributes="[1"), "attributes are not JSON"),
        (lambda rows: rows[0].update(attributes='{"emotion": [{"start_sec": 0}]}'), "attributes are not JSON"),
        (lambda rows: rows[0].update(source="elsewhere"), "source 'elsewhere'"),
        (lambda rows: rows[0].update(fps=0.0), "fps 0.0"),
        (lambda rows: rows[0].update(fps=None), "fps None"),
        (lambda rows: rows[0].update(frames=0), "frames 0"),
        (lambda rows: rows[0].update(start=float("nan")), "start nan"),
        (lambda rows: rows[0].update(start=1.0, end=0.5), "end 0.5"),
        (lambda rows: rows[0].update(box="everything"), "box 'everything'"),
        (lambda rows: rows[0].update(box="[1, 0, 0, 1]"), r"box '\[1, 0, 0, 1\]'"),
        (lambda rows: __import__("pyarrow").Table.from_pylist([{"id": "a"}]), "has no column"),
    ],
)
def test_an_invalid_manifest_is_refused_in_one_line(tmp_path, change, named):
    for name in ("a", "b"):
        write(tmp_path / "raw" / f"{name}.mp4", encode_video(3 if name == "a" else 4))
    scan([str(tmp_path / "raw")], tmp_path / "out")
    edited(tmp_path / "out", change)
    with pytest.raises(UserError, match=named) as error:
        clip(tmp_path / "out", Settings())
    assert "\n" not in str(error.value)


def test_rows_that_a_person_removed_or_marked_stay_so(tmp_path, face_between):
    for frames, name in enumerate("abc", start=40):
        write(tmp_path / "raw" / f"{name}.mp4", encode_video(frames))
    scan([str(tmp_path / "raw")], tmp_path / "out")
    rows = read_table(tmp_path / "out", MANIFEST)
    rows[1].update(status="unreadable", reason="by hand")
    write_table(tmp_path / "out", MANIFEST, rows[1:])
    face_between(0, 5000)
    kept, dropped = clip(tmp_path / "out", Settings())
    assert [row["id"] for row in kept] == [rows[2]["id"]] and dropped[0]["reason"] == "unreadable: by hand"


def test_a_missing_video_is_dropped_with_its_reason(tmp_path):
    write(tmp_path / "raw" / "a.mp4", encode_video(40))
    scan([str(tmp_path / "raw")], tmp_path / "out")
    shutil.rmtree(tmp_path / "raw")
    assert "does not exist" in clip(tmp_path / "out", Settings())[1][0]["reason"]
    assert len(read_table(tmp_path / "out", DROPPED)) == 1


def test_a_relative_source_folder_is_found_from_another_working_directory(tmp_path, monkeypatch, face_between):
    write(tmp_path / "there" / "raw" / "a.mp4", encode_video(40))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    scan(["raw"], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    face_between(0, 5000)
    assert len(clip(tmp_path / "out", Settings())[0]) == 1


def test_only_changed_videos_are_processed_again(tmp_path, face_between):
    for frames, name in enumerate("ab", start=40):
        write(tmp_path / "raw" / f"{name}.mp4", encode_video(frames, options=EXACT))
    face_between(0, 5000)
    kept, _ = build(tmp_path / "raw", tmp_path / "out")
    before = contents(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "kept").iterdir()}
    (tmp_path / "out" / kept["a.mp4"]["path"]).unlink()
    build(tmp_path / "raw", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    b = tmp_path / "out" / kept["b.mp4"]["path"]
    assert b.stat().st_mtime_ns == times[b]
    write(tmp_path / "raw" / "b.mp4", encode_video(50, options=EXACT))
    assert build(tmp_path / "raw", tmp_path / "out")[0]["b.mp4"]["frames"] == 50


def scrfd_model(path, boxes):
    """Writes an ONNX model with SCRFD's outputs that always finds `boxes`.

    `boxes` is {stride: [(cell, anchor, score, distances)]}.
    """
    nodes, outputs = [], []
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            values = np.zeros(((640 // stride) ** 2 * 2, width), np.float32)
            for cell, anchor, score, distances in boxes.get(stride, []):
                values[2 * cell + anchor] = {"score": score, "bbox": distances}.get(kind, 0)
            name = f"{kind}_{stride}"
            constant = onnx.numpy_helper.from_array(values, name)
            nodes.append(onnx.helper.make_node("Constant", [], [name], value=constant))
            outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, values.shape))
    pixels = onnx.helper.make_tensor_value_info("input.1", onnx.TensorProto.FLOAT, (1, 3, 640, 640))
    graph = onnx.helper.make_graph(nodes, "scrfd", [pixels], outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))


def test_scrfd_decodes_anchors_of_all_strides_and_merges_overlaps(tmp_path):
    found = {
        8: [(0, 0, 0.9, (0, 0, 1, 1))],  # 8 pixels: under the smallest face
        16: [(40 * 5 + 10, 0, 0.8, (2, 2, 2, 2)), (40 * 5 + 10, 1, 0.7, (2, 2, 2, 2.2))],  # one face, seen twice
        32: [(20 * 8 + 4, 1, 0.6, (3, 4, 5, 2)), (0, 0, 0.4, (0, 0, 3, 3))],  # the last one is faint
    }
    scrfd_model(tmp_path / "scrfd.onnx", found)
    found = load_detector("scrfd", str(tmp_path / "scrfd.onnx"))(np.zeros((360, 640, 3), np.uint8))
    large = [(256 - 128) / 360, (256 + 64) / 360, (128 - 96) / 640, (128 + 160) / 640]
    small = [(80 - 32) / 360, (80 + 32) / 360, (160 - 32) / 640, (160 + 32) / 640]
    assert found[found.sure].at_least(0.1, 360, 640).boxes == pytest.approx(np.array([large, small]))
    assert len(found) == 4  # with the smallest, and the faint one, which counts only beside a sure one


def test_a_detector_that_cannot_be_loaded_ends_the_run(tmp_path):
    write(tmp_path / "raw" / "a.mp4", encode_video(40))
    scan([str(tmp_path / "raw")], tmp_path / "out")
    for model, named in (
        ("nowhere.onnx", "no such file"),
        (str(tmp_path / "raw" / "a.mp4"), "is not SCRFD, or damaged"),
    ):
        with pytest.raises(UserError, match=named) as error:
            clip(tmp_path / "out", Settings(detector="scrfd", model=model))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / KEPT).exists()
