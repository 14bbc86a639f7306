"""DFEW and MAFW run on miniatures in their published layouts, and refuse malformed folders."""

import shutil
from pathlib import Path

import pytest

from configs.eval import dfew as dfew_config
from configs.eval import mafw as mafw_config
from favchat_jax.errors import UserError
from favchat_jax.evaluation.benchmarks import dfew, mafw
from favchat_jax.evaluation.config import EvaluationConfig
from tests.evaluation.models_for_tests import Scripted, session
from tools import miniatures

BENCHMARKS = {"dfew": (dfew, dfew_config), "mafw": (mafw, mafw_config)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A miniature of each data set with 10 clips in five folds."""
    root = tmp_path_factory.mktemp("miniatures")
    return {name: miniatures.make(name, root / name, clips=10) for name in BENCHMARKS}


def config_of(name: str, root: Path, **changes) -> EvaluationConfig:
    config = EvaluationConfig.from_ml_collections(BENCHMARKS[name][1].get_config())
    return config.updated({"data.root": str(root), **changes})


def evaluated(name: str, config: EvaluationConfig, model: Scripted) -> dict:
    return BENCHMARKS[name][0].run(config, session(model))


def truth(name: str, config: EvaluationConfig) -> dict[str, str]:
    """The label of each clip by its id."""
    result = evaluated(name, config, Scripted(lambda *_: ""))
    return {row["id"]: row["expected"] for row in result["samples"]}


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("method", ["describe", "direct", "likelihood"])
def test_a_model_that_knows_the_label_reaches_100_in_every_fold(name, method, folders):
    config = config_of(name, folders[name], method=method)
    labels = truth(name, config_of(name, folders[name], method="direct"))
    result = evaluated(name, config, Scripted(lambda id, question: labels[id]))
    assert result["n"] == 10 and result["complete"]
    assert {figure: found["value"] for figure, found in result["figures"].items()} == {"uar": 1.0, "war": 1.0}
    assert list(result["groups"]) == [f"fold {fold}" for fold in range(1, 6)]
    assert all(part["n"] == 2 for part in result["groups"].values())
    assert all(row["correct"] for row in result["samples"])
    assert ("description" in result["samples"][0]) == (method == "describe")
    assert ("likelihood" in result["samples"][0]) == (method == "likelihood")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_answers_without_a_class_count_as_wrong_and_are_noted(name, folders):
    result = evaluated(name, config_of(name, folders[name]), Scripted(lambda *_: "I cannot tell."))
    assert result["figures"]["war"]["value"] == 0
    assert result["notes"] == ["10 of 10 answers name no single class and count as wrong"]
    assert sum(row[-1] for row in result["confusion"]["counts"]) == 10
    assert {(row["answer"], row["predicted"], row["correct"]) for row in result["samples"]} == {
        ("I cannot tell.", None, False)
    }


def test_the_description_is_an_earlier_turn_of_the_question_about_the_emotion(folders):
    class Listening(Scripted):
        def answer(self, asks, frames, max_new_tokens):
            heard.extend(ask.conversations[0] for ask in asks)
            return super().answer(asks, frames, max_new_tokens)

    heard: list = []
    config = config_of("dfew", folders["dfew"], limit=1, folds=(1,))
    evaluated("dfew", config, Listening(lambda id, question: "A smiling man." if "Describe" in question else "happy"))
    assert heard[0] == ((config.describe, None),)
    question = config.question.format(classes="happy, sad, neutral, angry, surprise, disgust, fear")
    assert heard[1] == ((config.describe, "A smiling man."), (question, None))


def test_a_clip_without_a_description_is_asked_about_directly(folders):
    model = Scripted(lambda id, question: "" if "Describe" in question else "happy")
    result = evaluated("dfew", config_of("dfew", folders["dfew"]), model)
    assert result["n"] == 10 and {row["description"] for row in result["samples"]} == {""}


def test_figures_are_means_over_folds_and_come_with_the_published_ones(folders):
    result = evaluated("dfew", config_of("dfew", folders["dfew"]), Scripted(lambda *_: "happy"))
    folds = [part["figures"]["war"]["value"] for part in result["groups"].values()]
    assert result["figures"]["war"]["value"] == pytest.approx(sum(folds) / 5)
    ours = {row["model"]: row["figures"] for row in result["published"]}
    assert ours["FaVChat"] == {"uar": 68.17, "war": 77.88} and ours["FaVChat v2"] == {"uar": 70.01, "war": 79.79}
    mafw = evaluated("mafw", config_of("mafw", folders["mafw"]), Scripted(lambda *_: "anger"))
    ours = {row["model"]: row["figures"] for row in mafw["published"]}
    assert ours["FaVChat"] == {"uar": 49.07, "war": 60.97} and "Emotion-LLaMA" not in ours


@pytest.fixture
def broken(folders, tmp_path):
    """Copies a miniature that the test may damage."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_clip_is_listed_and_the_others_are_classified(name, broken):
    root = broken(name)
    next(root.rglob("*3.mp4")).unlink()
    result = evaluated(name, config_of(name, root), Scripted(lambda *_: "happy"))
    assert (result["n"], result["complete"]) == (9, False)
    assert [row["id"] for row in result["missing"]] == [{"dfew": "3", "mafw": "00003"}[name]]
    assert "its clip is not in" in result["missing"][0]["reason"]


def test_a_damaged_clip_is_listed_and_the_others_are_classified(broken):
    root = broken("dfew")
    (root / "Clip" / "original" / "4.mp4").write_bytes(b"")
    result = evaluated("dfew", config_of("dfew", root), Scripted(lambda *_: "happy"))
    assert (result["n"], result["complete"], result["missing"][0]["id"]) == (9, False, "4")


@pytest.mark.parametrize(
    ("name", "gone", "says"),
    [
        (
            "dfew",
            "EmoLabel_DataSplit/test(single-labeled)/set_3.csv",
            "lacks fold 3: expected .*set_3.csv or .*dfew-data",
        ),
        (
            "mafw",
            "Train & Test Set/single/no_caption/set_2/test.txt",
            "lacks fold 2: expected .*set_2/test.txt .*mafw-data",
        ),
    ],
)
def test_the_error_about_a_missing_fold_file_says_where_to_get_it(name, gone, says, broken):
    root = broken(name)
    (root / gone).unlink()
    with pytest.raises(UserError, match=says):
        evaluated(name, config_of(name, root), Scripted(lambda *_: ""))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("video_name,label\n1,8\n", "set_1.csv, line 2: label '8' is not a number from 1 to 7"),
        ("video_name,label\n1,0\n", "line 2: label '0' is not a number from 1 to 7"),
        ("video_name,label\n1,happy\n", "line 2: label 'happy' is not a number from 1 to 7"),
        ("video_name,label\none,1\n", "line 2: video_name 'one' is not a number"),
        ("video_name,label\n1\n", "line 2: fewer than 2 fields"),
        ("name,label\n1,1\n", "has no column video_name: its first line must name video_name, label"),
        ("", "has no column video_name"),
        (b"\xff\xfe\x00", "cannot be read as CSV"),
    ],
)
def test_a_malformed_fold_of_dfew_is_refused_with_its_line(content, says, broken):
    root = broken("dfew")
    path = root / "EmoLabel_DataSplit" / "test(single-labeled)" / "set_1.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says):
        evaluated("dfew", config_of("dfew", root), Scripted(lambda *_: ""))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("00001.mp4 joy", "line 1: label 'joy' is not one of anger"),
        ("00001.mp4", "line 1: expected a clip and its label"),
        ("00001 anger", "line 1: expected a clip and its label"),
        (b"00001.mp4 anger\n\xd6\xd0.mp4 anger", "line 2 is not UTF-8 text"),
    ],
)
def test_a_malformed_fold_of_mafw_is_refused_with_its_line(line, says, broken):
    root = broken("mafw")
    path = root / "Train & Test Set" / "single" / "no_caption" / "set_1" / "test.txt"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(UserError, match=says):
        evaluated("mafw", config_of("mafw", root), Scripted(lambda *_: ""))


