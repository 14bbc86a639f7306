"""DFEC, EMER and the held-out questions run on miniature data sets with scripted judges."""

import json
import shutil
from pathlib import Path

import pytest

from configs.eval import common
from configs.eval import dfec as dfec_config
from configs.eval import emer as emer_config
from configs.eval import held_out_qa as qa_config
from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluation.benchmarks import dfec, emer, held_out_qa
from favchat_jax.evaluation.config import EvaluationConfig, JudgeConfig
from favchat_jax.evaluation.judge import Judge
from tests.evaluation.models_for_tests import Scripted, session
from tests.evaluation.servers import asked, serve
from tools import miniatures

BENCHMARKS = {"dfec": (dfec, dfec_config), "emer": (emer, emer_config), "held_out_qa": (held_out_qa, qa_config)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A miniature of each data set with 5 clips."""
    root = tmp_path_factory.mktemp("miniatures")
    return {name: miniatures.make(name, root / name, clips=5) for name in BENCHMARKS}


@pytest.fixture
def broken(folders, tmp_path):
    """Copies a miniature that the test may damage."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def config_of(name: str, root: Path, **changes) -> EvaluationConfig:
    config = EvaluationConfig.from_ml_collections(BENCHMARKS[name][1].get_config())
    return config.updated({"data.root": str(root), **changes})


def judge_at(url: str, tmp_path: Path) -> Judge:
    ours = {"url": url, "model": "m", "cache": str(tmp_path / "cache.jsonl"), "retries": 0}
    return Judge(JudgeConfig.read({**common.judge(), **ours}))


def ideal(body) -> str:
    """A judge that gives full marks, finds one event in each text and says that every event follows."""
    text = asked(body)
    if text.startswith("List the events"):
        return '{"events": ["One thing happens."]}'
    if text.startswith("For each event"):
        return '{"verdicts": ["entailment"]}'
    return json.dumps({"score": 5 if "from 0 (nothing right) to 5" in text else 10})


@pytest.mark.parametrize(
    ("name", "judged"),
    [
        ("dfec", {"correctness": 5, "detail": 5, "context": 5, "temporal": 5, "autodq": 1}),
        ("emer", {"clue_overlap": 10, "label_overlap": 10}),
        ("held_out_qa", {"score": 10}),
    ],
)
def test_answers_are_scored_by_words_and_by_the_judge(name, judged, folders, tmp_path):
    config = config_of(name, folders[name])
    with serve(ideal) as server:
        made = session(Scripted(lambda *_: "a man"), judge=judge_at(server.url, tmp_path))
        result = BENCHMARKS[name][0].run(config, made)
    figures = result["figures"]
    assert {figure: figures[figure]["value"] for figure in judged} == judged
    assert 0 <= figures["rouge_l"]["value"] < 0.5 and {"low", "high"} < set(figures["cider"])
    assert result["complete"] and result["notes"] == [] and result["judge"]["model"] == "m"
    assert all(set(row["scores"]) == {*judged, "cider", "rouge_l"} - {"autodq"} for row in result["samples"])
    printed = [row["figures"] for row in result["published"] if row["model"].startswith("FaVChat")][0]
    assert set(judged) <= set(printed) <= set(figures)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_a_judge_its_figures_are_missing_and_the_result_is_incomplete(name, folders):
    result = BENCHMARKS[name][0].run(config_of(name, folders[name]), session(Scripted(lambda *_: "a man")))
    assert set(result["figures"]) == {"cider", "rouge_l"} and result["judge"] is None
    assert not result["complete"] and "no judge" in result["notes"][0]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_reference_itself_scores_1_in_rouge_l(name, folders):
    config = config_of(name, folders[name])
    empty = BENCHMARKS[name][0].run(config, session(Scripted(lambda *_: "")))
    assert empty["figures"]["rouge_l"]["value"] == 0
    references = {(row["clip"], row["question"]): row["expected"] for row in empty["samples"]}
    by_id = {row["id"]: row["expected"] for row in empty["samples"]}

    def know(id, question):
        return references.get((id.split()[0], question)) or by_id[id]

    result = BENCHMARKS[name][0].run(config, session(Scripted(know)))
    assert result["figures"]["rouge_l"]["value"] == pytest.approx(1)
    assert result["figures"]["cider"]["value"] > 1


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_answer_with_only_invalid_judge_replies_is_not_scored_and_is_noted(name, folders, tmp_path):
    def moody(body):
        return "I would rather not." if "a strange man" in json.dumps(body["messages"][0]) else ideal(body)

    first: list[str] = []

    def say(id, question):
        first.append(id)
        return "a strange man" if id == first[0] and first.count(id) == 1 else "a man"

    with serve(moody) as server:
        made = session(Scripted(say), judge=judge_at(server.url, tmp_path))
        result = BENCHMARKS[name][0].run(config_of(name, folders[name]), made)
    assert not result["complete"] and all("1 answers have no judgement" in note for note in result["notes"])
    unjudged = [row for row in result["samples"] if "unjudged" in row]
    assert [row["answer"] for row in unjudged] == ["a strange man"]
    assert "gave no judgement" in next(iter(unjudged[0]["unjudged"].values()))


def test_a_judge_that_goes_offline_midway_ends_the_run_and_the_next_run_resumes(folders, tmp_path):
    left = [7]

    def tiring(body):
        left[0] -= 1
        return ideal(body) if left[0] >= 0 else 500

    config = config_of("dfec", folders["dfec"])
    with serve(tiring) as server:
        with pytest.raises(RunError, match="does not answer"):
            dfec.run(config, session(Scripted(lambda *_: "a man"), judge=judge_at(server.url, tmp_path)))
        left[0], before = 1000, len(server.requests)
        result = dfec.run(config, session(Scripted(lambda *_: "a man"), judge=judge_at(server.url, tmp_path)))
        assert len(server.requests) - before <= 5 * 4 + 5 * 2 * 2 - 7  # no judged answer is judged again
    assert result["complete"]


def test_an_answer_without_events_has_no_precision(folders, tmp_path):
    with serve(ideal) as server:
        made = session(Scripted(lambda *_: ""), judge=judge_at(server.url, tmp_path))
        result = dfec.run(config_of("dfec", folders["dfec"]), made)
    assert result["figures"]["autodq_precision"]["value"] == 0 == result["figures"]["autodq"]["value"]


class Weighing(Scripted):
    """A model whose loss of a reference is the number of its letters."""

    gives_likelihoods = True

    def losses(self, asks, frames):
        assert len(asks) == len(frames)
        return [[float(len(turns[-1][1])) for turns in ask.conversations] for ask in asks]


def test_the_loss_of_the_references_is_measured_where_a_model_gives_likelihoods(broken):
    root = broken("held_out_qa")
    (root / "clips/00002.mp4").write_bytes(b"")
    result = held_out_qa.run(config_of("held_out_qa", root), session(Weighing(lambda *_: "a man")))
    losses = [row["scores"]["loss"] for row in result["samples"]]
    assert losses == [len(row["expected"]) for row in result["samples"]] and len(set(losses)) > 1
    assert result["figures"]["loss"]["value"] == pytest.approx(sum(losses) / len(losses))
    assert {row["id"] for row in result["missing"]} == {"00002"}


def test_missing_clips_are_listed_and_the_others_scored(broken):
    for name, clip in (
        ("dfec", "DFEW/videos/2.mp4"),
        ("emer", "video/sample_00000002.mp4"),
        ("held_out_qa", "clips/00002.mp4"),
    ):
        root = broken(name)
        (root / clip).unlink()
        result = BENCHMARKS[name][0].run(config_of(name, root), session(Scripted(lambda *_: "a man")))
        assert len(result["missing"]) == 1 and not result["complete"]
        assert len({row["clip"] for row in result["samples"]}) == 4


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        ("dfec", "test.json", None, "lacks its captions: expected test.json .*FacialDynamic"),
        ("dfec", "test.json", "{", "test.json is not valid JSON"),
        ("dfec", "test.json", "[]", "is not a list of captions"),
        ("dfec", "test.json", '[{"id": 1}]', "entry 0: id, video and caption must be text"),
        ("dfec", "test.json", json.dumps([{"id": "1", "video": "v", "caption": "c"}] * 2), "id '1' occurs twice"),
        ("emer", "gt-eng.csv", None, "lacks its annotations: expected gt-eng.csv or final-EMER-reason.csv"),
        ("emer", "gt-eng.csv", "names,emotions\n", "has no column reasons"),
        ("held_out_qa", "qa.jsonl", None, "lacks its questions: expected qa.jsonl"),
        ("held_out_qa", "qa.jsonl", "{\n", "line 1 is not JSON"),
        ("held_out_qa", "qa.jsonl", '{"clip": "a", "video": "v"}', "line 1 (must have|has neither)"),
        ("held_out_qa", "qa.jsonl", "", "holds no questions"),
        (
            "held_out_qa",
            "qa.jsonl",
            '{"clip": "a", "video": "v", "qa": [{"q": "\\ud83d", "a": "b"}]}',
            "line 1: a text holds half of a surrogate pair",
        ),
        ("held_out_qa", "qa.jsonl", "\ufeff\n".encode("utf-16"), "line 1 is not UTF-8 text: save the file as UTF-8"),
    ],
)
def test_malformed_annotations_are_refused_with_the_file_and_the_problem(name, file, content, says, broken):
    root = broken(name)
    (root / file).unlink() if content is None else (root / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(UserError, match=says):
        BENCHMARKS[name][0].run(config_of(name, root), session(Scripted(lambda *_: "")))


def test_emers_second_version_is_read_if_the_first_is_missing(broken):
    root = broken("emer")
    (root / "gt-eng.csv").unlink()
    (root / "final-EMER-reason.csv").write_text(
        'name,chinese,english\nsample_00000001,"笑","He smiles, ""so"" happy."\n'
    )
    result = emer.run(config_of("emer", root), session(Scripted(lambda *_: "he smiles")))
    assert [row["expected"] for row in result["samples"]] == ['He smiles, "so" happy.']


def test_the_seed_decides_which_questions_within_the_limit_are_drawn(folders):
    def questions(limit, seed):
        config = config_of("held_out_qa", folders["held_out_qa"], limit=limit, seed=seed)
        rows = held_out_qa.run(config, session(Scripted(lambda *_: "")))["samples"]
        return [(row["clip"], row["question"]) for row in rows]

    everything = questions(0, 0)
    assert questions(7, 0) == questions(7, 0) != questions(7, 1)
    assert len(questions(7, 1)) == 7 and set(questions(7, 1)) <= set(everything) and questions(2000, 0) == everything


def test_lines_of_one_clip_are_joined_and_only_line_feeds_end_them(broken):
    root = broken("held_out_qa")
    first = json.loads((root / "qa.jsonl").read_text().splitlines()[0])
    questions = [{"q": f"{number}?\u2028", "a": "yes"} for number in range(2)]
    lines = [json.dumps({**first, "qa": [one]}, ensure_ascii=False) for one in questions]
    (root / "qa.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    config = config_of("held_out_qa", root)
    rows = held_out_qa.run(config, session(Scripted(lambda *_: "")))["samples"]
    assert [row["question"] for row in rows] == ["0?\u2028", "1?\u2028"]
    (root / "qa.jsonl").write_text("\n".join([lines[0], lines[1].replace('"video": "', '"video": "x')]))
    with pytest.raises(UserError, match="line 2: clip '00001' has another video than in line 1"):
        held_out_qa.run(config, session(Scripted(lambda *_: "")))
