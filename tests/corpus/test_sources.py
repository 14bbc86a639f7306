"""Every published layout in miniature: its videos, their groups and their labels."""

import dataclasses

import pytest

from favchat_jax.corpus import footage, sources
from favchat_jax.corpus.manifest import MANIFEST, read_table
from favchat_jax.corpus.scan import scan
from favchat_jax.errors import UserError
from tests.corpus.corpus_files import celebvhq_entry, celebvhq_info, write


def found(root):
    return {video.name: video for video in sources.find(str(root))}


def test_celebvhq_clips_are_named_by_their_ids_and_grouped_by_source_video(tmp_path):
    segments = [{"emotion": "Fear", "start_sec": 0, "end_sec": 1}]
    timed = celebvhq_entry(
        attributes={**celebvhq_entry()["attributes"], "emotion": {"sep_flag": True, "labels": segments}}
    )
    write(tmp_path / "celebvhq_info.json", celebvhq_info(video_0=celebvhq_entry(), video_1=timed))
    for name in ("video_0", "video_1"):
        write(tmp_path / "35666" / f"{name}.mp4", b"x")
    videos = found(tmp_path)
    assert {video.id for video in videos.values()} == {"video_0", "video_1"}
    assert {video.group for video in videos.values()} == {"video"}
    assert videos["video_0"].attributes == {"appearance": ["brown_hair"], "action": ["talk"], "emotion": ["happy"]}
    assert videos["video_1"].attributes["emotion"] == [{"emotion": "fear", "start_sec": 0, "end_sec": 1}]
    assert videos["video_0"].end is None and not videos["video_0"].box


def test_celebvhq_clips_are_cut_from_full_videos_if_only_those_exist(tmp_path):
    uncropped = celebvhq_entry(bbox={"top": 0, "bottom": 1, "left": 0, "right": 1})
    write(tmp_path / "celebvhq_info.json", "\ufeff" + celebvhq_info(video_0=celebvhq_entry(), video_1=uncropped))
    full = write(tmp_path / "raw" / "video.mp4", b"x")
    videos = found(tmp_path)
    assert (videos["video_0"].path, videos["video_0"].start, videos["video_0"].end) == (full, 0.5, 1.5)
    assert videos["video_0"].box == "[0.0, 0.52, 0.23, 1.0]" and videos["video_1"].box == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attributes": {"appearance": [0] * 39, "action": [0] * 35, "emotion": "happy"}}, "appearance must be 40"),
        ({"attributes": {"appearance": [0] * 40, "action": [0] * 35, "emotion": "bored"}}, "emotion 'bored'"),
        ({"duration": {"start_sec": 2, "end_sec": 1}}, "duration or bbox"),
        ({"bbox": {"top": 0, "bottom": 2, "left": 0, "right": 1}}, "duration or bbox"),
        ({"ytb_id": "elsewhere"}, "no video named odd"),
    ],
)
def test_an_invalid_celebvhq_entry_is_recorded_and_the_others_are_found(tmp_path, changes, reason):
    write(tmp_path / "celebvhq_info.json", celebvhq_info(odd=celebvhq_entry(**changes), good=celebvhq_entry()))
    write(tmp_path / "video.mp4", b"x")
    videos = found(tmp_path)
    assert reason in videos["odd"].problem and not videos["good"].problem


@pytest.mark.parametrize("name", ["", "../up", "\ud800", "a" * 300])
def test_a_name_that_no_file_can_have_is_recorded(tmp_path, name):
    write(tmp_path / "raw" / "celebvhq_info.json", celebvhq_info(**{name: celebvhq_entry(ytb_id=name)}))
    (tmp_path / "out").mkdir()
    (row,) = scan([str(tmp_path / "raw")], tmp_path / "out")
    assert row["status"] == "unreadable" and row["id"].startswith("celebvhq-")
    assert [row["id"] for row in read_table(tmp_path / "out", MANIFEST)] == [row["id"]]


def test_what_a_computers_system_adds_to_folders_is_no_video(tmp_path):
    for name in ("Ann/0/0.1.jpg", "Ann/0/._0.1.jpg", "Ann/@eaDir/0.1.jpg", "Ann/.x/0.1.jpg", "@eaDir/0/0.1.jpg"):
        write(tmp_path / "faces" / name, b"x")
    videos = sources.find(f"youtube_faces:{tmp_path / 'faces'}")
    assert [str(video.path.relative_to(tmp_path)) for video in videos] == ["faces/Ann/0"]
    assert [file.name for file in footage.frame_files(videos[0].path)] == ["0.1.jpg"]
    for name in ("a.mp4", "._a.mp4", "__MACOSX/a.mp4", "$RECYCLE.BIN/b.mp4"):
        write(tmp_path / "videos" / name, b"x")
    assert list(found(tmp_path / "videos")) == ["a.mp4"]


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"clips": {}}'], ids=lambda text: text[:15])
def test_an_invalid_annotation_file_is_named(tmp_path, text):
    write(tmp_path / "celebvhq_info.json", text)
    with pytest.raises(UserError, match=r"celebvhq_info.json.*: download it again$"):
        found(tmp_path)


