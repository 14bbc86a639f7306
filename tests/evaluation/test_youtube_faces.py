"""Face verification on a miniature of YouTube Faces: its pairs, figures and ROC curve."""

import shutil

import pytest

from configs.eval import youtube_faces as config_module
from favchat_jax.errors import UserError
from favchat_jax.evaluation.benchmarks import youtube_faces
from favchat_jax.evaluation.config import EvaluationConfig
from tests.evaluation.models_for_tests import Scripted, session
from tools import miniatures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A miniature of 6 people with two videos of 8 frames each."""
    return miniatures.make("youtube_faces", tmp_path_factory.mktemp("miniature") / "ytf", clips=6)


def config_of(root, **changes):
    config = EvaluationConfig.from_ml_collections(config_module.get_config())
    return config.updated({"data.root": str(root), "segment": 4, **changes})


def knows(id: str, question: str) -> str:
    """Returns the right answer, since pairs are named after their people."""
    one, other = id.split()
    return "Yes" if one.split("/")[0] == other.split("/")[0] else "No"


@pytest.mark.parametrize("pairs", ["segments", "splits"])
@pytest.mark.parametrize("method", ["direct", "likelihood"])
def test_a_model_with_only_right_answers_reaches_accuracy_1_and_auc_1(pairs, method, folder):
    result = youtube_faces.run(config_of(folder, pairs=pairs, method=method), session(Scripted(knows)))
    assert result["n"] == 12 and result["complete"]
    assert {name: found["value"] for name, found in result["figures"].items()} == {"accuracy": 1.0, "auc": 1.0}
    assert result["curves"]["roc"]["y"][-1] == 1.0
    assert {row["predicted"] for row in result["samples"]} == {"yes", "no"}


def test_each_person_is_in_one_pair_with_themselves_and_two_with_others(folder):
    rows = youtube_faces.run(config_of(folder), session(Scripted(knows)))["samples"]
    people = [f"Person_{i:04d}" for i in range(1, 7)]
    same = [row["id"].split() for row in rows if row["expected"] == "yes"]
    different = [row["id"].split() for row in rows if row["expected"] == "no"]
    assert sorted(same) == [[name, name] for name in people]
    assert sorted(one for one, _ in different) == sorted(other for _, other in different) == people
    assert all(one != other for one, other in different)


def test_segments_come_from_two_videos_or_from_both_ends_of_one(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "ytf")
    shutil.rmtree(root / "frame_images_DB" / "Person_0002" / "1")
    seen = {}

    class Looking(Scripted):
        def prepare(self, ask):
            seen[ask.id] = ask.clips
            return super().prepare(ask)

    youtube_faces.run(config_of(root), session(Looking(knows)))
    clips = {id: [(clip.content.name, clip.first, clip.count) for clip in pair] for id, pair in seen.items()}
    assert clips["Person_0001 Person_0001"] == [("0", 0, 4), ("1", 0, 4)]
    assert clips["Person_0002 Person_0002"] == [("0", 0, 4), ("0", 4, 4)]


def test_always_yes_is_right_for_half_of_the_pairs_and_answers_without_yes_or_no_for_none(folder):
    figures = youtube_faces.run(config_of(folder), session(Scripted(lambda *_: "Yes.")))["figures"]
    assert (figures["accuracy"]["value"], figures["auc"]["value"]) == (0.5, 0.5)
    result = youtube_faces.run(config_of(folder), session(Scripted(lambda *_: "Hard to tell.")))
    assert result["figures"]["accuracy"]["value"] == 0
    assert result["notes"] == ["12 of 12 answers say neither yes nor no and count as wrong"]


def test_a_model_with_a_describer_is_compared_with_the_tables_second_column(folder):
    alone = youtube_faces.run(config_of(folder), session(Scripted(knows)))
    made = session(Scripted(knows), describer=Scripted(lambda *_: "a face"))
    described = youtube_faces.run(config_of(folder), made)
    assert {row["model"]: row["figures"]["accuracy"] for row in alone["published"]}["GPT-4o"] == 71.29
    assert {row["model"]: row["figures"]["accuracy"] for row in described["published"]}["GPT-4o"] == 93.61


def test_a_pair_with_a_missing_clip_is_listed_and_the_others_are_asked(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "ytf")
    shutil.rmtree(root / "frame_images_DB" / "Person_0003" / "0")
    result = youtube_faces.run(config_of(root, pairs="splits"), session(Scripted(knows)))
    assert (result["n"], result["complete"], len(result["missing"])) == (10, False, 2)


@pytest.mark.parametrize("header", [True, False])
def test_splits_are_read_with_and_without_a_header_line(header, folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "ytf")
    if not header:
        lines = (root / "splits.txt").read_text().splitlines(keepends=True)
        (root / "splits.txt").write_text("".join(lines[1:]))
    result = youtube_faces.run(config_of(root, pairs="splits"), session(Scripted(knows)))
    assert result["n"] == 12 and list(result["groups"]) == [f"split {i}" for i in range(1, 7)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pairs": "some"}, "pairs=some is unknown: choose one of segments, splits"),
        ({"method": "guess"}, "method=guess is unknown: choose one of describe, direct, likelihood"),
        ({"method": "describe"}, "method=describe is not for pairs: choose direct or likelihood"),
    ],
)
def test_unknown_settings_are_refused(changes, says, folder):
    with pytest.raises(UserError, match=says):
        youtube_faces.run(config_of(folder, **changes), session(Scripted(knows)))


def test_folders_that_lack_frames_or_pairs_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="lacks its frames: expected frame_images_DB .*ytfaces"):
        youtube_faces.run(config_of(tmp_path), session(Scripted(knows)))
    (tmp_path / "frame_images_DB").mkdir()
    with pytest.raises(UserError, match="holds 0 people, but pairs need two"):
        youtube_faces.run(config_of(tmp_path), session(Scripted(knows)))
    with pytest.raises(UserError, match="lacks its pairs: expected splits.txt"):
        youtube_faces.run(config_of(tmp_path, pairs="splits"), session(Scripted(knows)))
    (tmp_path / "splits.txt").write_text("1, 1, A/0, A/1, 2\n")
    with pytest.raises(UserError, match="splits.txt, line 1: expected part, number, two clips and 0 or 1"):
        youtube_faces.run(config_of(tmp_path, pairs="splits"), session(Scripted(knows)))
    (tmp_path / "splits.txt").write_text("1, 1, A/0, A/1, 1\n")
    with pytest.raises(UserError, match="holds none of the 1 pairs"):
        youtube_faces.run(config_of(tmp_path, pairs="splits"), session(Scripted(knows)))


def test_what_computers_and_editors_add_changes_no_pair(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "ytf")
    images = root / "frame_images_DB"
    for hidden in (images / "@eaDir" / "0", images / ".Trash" / "1", images / "Person_0001" / "@eaDir"):
        hidden.mkdir(parents=True)
        (hidden / "0.1.jpg").write_bytes(b"x")
    lines = (root / "splits.txt").read_text().splitlines(keepends=True)
    (root / "splits.txt").write_text("".join(lines[1:]), encoding="utf-8-sig")  # without the header
    for pairs in ("segments", "splits"):
        result = youtube_faces.run(config_of(root, pairs=pairs), session(Scripted(knows)))
        assert (result["n"], result["complete"]) == (12, True)
