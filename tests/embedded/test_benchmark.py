"""The embedded benchmark scores hand-made answers correctly and assigns each answer to its question."""

import numpy as np
import pytest

from configs.eval import rendered as rendered_config
from favchat_jax.data.record import Question, Record
from favchat_jax.embedded import benchmark as rendered
from favchat_jax.errors import UserError
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.session import Session


def answer(clip, kind, expected, said):
    return {"id": f"{clip} {kind}", "clip": clip, "kind": kind, "question": "?", "expected": expected, "answer": said}


ANSWERS = [
    answer("a", "hair", "black", "Black."),
    answer("a", "mole", "no", "yes"),
    answer("b", "hair", "black", "gray"),
    answer("b", "mole", "yes", "yes"),
    answer("c", "hair", "gray", "gray"),
    answer("c", "hair", "blonde", "blonde"),
]


def test_the_score_of_six_answers_matches_the_count_by_hand():
    result = rendered.score(ANSWERS)
    assert result["n"] == 6
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["by_kind"] == {
        "hair": {"n": 4, "accuracy": 0.75, "majority_baseline": 0.5},
        "mole": {"n": 2, "accuracy": 0.5, "majority_baseline": 0.5},
    }
    found = result["figures"]["accuracy"]
    assert found["value"] == pytest.approx(4 / 6) and found["low"] < 4 / 6 < found["high"] and found["scale"] == 100
    assert result["groups"]["mole"]["figures"]["accuracy"]["value"] == 0.5
    # The most frequent answer is right for two of four questions about hair and one of two about moles.
    assert result["majority_baseline"] == pytest.approx(3 / 6)


def test_every_answer_is_kept_with_its_correctness():
    kept = rendered.score(ANSWERS)["samples"]
    assert [row.pop("correct") for row in kept] == [True, False, False, True, True, True]
    assert [row.pop("predicted") for row in kept][:2] == ["black", "yes"]
    assert kept == ANSWERS


def record(number, questions):
    asked = tuple(Question(f"{number}.{i}?", f"answer {number}.{i}", f"kind {i}") for i in range(questions))
    return Record(f"clip {number}", bytes([number]), np.zeros(83, np.uint8), "", asked, {}, f"source {number}", True)


class Repeating:
    """A sampler that answers with the clip's first byte and the question, and records the shapes of its batches."""

    frames, image_size = 2, 8

    def __init__(self):
        self.shapes = []

    def encode(self, frames):
        return frames

    def answer(self, features, conversations, sampling):
        assert len(features) == len(conversations)
        self.shapes.append((len(features), max(len(asked) for asked in conversations)))
        return [
            [f"{clip[0, 0, 0, 0]} {turns[-1][0]}" for turns in asked]
            for clip, asked in zip(features, conversations, strict=True)
        ]


@pytest.fixture
def config():
    return EvaluationConfig.from_ml_collections(rendered_config.get_config()).updated({"batch": 2})


@pytest.fixture
def five_records(monkeypatch):
    """Clips with 4, 2, 3, 4 and 1 questions; all pixels of a clip have the value of its only byte."""
    records = [record(number, questions) for number, questions in enumerate((4, 2, 3, 4, 1))]

    class Clip:
        def __init__(self, data, *, frames, size, **_):
            self.frames, self.tracks = np.full((frames, size, size, 3), data[0], np.uint8), None

    monkeypatch.setattr(rendered, "prepare", lambda *_: "nowhere")
    monkeypatch.setattr(rendered, "open_dataset", lambda *_: records)
    monkeypatch.setattr("favchat_jax.evaluation.footage.decode", Clip)
    return records


def test_each_question_of_each_clip_is_answered_once_with_its_own_answer(config, five_records):
    answers = rendered.run(config, Session.of(Repeating(), config))["samples"]
    assert [row["question"] for row in answers] == [q.question for r in five_records for q in r.questions]
    for row in answers:
        number = row["clip"].removeprefix("clip ")
        assert row["answer"] == f"{number} {row['question']}"
        assert row["expected"] == f"answer {row['question'].removesuffix('?')}"


def test_all_batches_have_one_shape(config, five_records):
    sampler = Repeating()
    rendered.run(config, Session.of(sampler, config))
    assert sampler.shapes == [(2, 4)] * 3


def test_the_limit_counts_clips(config, five_records):
    answers = rendered.run(config.updated({"limit": 3}), Session.of(Repeating(), config))["samples"]
    assert {row["clip"] for row in answers} == {"clip 0", "clip 1", "clip 2"}


def test_clips_without_questions_are_skipped(config, five_records):
    five_records.insert(1, record(9, questions=0))
    assert rendered.run(config, Session.of(Repeating(), config))["n"] == 14


def test_a_split_without_questions_is_refused(config, five_records):
    five_records.clear()
    with pytest.raises(UserError, match="split heldout of rendered_faces has no questions"):
        rendered.run(config, Session.of(Repeating(), config))
