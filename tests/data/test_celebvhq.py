"""Folders in CelebV-HQ's layout as people keep them: missing and changed clips, texts of any editor, own clips."""

import errno
import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from favchat_jax import files
from favchat_jax.data import storage
from favchat_jax.data.record import Question, Record
from favchat_jax.data.sources import celebvhq, open_dataset, prepare
from favchat_jax.errors import UserError
from tests.conftest import fill
from tests.data.test_datasets import edit, miniature  # noqa: F401

CLIPS = ["video0_0", "video0_1", "video1_2", "video1_3"]


def packed(root: Path, into: Path, **options) -> dict[str, Record]:
    """Packs a folder and reads all records, by id."""
    prepare("celebvhq", str(root), str(into), **options)
    records = {}
    for split in ("train", "heldout"):
        try:
            source = open_dataset("celebvhq", str(into), split)
        except UserError:  # no clip is held out
            continue
        records |= {source[i].id: source[i] for i in range(len(source))}
    return records


def line(clip: str, *questions: str, summary: str = "", **more) -> str:
    pairs = [{"q": question, "a": "yes"} for question in questions]
    return json.dumps({"clip": clip, "summary": summary, "qa": pairs, **more}, ensure_ascii=False) + "\n"


def read(tmp_path: Path, *lines: str, known=CLIPS) -> dict[str, celebvhq.Texts]:
    (tmp_path / "qa.jsonl").write_text("".join(lines), encoding="utf-8", errors="surrogatepass")
    return celebvhq.read_texts(tmp_path / "qa.jsonl", known)


def test_lines_of_one_clip_are_joined_in_their_order(tmp_path):
    texts = read(
        tmp_path,
        line("video0_0", "first?"),
        line("video0_1", "other?"),
        "\n",
        line("video0_0", summary="A face."),
        line("video0_0.mp4", "second?", summary="A face.", video="clips/video0_0.mp4"),
    )
    assert list(texts) == ["video0_0", "video0_1"]
    asked = [Question(question, "yes", "general") for question in ("first?", "second?")]
    assert texts["video0_0"] == celebvhq.Texts(1, "clips/video0_0.mp4", "", "A face.", asked)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line("video0_0", "a?"), line("vidoe0_1", "a?")], "line 2: clip 'vidoe0_1' is not in .*info.json: correct"),
        ([line("video0_0.txt", "a?")], "line 1: clip 'video0_0.txt' is not in"),
        ([line("video0_0", summary="A."), line("video0_0", summary="B.")], "line 2: .* another summary than in line 1"),
        ([line("video0_0", "a?", video="a"), line("video0_0", "b?", video="b")], "line 2: .* another video than in"),
        (["\n", '{"clip": "video0_0", "summary": "He smiles \\ud83d"}\n'], "line 2: .* half of a surrogate pair"),
        (['{"clip": "video0_0", "qa": [{"q": "a?", "a": "\\udc00"}]}\n'], "line 1: .* half of a surrogate pair"),
        (["\ud83d\n"], "line 1 is not UTF-8 text"),
        (['{"clip": 12, "summary": "A."}\n'], "line 1 must have clip"),
        (['{"clip": "", "summary": "A."}\n'], "line 1 must have clip"),
        (['{"clip": "video0_0", "sumary": "A."}\n'], "line 1 has the key 'sumary': call it 'summary'"),
        (['{"clip": "video0_0", "sumary": "A.", "qa": []}\n'], "line 1 has the key 'sumary': call it 'summary'"),
        (["{oops\n"], "line 1 is not JSON"),
        (['{"clip": ["video0_0"], "summary": "A."}\n'], "line 1 must have clip"),
        (['{"clip": "video0_0", "summary": ["A."]}\n'], "line 1 must have clip"),
        (['{"clip": "video0_0", "qa": [{"q": "a?"}]}\n'], "line 1 must have clip, and summary or qa"),
        (['["video0_0"]\n'], "line 1 must have clip"),
        (["[" * 100_000 + "\n"], "line 1 is not JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_by_its_number(lines, said, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/qa.jsonl, {said}") as error:
        read(tmp_path, *lines)
    assert "\n" not in str(error.value)


def test_a_line_without_texts_is_enough_for_a_clip_with_labels_only(tmp_path):
    assert read(tmp_path, line("video0_0", video="a.mp4"))["video0_0"] == celebvhq.Texts(1, "a.mp4")
    with pytest.raises(UserError, match="line 1 has neither a summary nor a question: add one"):
        read(tmp_path, line("video0_0", video="a.mp4"), known=None)


