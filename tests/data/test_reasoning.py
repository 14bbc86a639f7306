"""Tests the format, the content and the variety of the cold start's responses."""

import numpy as np
import pytest

from favchat_jax.data import reasoning
from favchat_jax.data.record import Record
from favchat_jax.rl.rewards import FORM, facial_score

TARGETS = {"attributes": "long black hair glasses pale skin", "emotion": "happy", "action": "nodding"}


def record(targets=TARGETS, has_face=True):
    return Record("clip", b"", np.zeros(83, np.uint8), "", (), targets, "source", has_face)


def responses(count=60, **of):
    rng = np.random.default_rng(0)
    return [reasoning.response(record(**of), rng) for _ in range(count)]


def test_every_response_is_a_thought_and_an_answer():
    assert all(FORM.fullmatch(text) for text in responses())


def test_responses_contain_only_words_of_the_targets_and_some_contain_all():
    known = set(" ".join(TARGETS.values()).split()) | {"The", "person", "looks", "is", "has", "and"}
    answers = [FORM.fullmatch(text).group(2) for text in responses()]
    assert all(set(answer.replace(",", "").replace(".", "").split()) <= known for answer in answers)
    scores = [facial_score(answer, TARGETS) for answer in answers]
    assert max(scores) == pytest.approx(1) and min(scores) < 0.4, "some responses are better than others"


def test_responses_depend_only_on_the_random_generator():
    assert responses() == responses()
    assert len(set(responses())) > 20


def test_a_single_attribute_is_always_part_of_the_response():
    texts = responses(8, targets={**TARGETS, "attributes": "hat"})
    assert all("<think> hat, nodding </think>" in text for text in texts)


@pytest.mark.parametrize(
    ("of", "possible"),
    [
        ({}, True),
        ({"has_face": False}, False),
        ({"targets": {**TARGETS, "emotion": ""}}, False),
        ({"targets": {"attributes": "hat"}}, False),
    ],
)
def test_only_faces_with_all_three_targets_have_responses(of, possible):
    assert reasoning.has_face_and_targets(record(**of)) is possible


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>black</think> <answer> happy </answer>", "happy"),
        ("<think>black</think> <answer>happy and cut", "happy and cut"),
        ("<think>black</think> <answer>\nhappy\n and sad</answer> so", "happy\n and sad"),
        (" happy ", "happy"),
        ("<answer></answer>", ""),
        ("", ""),
        ("happy</answer>", "happy"),
        # A thought that quotes an answer, a second thought, capitals: models that were not trained here write such.
        ("<think>not <answer>sad</answer></think> <answer>happy</answer>", "happy"),
        ("<answer>one</answer> <answer>two</answer>", "two"),
        ("<answer>one <answer>two</answer>", "two"),
        ("<answer>one</answer> <answer>", ""),
        ("<Answer>happy</ANSWER>", "happy"),
    ],
)
def test_the_answer_is_the_text_of_the_last_answer_tag_or_the_full_response(response, answer):
    assert reasoning.answer_of(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>angry?</think>\n\nsad", "sad"),
        ("angry? no.</think>sad", "sad"),  # where the template of the prompt opens the thought
        ("<think>angry? the brows are", ""),  # cut off
        ("sad<think>because of the tears</think>", "sad"),
        ("<think>one</think>sad <think>two</think> or angry", "or angry"),
        ("<think>the <think>inner</think> and the outer</think> sad", "sad"),
        ("<think>not <answer>happy</answer>", "happy"),  # the end of the thought is missing
        ("<THINKING>angry?</THINKING>sad", "sad"),
        ("[THINK]angry?[/THINK]sad", "sad"),
        ("◁think▷angry?◁/think▷sad", "sad"),
        ("<seed:think>angry?</seed:think>sad", "sad"),
        ("<|begin_of_thought|>angry?<|end_of_thought|> <|begin_of_solution|>sad<|end_of_solution|>", "sad"),
        ("<reasoning>angry?</reasoning><answer>sad</answer>", "sad"),
        ("<|begin_of_box|>sad<|end_of_box|>", "sad"),
        (
            "<|channel|>analysis<|message|>angry?<|end|><|start|>assistant<|channel|>final<|message|>sad<|return|>",
            "sad",
        ),
        ("<|channel|>analysis<|message|>angry? the brows", ""),
        ("analysisAngry? No.assistantfinalsad", "sad"),
        ("I think <b>sad</b> [thin]", "I think <b>sad</b> [thin]"),
        ("</think>", ""),
    ],
)
def test_thoughts_of_any_model_are_no_part_of_the_answer(response, answer):
    assert reasoning.answer_of(response) == answer