@pytest.mark.parametrize("parts", [("Train _ Test Set", "data/clips"), ("Labels", "data/clips/unzip"), (".", "clips")])
def test_mafw_is_read_under_other_names_of_its_folders_and_with_byte_order_marks(parts, broken):
    root = broken("mafw")
    lists, clips = (root / part for part in parts)
    for path in (root / "Train & Test Set").rglob("test.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    lists.mkdir(exist_ok=True)
    (root / "Train & Test Set" / "single").rename(lists / "single")
    (root / "data" / "clips").rename(root / "all")
    clips.parent.mkdir(parents=True, exist_ok=True)
    (root / "all").rename(clips)
    result = evaluated("mafw", config_of("mafw", root), Scripted(lambda *_: "anger"))
    assert (result["n"], result["missing"]) == (10, [])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_root_that_is_not_set_or_not_a_folder_is_refused(name, tmp_path):
    for root, says in (
        ("", "data.root=DIR is not set: give the folder that holds"),
        (tmp_path / "no", "is not a folder"),
    ):
        with pytest.raises(UserError, match=says):
            evaluated(name, config_of(name, root), Scripted(lambda *_: ""))


def test_an_unknown_method_is_refused(folders):
    with pytest.raises(UserError, match="method=guess is unknown: choose one of describe, direct, likelihood"):
        evaluated("dfew", config_of("dfew", folders["dfew"], method="guess"), Scripted(lambda *_: ""))


def test_dfews_other_published_layout_and_folders_of_frames_are_also_read(folders, tmp_path):
    import cv2

    from favchat_jax.data.video import decode

    (tmp_path / "label").mkdir()
    for fold in range(1, 6):
        source = folders["dfew"] / "EmoLabel_DataSplit" / "test(single-labeled)" / f"set_{fold}.csv"
        shutil.copy(source, tmp_path / "label" / f"single_testset_{fold}.csv")
    for number in range(1, 11):
        folder = tmp_path / "data" / f"{number:05d}"
        folder.mkdir(parents=True)
        clip = folders["dfew"] / "Clip" / "original" / f"{number}.mp4"
        for i, frame in enumerate(decode(clip, frames=3, size=32).frames, 1):
            cv2.imwrite(str(folder / f"{number:05d}_{i:05d}.jpg"), frame)
    result = evaluated("dfew", config_of("dfew", tmp_path), Scripted(lambda *_: "happy"))
    assert (result["n"], result["complete"]) == (10, True)
