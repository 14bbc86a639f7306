"""The judge: its questions, valid and invalid replies, its cache, and servers that fail."""

import json

import pytest

from configs.eval import common
from favchat_jax import openai_client
from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluation.config import JudgeConfig
from favchat_jax.evaluation.judge import PROMPT_VERSION, Judge, Question, agreement
from favchat_jax.evaluation.respondents import Unanswered
from tests.evaluation.servers import asked, serve

QA = [Question(str(i), "qa", {"question": f"q{i}?", "reference": "a", "answer": f"b{i}"}) for i in range(5)]


def config(url, tmp_path, **changes) -> JudgeConfig:
    ours = {"url": url, "model": "m", "cache": str(tmp_path / "cache.jsonl"), "retries": 0}
    return JudgeConfig.read({**common.judge(), **ours, **changes})


def test_scores_come_back_by_question_and_are_asked_at_temperature_0(tmp_path):
    with serve(lambda body: json.dumps({"score": int(asked(body).split("Answer: b")[1][0])})) as server:
        judge = Judge(config(server.url, tmp_path, price_in=2.0, price_out=10.0))
        assert judge.scores(QA) == {str(i): float(i) for i in range(5)}
    assert all(body["temperature"] == 0 and body["model"] == "m" for body in server.requests)
    summary = judge.summary()
    assert (summary["model"], summary["url"], summary["prompt_version"]) == ("m", server.url, PROMPT_VERSION)
    assert summary["tokens"] == {"in": 50, "out": 25}
    assert summary["cost"] == pytest.approx((50 * 2 + 25 * 10) / 1e6)


def test_nothing_is_asked_twice_not_even_by_another_process(tmp_path):
    with serve(lambda body: '{"score": 7}') as server:
        first = Judge(config(server.url, tmp_path))
        assert first.scores(QA) == Judge(config(server.url, tmp_path)).scores(QA)
        assert len(server.requests) == len(QA)
        again = Judge(config(server.url, tmp_path))
        again.scores(QA)
        assert again.summary() == first.summary()


def test_a_torn_line_in_the_cache_is_asked_again(tmp_path):
    with serve(lambda body: '{"score": 7}') as server:
        Judge(config(server.url, tmp_path)).scores(QA)
        cache = tmp_path / "cache.jsonl"
        cache.write_text(cache.read_text()[:-20])
        assert Judge(config(server.url, tmp_path)).scores(QA) == {str(i): 7.0 for i in range(5)}
        assert len(server.requests) == len(QA) + 1


@pytest.mark.parametrize(
    "reply",
    ['{"score": 6}', '```json\n{"score": 6.0}\n```', 'Here is my judgement: {"score": 6} I hope it helps.'],
)
def test_json_is_found_in_a_code_fence_and_within_a_sentence(reply, tmp_path):
    with serve(lambda body: reply) as server:
        assert Judge(config(server.url, tmp_path)).scores(QA[:1]) == {"0": 6.0}


NONSENSE = [
    "I cannot judge that.",
    "",
    '{"score": "six"}',
    '{"score": 11}',
    '{"score": true}',
    '{"mark": 6}',
    "{",
    "[6]",
]


@pytest.mark.parametrize("reply", NONSENSE)
def test_an_invalid_reply_is_requested_again(reply, tmp_path):
    said = iter([reply, '{"score": 4}'])
    with serve(lambda body: next(said)) as server:
        assert Judge(config(server.url, tmp_path)).scores(QA[:1]) == {"0": 4.0}
    assert "That will not do" in asked(server.requests[1])


@pytest.mark.parametrize("reply", NONSENSE)
def test_an_answer_with_only_invalid_replies_stays_unjudged(reply, tmp_path):
    with serve(lambda body: reply) as server:
        said = Judge(config(server.url, tmp_path)).scores(QA[:1])["0"]
    assert isinstance(said, Unanswered) and "gave no judgement" in str(said)
    assert len(server.requests) == 3


def test_a_request_that_the_server_refuses_leaves_the_answer_unjudged_and_others_judged(tmp_path):
    with serve(lambda body: 400 if "q1?" in asked(body) else '{"score": 5}') as server:
        said = Judge(config(server.url, tmp_path)).scores(QA)
    assert isinstance(said.pop("1"), Unanswered) and set(said.values()) == {5.0}