def test_hmdb51_clips_have_an_action_and_the_video_that_they_were_cut_from(tmp_path):
    for action, name in (
        ("smile", "Show_smile_h_cm_np1_fr_goo_0"),
        ("smile", "Show_smile_h_cm_np1_fr_goo_1"),
        ("brush_hair", "April_brush_hair_u_nm_np1_ba_goo_0"),
    ):
        write(tmp_path / action / f"{name}.avi", b"x")
    videos = sources.find(str(tmp_path))
    assert [(v.source, v.group, v.attributes) for v in videos] == [
        ("hmdb51", "April", None),
        ("hmdb51", "Show", {"action": ["smile"]}),
        ("hmdb51", "Show", {"action": ["smile"]}),
    ]
    assert len({video.id for video in videos}) == 3


def test_youtube_faces_has_a_folder_of_frames_per_video_grouped_by_person(tmp_path):
    for person, video in (("Ann_Lee", "0"), ("Ann_Lee", "3"), ("Bo", "1")):
        write(tmp_path / "frame_images_DB" / person / video / f"{video}.117.jpg", b"x")
    write(tmp_path / "frame_images_DB" / "Bo.labeled_faces.txt", b"x")
    videos = sources.find(str(tmp_path))
    assert [(v.source, v.group, v.path.name) for v in videos] == [
        ("youtube_faces", "Ann_Lee", "0"),
        ("youtube_faces", "Ann_Lee", "3"),
        ("youtube_faces", "Bo", "1"),
    ]
    inside = sources.find(str(tmp_path / "frame_images_DB"))  # recognised by the names of the frames
    assert {dataclasses.replace(v, path=videos[0].path) for v in inside} == {
        dataclasses.replace(v, path=videos[0].path) for v in videos
    }


def test_faceforensics_joins_all_videos_that_share_a_face(tmp_path):
    youtube = tmp_path / "original_sequences" / "youtube" / "c23" / "videos"
    fake = tmp_path / "manipulated_sequences" / "Deepfakes" / "c23" / "videos"
    actors = tmp_path / "original_sequences" / "actors" / "c23" / "videos"
    for path in (
        youtube / "000",
        youtube / "003",
        youtube / "007",
        fake / "000_003",
        fake / "003_000",
        actors / "03__talk",
    ):
        write(path.with_suffix(".mp4"), b"x")
    videos = sources.find(str(tmp_path))
    groups = {video.path.stem: video.group for video in videos}
    assert groups == {
        "000": "000",
        "003": "000",
        "000_003": "000",
        "003_000": "000",
        "007": "007",
        "03__talk": "actor03",
    }


@pytest.mark.parametrize("top", ["", "2_ClipsforFaceCrop"])
def test_ferv39k_labels_the_emotion_of_videos_and_of_folders_of_frames(tmp_path, top):
    write(tmp_path / top / "Action" / "Happy" / "0267.mp4", b"x")
    write(tmp_path / top / "Crisis" / "Sad" / "0012" / "0001.jpg", b"x")
    videos = sources.find(str(tmp_path))
    assert [(v.source, v.attributes, v.path.stem) for v in videos] == [
        ("ferv39k", {"emotion": ["happy"]}, "0267"),
        ("ferv39k", {"emotion": ["sadness"]}, "0012"),
    ]


def test_names_of_a_plain_folder_become_safe_and_distinct_ids(tmp_path):
    names = ["a b.mp4", "a_b.mp4", "a\nb.mp4", "🙂.mp4", "deep/er/a b.mp4", "-" * 200 + ".mp4", "notes.txt"]
    for name in names:
        write(tmp_path / name, b"x")
    write(tmp_path / ".hidden.mp4", b"x")
    videos = found(tmp_path)
    assert set(videos) == set(names)
    ids = {video.id for video in videos.values()}
    assert len(ids) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and len(name) < 120 for name in ids)


def test_a_layout_can_be_named(tmp_path):
    write(tmp_path / "celebvhq_info.json", "{}")
    write(tmp_path / "a.mp4", b"x")
    assert {video.source for video in sources.find(f"folder:{tmp_path}")} == {"folder"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("nowhere", "is not a folder"),
        ("hmdb51:{root}", "has the layout hmdb51"),
        ("celebvhq:{root}", "celebvhq_info.json"),
    ],
)
def test_a_missing_source_is_named(tmp_path, given, named):
    with pytest.raises(UserError, match=named):
        sources.find(given.format(root=tmp_path))