def test_an_id_keeps_a_dot_that_is_no_extension_and_an_extension_that_the_labels_have(tmp_path):
    texts = read(tmp_path, line("a.b", "a?"), line("c.mp4", "a?"), known=["a.b", "c.mp4"])
    assert set(texts) == {"a.b", "c.mp4"}
    own = read(tmp_path, line("a.b", "a?"), line("c.MOV", "a?"), known=None)
    assert {clip: text.video for clip, text in own.items()} == {"a.b": "", "c": "clips/c.MOV"}


def test_texts_of_any_editor_are_packed_as_written(miniature, tmp_path):  # noqa: F811
    summary = "He smiles.\u2028He nods.\x85 \x0b"
    (miniature / "qa.jsonl").write_bytes(b"\xef\xbb\xbf" + line("video1_2", summary=summary).encode() + b"\r\n")
    info = miniature / "celebvhq_info.json"
    info.write_bytes(b"\xef\xbb\xbf" + info.read_bytes())
    records = packed(miniature, tmp_path / "packed")
    assert records["video1_2"].summary == summary
    assert Question("What does the person do?", "talk", "motion") in records["video1_2"].questions  # from the labels
    assert set(records) == set(CLIPS)


def test_half_a_surrogate_pair_in_an_id_is_one_line(miniature, tmp_path):  # noqa: F811
    edit(miniature, lambda info: info["clips"]["video0_0"].__setitem__("ytb_id", "\ud83d"))
    with pytest.raises(UserError, match="celebvhq_info.json: 'video0_0' holds half of a surrogate pair"):
        packed(miniature, tmp_path / "packed")


