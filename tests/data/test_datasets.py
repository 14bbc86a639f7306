"""Tests packing and reading of rendered clips and a miniature CelebV-HQ, which use the same builders."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from favchat_jax.data import vocabulary
from favchat_jax.data.record import Question
from favchat_jax.data.sources import celebvhq, open_dataset, prepare
from favchat_jax.embedded.faces import LABELS, render
from favchat_jax.errors import UserError


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("packed"))
    prepare("rendered_faces/smoke", None, folder)
    return folder


@pytest.fixture
def miniature(tmp_path):
    """Builds a folder in CelebV-HQ's layout with four rendered clips of three source videos."""
    root = tmp_path / "celebvhq"
    (root / "clips").mkdir(parents=True)
    clips, lines = {}, []
    for index, emotion in enumerate(
        (
            {"sep_flag": False, "labels": "happy"},
            {"sep_flag": True, "labels": [{"emotion": e, "start_sec": 0, "end_sec": 1} for e in ("fear", "Surprise")]},
            {"sep_flag": False, "labels": "contempt"},
            {"sep_flag": False, "labels": "neutral"},
        )
    ):
        record = render(0, "train", index)
        name = f"video{index // 2}_{index}"
        (root / "clips" / f"{name}.mp4").write_bytes(record.clip)
        clips[name] = {
            "ytb_id": f"video{index // 2}" if index < 3 else "",
            "attributes": {
                "appearance": [int(i == 13) for i in range(40)],
                "action": [int(i == 29) for i in range(35)],
                "emotion": emotion,
            },
        }
        if index < 3:
            pairs = [{"q": q.question, "a": q.answer} for q in record.questions]
            lines.append({"clip": name, "video": f"clips/{name}.mp4", "summary": record.summary, "qa": pairs})
    (root / "celebvhq_info.json").write_text(json.dumps({"meta_info": {}, "clips": clips}))
    (root / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def edit(root: Path, change) -> None:
    path = root / "celebvhq_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def test_a_packed_record_equals_the_rendered_one(smoke):
    source = open_dataset("rendered_faces/smoke", smoke, "train")
    assert len(source) == 36 and len(open_dataset("rendered_faces/smoke", smoke, "heldout")) == 18
    for record in (source[0], source[35]):
        drawn = render(0, "train", int(record.id[-5:]))
        assert (record.attributes == drawn.attributes).all() and record.attributes.dtype == np.uint8
        for name in ("id", "clip", "summary", "questions", "targets", "source", "has_face", "labels"):
            assert getattr(record, name) == getattr(drawn, name), name
        assert set(record.labels) == set(LABELS)


def test_no_source_is_in_both_splits(smoke):
    train, heldout = (open_dataset("rendered_faces/smoke", smoke, split) for split in ("train", "heldout"))
    assert not {r.source for r in map(train.__getitem__, range(36))} & {heldout[i].source for i in range(18)}


def test_a_used_source_can_be_pickled_without_its_open_files(smoke):
    source = open_dataset("rendered_faces/smoke", smoke, "heldout")
    first = source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000
    assert copy[0].id == first.id and len(copy) == len(source)


def test_a_prepared_data_set_is_not_made_again(smoke):
    before = time.monotonic()
    folder = prepare("rendered_faces/smoke", None, smoke)
    assert time.monotonic() - before < 0.5
    assert folder.startswith(smoke)


def test_nothing_imports_tensorflow(smoke):
    code = (
        "import sys; from favchat_jax.data.sources import open_dataset;"
        f"open_dataset('rendered_faces/smoke', {smoke!r}, 'train')[0];"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_killed_build_is_not_complete_and_leaves_no_worker(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(
        "from favchat_jax.data.sources import prepare\n"
        f"if __name__ == '__main__': prepare('rendered_faces/smoke', None, {str(tmp_path)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    build = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (workers := children(build.pid)) or not list(tmp_path.glob("rendered_faces/smoke/incomplete.*")):
        assert build.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    build.kill()
    build.wait()
    with pytest.raises(UserError, match="not packed yet"):
        open_dataset("rendered_faces/smoke", str(tmp_path), "train")
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    prepare("rendered_faces/smoke", None, str(tmp_path))
    assert len(open_dataset("rendered_faces/smoke", str(tmp_path), "train")) == 36
    assert not list(tmp_path.glob("rendered_faces/smoke/incomplete.*"))


def children(parent: int) -> list[int]:
    return [int(pid) for task in Path(f"/proc/{parent}/task").glob("*/children") for pid in task.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_celebvhq_reads_labels_text_and_clips(miniature, tmp_path):
    data_dir = str(tmp_path / "packed")
    prepare("celebvhq", str(miniature), data_dir)
    records = {}
    for split, clips in {"train": {"video1_2", "video1_3"}, "heldout": {"video0_0", "video0_1"}}.items():
        source = open_dataset("celebvhq", data_dir, split)
        assert {source[i].id for i in range(len(source))} == clips
        records |= {source[i].id: source[i] for i in range(len(source))}
    second = records["video0_1"]
    named = {vocabulary.VOCABULARY[i] for i in np.flatnonzero(second.attributes)}
    assert named == {"brown_hair", "talk", "fear", "surprise"}
    assert second.targets == {"attributes": "brown hair", "action": "talk", "emotion": "fear, surprise"}
    assert second.source == "video0" and second.labels == {} and second.has_face
    drawn = render(0, "train", 1)
    assert second.clip == drawn.clip and second.summary == drawn.summary
    assert [q.answer for q in second.questions] == [q.answer for q in drawn.questions]
    undescribed = records["video1_3"]
    assert undescribed.source == "video1_3"
    assert Question("What emotion does the person show?", "neutral", "emotion") in undescribed.questions


def test_celebvhq_accepts_a_number_as_the_name_of_a_source_video(miniature):
    edit(miniature, lambda info: info["clips"]["video0_0"].__setitem__("ytb_id", 12))
    path = miniature / "celebvhq_info.json"
    entry = celebvhq.read_annotation(path.read_text(), path)["video0_0"]
    assert celebvhq.read_entry("video0_0", entry, path)["source"] == "12"


def test_celebvhq_keeps_a_source_video_in_one_split_and_never_leaves_train_empty():
    sources = {f"{video}_{part}": f"v{video}" for video in range(400) for part in range(2)}
    sides = celebvhq.splits(sources)
    assert all(sides[f"{video}_0"] == sides[f"{video}_1"] for video in range(400))
    assert 0.01 < list(sides.values()).count("heldout") / len(sides) < 0.1
    assert all("train" in celebvhq.splits({clip: clip}).values() for clip in sources)
    assert celebvhq.splits(sources) == sides


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (
            lambda root: [(root / name).unlink() for name in ("celebvhq_info.json", "qa.jsonl")],
            "celebvhq_info.json: No such file.*name the folder that holds celebvhq_info.json or qa.jsonl",
        ),
        (lambda root: (root / "celebvhq_info.json").write_text("{"), "celebvhq_info.json is not CelebV-HQ's"),
        (lambda root: (root / "clips" / "video0_0.mp4").unlink(), "1 of 4 clips are missing: video0_0; add them"),
        (lambda root: (root / "qa.jsonl").write_text('{"clip": "a"}\n'), "qa.jsonl, line 1"),
        (
            lambda root: edit(root, lambda i: i["clips"]["video0_0"]["attributes"]["appearance"].pop()),
            "clip video0_0: appearance must be 40 labels",
        ),
        (
            lambda root: edit(root, lambda i: i["clips"]["video0_0"]["attributes"]["action"].__setitem__(0, 7)),
            "clip video0_0: action must be 35 labels",
        ),
        (
            lambda root: edit(root, lambda i: i["clips"]["video0_0"]["attributes"].__delitem__("emotion")),
            "clip video0_0 has no attributes",
        ),
        (
            lambda root: edit(root, lambda i: i["clips"]["video0_0"]["attributes"].__setitem__("emotion", "bored")),
            "emotion 'bored'",
        ),
        (
            lambda root: edit(root, lambda i: i["meta_info"].__setitem__("action_mapping", ["nod"])),
            "action_mapping is not CelebV-HQ's",
        ),
        (
            lambda root: edit(root, lambda i: i["meta_info"].__setitem__("action_mapping", [1, 2])),
            "celebvhq_info.json: action_mapping is not CelebV-HQ's",
        ),
        (
            lambda root: edit(root, lambda i: i.__setitem__("meta_info", [1])),
            "celebvhq_info.json is not CelebV-HQ's annotation file",
        ),
        (
            lambda root: edit(root, lambda i: i["clips"]["video0_0"]["attributes"].__setitem__("emotion", 5)),
            "celebvhq_info.json: clip video0_0: emotion must be a name or a list of names, not 5",
        ),
        (
            lambda root: edit(
                root, lambda i: i["clips"]["video0_0"]["attributes"].__setitem__("emotion", {"labels": None})
            ),
            "celebvhq_info.json: clip video0_0: emotion must be a name",
        ),
        (lambda root: edit(root, lambda i: i["clips"].clear()), "celebvhq_info.json: 'clips' is empty"),
        (lambda root: edit(root, lambda i: i["clips"].__setitem__("video0_0", 3)), "clip video0_0 has no attributes"),
    ],
)
def test_the_problem_of_a_bad_celebvhq_folder_is_one_line(miniature, tmp_path, spoil, named):
    spoil(miniature)
    with pytest.raises(UserError, match=named) as error:
        prepare("celebvhq", str(miniature), str(tmp_path / "packed"))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "packed").glob("celebvhq/1*"))


def test_a_data_set_packed_from_other_annotations_is_refused(miniature, tmp_path):
    prepare("celebvhq", str(miniature), str(tmp_path / "packed"))
    assert prepare("celebvhq", None, str(tmp_path / "packed"))  # the source folder is no longer needed
    edit(miniature, lambda info: info["clips"]["video0_0"]["attributes"]["action"].__setitem__(0, 1))
    with pytest.raises(UserError, match="was packed from other files"):
        prepare("celebvhq", str(miniature), str(tmp_path / "packed"))


@pytest.mark.parametrize(
    ("name", "split", "named"),
    [
        ("faces", "train", "'faces' is unknown"),
        ("rendered_faces/huge", "train", "no size 'huge'"),
        ("rendered_faces", "train", "not packed yet"),
        ("rendered_faces/smoke", "test", "no split 'test'"),
    ],
)
def test_an_unknown_data_set_size_or_split_is_named(smoke, name, split, named):
    with pytest.raises(UserError, match=named):
        open_dataset(name, smoke, split)


def test_the_error_about_celebvhqs_missing_folder_names_the_option(tmp_path):
    with pytest.raises(UserError, match="data.root"):
        prepare("celebvhq", None, str(tmp_path))
