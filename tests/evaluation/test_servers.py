"""Models on servers that differ from OpenAI's chat models: options, thoughts, refusals and forms of answers."""

import dataclasses
import json
import re
from collections import Counter

import pytest

from configs.eval import common
from configs.eval import dfew as dfew_config
from favchat_jax.errors import RunError
from favchat_jax.evaluate import evaluate
from favchat_jax.evaluation.config import EvaluationConfig, JudgeConfig, ServerConfig
from favchat_jax.evaluation.footage import Footage
from favchat_jax.evaluation.judge import Judge, Question
from favchat_jax.evaluation.respondents import Ask, OpenAIServer
from favchat_jax.evaluation.result import table
from favchat_jax.evaluation.session import Session
from tests.data.video_files import encode_video
from tests.evaluation.models_for_tests import Scripted, session
from tests.evaluation.servers import asked, serve
from tools import miniatures

CLIP = encode_video(2)
SERVER = ServerConfig.read({**common.get_config("dfew").server.to_dict(), "frames": 2, "size": 16, "retries": 0})
TOKENS = 32


def answered(reply):
    """Asks a server's model 5 questions; returns the session, the answers by question, and the server's requests."""
    asks = [Ask(str(i), (Footage(str(i), CLIP),), ((("Mood?", None),),)) for i in range(5)]
    with serve(reply) as server:
        model = OpenAIServer(f"openai:{server.url}#m", dataclasses.replace(SERVER, parallel=1))
        made = Session(model, batch=4)
        return made, made.ask(asks, TOKENS), server.requests


def message(content, **more):
    return {"message": {"role": "assistant", "content": content, **more}}


def refused(option, message):
    return {"error": {"message": message, "type": "invalid_request_error", "param": option}}


def reasoning(body):
    """Answers like models that take neither `max_tokens` nor a temperature."""
    if "max_tokens" in body:
        return refused("max_tokens", "Unsupported parameter: use 'max_completion_tokens' instead.")
    if body.get("temperature", 1) != 1:
        return refused("temperature", "Unsupported value: only the default (1) is supported.")
    return "happy"


@pytest.mark.parametrize("reply", [reasoning, lambda b: 400 if {"max_tokens", "temperature"} & b.keys() else "happy"])
def test_options_that_a_model_refuses_are_left_out_or_renamed_from_then_on(reply):
    made, answers, requests = answered(reply)
    assert list(answers.values()) == [["happy"]] * 5 and not made.missing
    assert made.respondent.notes == [f"{made.respondent.identity['name']} takes no temperature: its answers are drawn"]
    last = [request for request in requests if "temperature" not in request and "max_tokens" not in request]
    assert len(last) == 5 and {request["max_completion_tokens"] for request in last} == {TOKENS}
    assert len(requests) <= 5 + 2, "the model is not asked again and again with what it refuses"


def test_a_model_that_takes_all_options_has_no_remark():
    made, _, requests = answered(lambda body: "happy")
    assert made.respondent.notes == [] and {request["temperature"] for request in requests} == {0}


def test_a_request_refused_for_its_content_is_not_asked_again():
    seen = []

    def reply(body):
        seen.append(body)
        return refused(None, "Invalid image: it is too small.")

    with pytest.raises(RunError, match="none of 5 samples was answered.*Invalid image"):
        answered(reply)
    assert len(seen) == 5


def test_a_request_that_stays_refused_names_the_first_reason():
    def reply(body):
        return refused("temperature", "no temperature") if "temperature" in body else refused(None, "no context left")

    with pytest.raises(RunError, match="none of 5 samples was answered.*no temperature"):
        answered(reply)


THOUGHT = {"reasoning_content": "The mouth is"}
UNANSWERED = {
    "a thought that used up its tokens": (
        {**message(None, **THOUGHT), "finish_reason": "length"},
        "all tokens went into a thought .*limit is max_new_tokens=32",
    ),
    "a thought in the text": ({**message("<think>The mouth is"), "finish_reason": "length"}, "max_new_tokens=32"),
    "an empty text": (message(""), "the text is empty"),
    "no text": (message(None), "the text is empty"),
    "blanks": (message(" \n"), "the text is empty"),
    "a refusal": (message(None, refusal="I can't identify people."), "refuses to answer: I can't identify people"),
    "a filtered text": ({**message(None), "finish_reason": "content_filter"}, "filter withheld"),
    "a text filtered in the middle": ({**message("hap"), "finish_reason": "content_filter"}, "filter withheld"),
    "no message": ({"message": None}, "not a chat completion"),
    "another form": (message({"text": "happy"}), "not a chat completion"),
}


