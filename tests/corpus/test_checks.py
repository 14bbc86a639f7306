"""The automatic checks pass good texts and catch bad ones."""

import json

import pytest

from favchat_jax.corpus.checks import parse_features, parse_questions, parse_summary
from favchat_jax.corpus.claims import contradictions, pair_contradictions
from tests.corpus.chat_server import FEATURES, QUESTIONS, SUMMARY
from tests.corpus.corpus_folder import LABELS

WOMAN = {"appearance": ("young", "blonde_hair", "wearing_hat"), "emotion": ("sadness", "neutral")}


def test_good_texts_pass():
    assert parse_features(json.dumps(FEATURES), LABELS) == (FEATURES, [])
    assert parse_summary(f"\n{SUMMARY}\n", LABELS) == (SUMMARY, [])
    pairs, problems = parse_questions(f"```json\n{json.dumps(QUESTIONS)}\n```", LABELS)
    assert (len(pairs), problems) == (4, [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("   \n", "empty"),
        (
            "I\u2019m sorry, but I can't help with describing people in videos, for reasons of privacy and of policy.",
            "refusal",
        ),
        ("A man talks.", "3 words"),
        ("He talks and nods. " * 60, "240 words"),
        (SUMMARY.replace("in front of a plain wall", "in frame 3 of the images"), "speaks of 'frame 3'"),
        (SUMMARY.replace("eyeglasses", "a beard"), "beard"),
        (SUMMARY.replace("with short brown", "without glasses, with short brown"), None),  # it says both
        (SUMMARY.replace("short brown", "long blonde"), "blonde hair"),
        (SUMMARY.replace("happy", "sad"), "sadness"),
        (
            SUMMARY.replace("A young man", "A young woman")
            .replace(" he ", " she ")
            .replace("his", "her")
            .replace("He", "She"),
            "woman",
        ),
    ],
)
def test_a_poor_summary_is_recognised(text, problem):
    problems = parse_summary(text, LABELS)[1]
    assert (problem is None and not problems) or problem in problems[0], problems


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("She wears a hat over her blonde hair.", 0),
        ("She wears no hat.", 1),
        ("Her hair is uncovered, without a hat or a scarf.", 1),
        ("She has no beard and wears a hat.", 0),
        ("She has no glasses but a hat.", 0),
        ("She is not wearing glasses.", 0),
        ("She wears sunglasses.", 1),
        ("She isn't wearing any glasses or a hat.", 1),
        ("Her brown, wavy hair falls on her shoulders.", 1),
        ("Her brown eyes and blonde hair.", 0),
        ("She looks angry.", 1),
        ("She looks sad, then angry.", 0),
        ("She does not look angry.", 0),
    ],
)
def test_contradictions_of_the_labels_are_found_and_agreements_are_not(text, said):
    assert len(contradictions(text, WOMAN)) == said, contradictions(text, WOMAN)


def test_without_labels_nothing_is_contradicted():
    assert contradictions("A bald man with a beard and a hat looks angry.", {}) == []
    assert contradictions("She wears a hat.", {"action": ("smile",)}) == []


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        ("Does she wear a hat?", "Yes, she does.", 0),
        ("Does she wear a hat?", "No, she does not.", 1),
        ("Does she wear glasses?", "Yes.", 1),
        ("Does she wear glasses?", "No, nothing of the kind.", 0),
        ("Is her hair brown or blonde?", "It is blonde.", 0),
        ("Does she look angry?", "Yes, she does.", 1),
        ("Isn't she wearing a hat?", "Yes, she is.", 0),
    ],
)
def test_a_yes_or_no_applies_to_the_question(question, answer, said):
    assert len(pair_contradictions(question, answer, WOMAN)) == said


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda pairs: pairs[1].update(question=pairs[0]["question"].lower()), "asked twice"),
        (lambda pairs: pairs[1].update(question="Tell me about the glasses."), "question mark"),
        (lambda pairs: pairs[1].update(answer=""), "empty"),
        (lambda pairs: pairs[1].update(answer="No, he wears none."), "denies eyeglasses"),
        (
            lambda pairs: pairs[1].update(question="Is his hair short and brown?", answer="Short and brown."),
            "gives its answer away",
        ),
        (lambda pairs: pairs[1].update(answer="As the summary says, he does."), "the summary"),
    ],
)
def test_one_bad_pair_is_named_and_the_others_are_kept(change, problem):
    published = json.loads(json.dumps(QUESTIONS))
    change(published["questions"])
    pairs, problems = parse_questions(json.dumps(published), LABELS)
    assert len(pairs) == 3 and len(problems) == 1
    assert problem in problems[0] and problems[0].startswith("question ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("I cannot describe people.", "refusal"),
        ('{"questions": []}', "schema: questions"),
        ("null", "schema: the object"),
    ],
)
def test_an_answer_that_is_not_the_requested_json_is_recognised(text, problem):
    pairs, problems = parse_questions(text, LABELS)
    assert pairs == () and problem in problems[0]


def test_a_feature_dictionary_is_checked_against_its_schema_and_the_labels():
    assert "schema" in parse_features(json.dumps({**FEATURES, "name": "Bob"}), LABELS)[1][0]
    assert "schema" in parse_features(json.dumps({**FEATURES, "talking": "maybe"}), LABELS)[1][0]
    features, problems = parse_features(json.dumps({**FEATURES, "facial_hair": "full beard"}), LABELS)
    assert features["facial_hair"] == "full beard" and "beard" in problems[0]