def test_missing_clips_are_counted_named_and_left_out_up_to_a_share(miniature, tmp_path, caplog):  # noqa: F811
    for clip in ("video0_1", "video1_2"):
        (miniature / "clips" / f"{clip}.mp4").unlink()
    said = "2 of 4 clips are missing: video0_1, video1_2; .*/clips/video0_1.mp4, or set --config.data.missing_share=0.5"
    with pytest.raises(UserError, match=said):
        packed(miniature, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert set(packed(miniature, tmp_path / "packed", missing_share=0.5)) == {"video0_0", "video1_3"}
    assert [r.message for r in caplog.records] == ["celebvhq: 2 clips are missing and left out: video0_1, video1_2"]
    metadata = next((tmp_path / "packed").glob("celebvhq/*/metadata.json"))
    assert json.loads(metadata.read_text())["missing"] == ["video0_1", "video1_2"]


def test_a_folder_without_any_clip_is_refused_whatever_the_share(miniature, tmp_path):  # noqa: F811
    (miniature / "clips").rename(miniature / "videos")
    with pytest.raises(UserError, match="4 of 4 clips are missing: .*; add them, the first as .*/clips/video0_0.mp4$"):
        packed(miniature, tmp_path / "packed", missing_share=1.0)


def test_many_missing_clips_stay_one_readable_line(tmp_path):
    (tmp_path / "qa.jsonl").write_text("".join(line(f"clip{i}", "a?") for i in range(50)))
    with pytest.raises(UserError, match="50 of 50 clips are missing: clip0, .*, clip19 and 30 others; add them"):
        packed(tmp_path, tmp_path / "packed")


def test_a_clip_that_changed_since_it_was_packed_is_named(miniature, tmp_path):  # noqa: F811
    clip = miniature / "clips" / "video1_2.mp4"
    good = clip.read_bytes()
    clip.write_bytes(bytes(len(good)))  # as a download that reserved the space and broke off
    added = (miniature / "clips" / "video0_0.mp4").rename(tmp_path / "later.mp4")
    packed(miniature, tmp_path / "packed", missing_share=0.5)
    clip.write_bytes(good)
    added.rename(miniature / "clips" / "video0_0.mp4")
    with pytest.raises(
        UserError, match=r"packed from other files .* \(2 clips: video0_0, video1_2\): delete it to pack"
    ):
        packed(miniature, tmp_path / "packed")


def test_clips_that_were_copied_or_removed_since_they_were_packed_are_not_refused(miniature, tmp_path, monkeypatch):  # noqa: F811
    packed(miniature, tmp_path / "packed")
    for clip in CLIPS[:2]:
        os.utime(miniature / "clips" / f"{clip}.mp4", (1, 1))
    (miniature / "clips" / "video1_3.mp4").unlink()
    prepare("celebvhq", str(miniature), str(tmp_path / "packed"))
    monkeypatch.setattr(storage, "_changed", lambda *_: pytest.fail("the new times were not kept"))
    assert set(packed(miniature, tmp_path / "packed")) == set(CLIPS)


def test_a_data_set_that_an_older_version_packed_opens(miniature, tmp_path):  # noqa: F811
    packed(miniature, tmp_path / "packed")
    metadata = next((tmp_path / "packed").glob("celebvhq/*/metadata.json"))
    stored = json.loads(metadata.read_text())
    texts = [(miniature / name).read_text() for name in ("celebvhq_info.json", "qa.jsonl")]
    assert stored["digest"] == hashlib.sha256("\0".join(texts).encode()).hexdigest()
    metadata.write_text(json.dumps({"digest": stored["digest"]}))
    (miniature / "clips" / "video1_2.mp4").write_bytes(b"changed")
    assert set(packed(miniature, tmp_path / "packed")) == set(CLIPS)


def test_own_clips_need_no_labels_if_all_their_texts_are_there(miniature, tmp_path, caplog):  # noqa: F811
    (miniature / "celebvhq_info.json").unlink()
    (miniature / "clips" / "video0_1.mp4").rename(miniature / "clips" / "video0_1.MOV")
    (miniature / "qa.jsonl").write_text(
        line("video0_0", "a?", source="film") + line("video0_1.MOV", summary="A face.", source="film")
    )
    records = packed(miniature, tmp_path / "packed")
    assert set(records) == {"video0_0", "video0_1"} and {one.source for one in records.values()} == {"film"}
    first, second = records["video0_0"], records["video0_1"]
    assert (first.summary, [q.question for q in first.questions]) == ("", ["a?"])
    assert (second.summary, second.questions) == ("A face.", ())
    assert not first.attributes.any() and set(first.targets.values()) == {""} and first.has_face
    assert "has no celebvhq_info.json: its clips have no labels" in caplog.text
    (miniature / "qa.jsonl").write_text("\n")
    with pytest.raises(UserError, match="qa.jsonl is empty: give each clip a line"):
        packed(miniature, tmp_path / "other")


def test_a_clip_that_cannot_be_read_is_named(miniature, tmp_path, monkeypatch):  # noqa: F811
    def refused(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) if path.suffix == ".mp4" else 0

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.setattr(celebvhq, "read_lines", lambda path: [])
    with pytest.raises(UserError, match=r"clips/video\d_\d.mp4 cannot be read \(Permission denied\): check its place"):
        packed(miniature, tmp_path / "packed")


def test_packing_goes_on_without_locks_after_a_warning(miniature, tmp_path, monkeypatch, caplog):  # noqa: F811
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    files._warn_of_no_locks.cache_clear()
    other = tmp_path / "packed" / "celebvhq" / "incomplete.of_another_process"
    other.mkdir(parents=True)
    assert set(packed(miniature, tmp_path / "packed")) == set(CLIPS)
    assert caplog.text.count("cannot be locked here (No locks available)") == 1 and other.exists()


def test_a_place_that_takes_no_packed_data_is_one_line(miniature, tmp_path, small_disk):  # noqa: F811
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory: choose a writable folder .* --config.data.packed=DIR"):
        packed(miniature, tmp_path / "file")
    ballast = fill(small_disk)
    for room in (0, 8192):
        with ballast.open("r+b") as file:
            file.truncate(ballast.stat().st_size - room)
        with pytest.raises(UserError, match=f"could not write {small_disk}/packed/celebvhq/.*: free disk space"):
            packed(miniature, small_disk / "packed")


def test_a_read_only_disk_serves_packed_data_and_refuses_new_in_one_line(miniature, small_disk):  # noqa: F811
    packed(miniature, small_disk / "packed")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    os.utime(miniature / "clips" / "video0_0.mp4", (1, 1))
    assert set(packed(miniature, small_disk / "packed")) == set(CLIPS)
    with pytest.raises(UserError, match="other/celebvhq: Read-only file system: choose .* --config.data.packed=DIR"):
        packed(miniature, small_disk / "other")