@pytest.mark.parametrize(("reply", "reason"), UNANSWERED.values(), ids=UNANSWERED)
def test_a_reply_without_an_answer_is_missing(reply, reason):
    seen = Counter()

    def second(body):
        seen["all"] += 1
        return reply if seen["all"] == 2 else "happy"

    made, answers, _ = answered(second)
    assert set(answers) == {"0", "2", "3", "4"}
    assert [row["id"] for row in made.missing] == ["1"] and re.search(reason, made.missing[0]["reason"])


def test_a_missing_answer_makes_the_figures_incomplete_and_is_not_wrong(tmp_path):
    root = miniatures.make("dfew", tmp_path / "dfew", clips=5)
    ours = {"data.root": str(root), "method": "direct", "server": dataclasses.asdict(SERVER) | {"parallel": 1}}
    config = EvaluationConfig.from_ml_collections(dfew_config.get_config()).updated(ours)
    said = iter([message(None, refusal="I can't."), *["I cannot tell."] * 4])
    with serve(lambda body: next(said)) as server:
        result = evaluate(config, model=f"openai:{server.url}#m")
    assert not result["complete"] and (result["n"], len(result["missing"])) == (4, 1)
    assert result["notes"] == ["4 of 4 answers name no single class and count as wrong"]
    assert result["incomparable"] == ["the clips are a miniature of rendered faces"]
    assert table(result).startswith(
        "NOT COMPARABLE with published figures: the clips are a miniature of rendered faces"
    )


PARTS = [{"type": "text", "text": "very "}, {"type": "thinking", "thinking": "sad?"}, {"type": "text", "text": "happy"}]


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (PARTS, "very happy"),
        (["happy"], "happy"),
        ("<think>Sad? Angry?</think>\n\nhappy", "happy"),
        ("angry?</think>happy", "happy"),
        ("happy \ud83d", "happy \ufffd"),
    ],
)
def test_texts_in_parts_after_a_thought_or_with_half_a_character_are_read(content, answer):
    _, answers, _ = answered(lambda body: message(content))
    assert list(answers.values()) == [[answer]] * 5


def test_a_question_with_half_a_character_is_asked_with_a_sign_in_its_place():
    ask = Ask("0", (Footage("0", CLIP),), ((("Mood \ud83d?", None),),))
    with serve(asked) as server:
        model = OpenAIServer(f"openai:{server.url}#m", SERVER)
        assert Session(model, batch=1).ask([ask], TOKENS) == {"0": ["Mood \ufffd?"]}


def test_a_description_goes_on_without_its_thought():
    describer = Scripted(lambda id, question: "<think>Tears?</think>She cries.")
    model = Scripted(lambda id, question: "sad")
    ask = Ask("0", (Footage("0", CLIP),), ((("Mood?", None),),))
    assert session(model, describer=describer).ask([ask], TOKENS) == {"0": ["sad"]}
    assert model.questions == ["Description of the video: She cries.\nMood?"]


@pytest.mark.parametrize(
    "said",
    [
        '<think>Perhaps {"score": 3}? No.</think>{"score": 8}',
        '{"score": 2} was my first thought. My judgement: {"score": 8}',
        message([{"type": "text", "text": '{"score"'}, {"type": "text", "text": ": 8}"}]),
    ],
)
def test_a_judge_may_think_before_its_json(said, tmp_path):
    with serve(lambda body: said) as server:
        ours = {"url": server.url, "model": "m", "cache": str(tmp_path / "cache.jsonl"), "retries": 0}
        judge = Judge(JudgeConfig.read({**common.judge(), **ours}))
        assert judge.scores([Question("0", "qa", {"question": "q?", "reference": "a", "answer": "b"})]) == {"0": 8.0}


def test_a_judge_that_takes_no_temperature_says_so_in_the_result(tmp_path):
    with serve(lambda body: reasoning(body) if "temperature" in body else '{"score": 8}') as server:
        ours = {"url": server.url, "model": "m", "cache": str(tmp_path / "cache.jsonl"), "retries": 0}
        judge = Judge(JudgeConfig.read({**common.judge(), **ours}))
        assert judge.scores([Question("0", "qa", {"question": "q?", "reference": "a", "answer": "b"})]) == {"0": 8.0}
    assert judge.summary()["left_out"] == ["temperature"] and json.dumps(judge.summary())