def test_a_busy_server_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(openai_client, "FIRST_PAUSE", 0.01)
    said = iter([503, 429, '{"score": 5}'])
    with serve(lambda body: next(said)) as server:
        assert Judge(config(server.url, tmp_path, retries=2)).scores(QA[:1]) == {"0": 5.0}


def test_a_judge_that_goes_offline_midway_ends_the_run_and_its_replies_are_kept(tmp_path):
    with serve(lambda body: '{"score": 5}') as server:
        Judge(config(server.url, tmp_path)).scores(QA[:3])
    section = config(server.url, tmp_path)
    with pytest.raises(RunError, match="does not answer .*: all answers so far are kept, run the same command"):
        Judge(section).scores(QA)
    assert Judge(section).scores(QA[:3]) == {"0": 5.0, "1": 5.0, "2": 5.0}


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (401, r"/v1 refuses the key \(HTTP 401\): set OPENAI_API_KEY to a valid one"),
        (403, r"/v1 refuses the key \(HTTP 403\): set OPENAI_API_KEY to a valid one"),
        (404, r"/v1 has no chat completions with model 'm' \(HTTP 404\): check the address"),
    ],
)
def test_a_wrong_key_or_model_is_a_user_error(status, line, tmp_path):
    with serve(lambda body: status) as server, pytest.raises(UserError, match=line):
        Judge(config(server.url, tmp_path)).scores(QA[:1])


def test_the_key_is_sent_and_shown_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGES_KEY", "sk-not-to-be-seen")
    said = iter(["sk-not-to-be-seen", '{"score": 5}', 400])
    with serve(lambda body: next(said)) as server:
        judge = Judge(config(server.url, tmp_path, key_variable="JUDGES_KEY"))
        assert judge.scores(QA[:1]) == {"0": 5.0}
        assert str(judge.scores(QA[1:2])["1"]) == "the server refused the request: HTTP 400: no"
    assert server.keys == ["Bearer sk-not-to-be-seen"] * 3 and "sk-not" not in json.dumps(judge.summary())


def test_a_server_needs_no_key_but_a_valid_address(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve(lambda body: '{"score": 5}') as server:
        assert Judge(config(server.url, tmp_path)).scores(QA[:1]) == {"0": 5.0}
    for url in ("localhost:8000/v1", "http://[::8000/v1"):
        with pytest.raises(UserError, match="must be (an|the http:// or https://) address"):
            Judge(config(url, tmp_path))


def test_a_response_that_is_not_a_chat_completion_leaves_the_answer_unjudged(tmp_path):
    with serve(lambda body: b"<html>") as server:
        said = Judge(config(server.url, tmp_path)).scores(QA[:1])["0"]
    assert isinstance(said, Unanswered) and str(said) == "the reply is not a chat completion"


def test_a_reply_must_have_one_verdict_per_event(tmp_path):
    question = Question("0", "entailment", {"text": "t", "events": "1. a\n2. b"}, count=2)
    said = iter(['{"verdicts": ["neutral"]}', '{"verdicts": ["entailment", "contradiction"]}'])
    with serve(lambda body: next(said)) as server:
        assert Judge(config(server.url, tmp_path)).ask([question]) == {"0": [True, False]}


def test_a_second_judge_gets_the_same_questions_and_their_agreement_is_reported(tmp_path):
    with (
        serve(lambda body: json.dumps({"score": int(asked(body).split("Answer: b")[1][0])})) as one,
        serve(lambda body: json.dumps({"score": int(asked(body).split("Answer: b")[1][0]) + 1})) as other,
    ):
        judge = Judge(config(one.url, tmp_path), Judge(config(other.url, tmp_path)))
        assert judge.scores(QA) == {str(i): float(i) for i in range(5)}
        found = judge.summary()["agreement"]
    assert (found["n"], found["mean_distance"], found["with"]["url"]) == (5, 1.0, other.url)
    assert found["pearson"] == pytest.approx(1) and 0 < found["kappa"] < 1


def test_agreement_is_1_for_equal_scores_and_unknown_without_variation():
    assert agreement([1, 5, 9], [1, 5, 9])["kappa"] == pytest.approx(1)
    assert agreement([5, 5], [5, 5]) == {"n": 2, "pearson": None, "kappa": None, "mean_distance": 0.0}
    assert agreement([], []) == {"n": 0, "pearson": None, "kappa": None, "mean_distance": None}
