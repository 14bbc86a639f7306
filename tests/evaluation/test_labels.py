"""Reading classes from free text: emotions, and whether two faces are the same person's."""

import json
from pathlib import Path

import pytest

from favchat_jax.evaluation.benchmarks.dfew import CLASSES as DFEW
from favchat_jax.evaluation.benchmarks.mafw import CLASSES as MAFW
from favchat_jax.evaluation.labels import SYNONYMS, decide, emotion_mentions, emotion_names, says_same

SEVEN, ELEVEN = emotion_names(DFEW), emotion_names(MAFW)


def answers(name):
    """Returns the rows of a file of answers as people and models word them, with their labels."""
    lines = Path(__file__).with_name(f"{name}_answers.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def misread(rows, read, expected):
    """Returns the answers that are not read as expected, and those of them that are read as another label."""
    found = [(row["text"], read(row), row[expected]) for row in rows]
    missed = [row for row in found if row[1] != row[2]]
    return missed, [row for row in missed if row[1] is not None]


def test_at_least_97_of_100_emotions_are_read_right_and_the_others_are_left_undecided():
    rows, names = answers("emotion"), {"dfew": SEVEN, "mafw": ELEVEN}
    missed, wrong = misread(rows, lambda row: decide(row["text"], names[row["set"]]), "label")
    assert len(rows) >= 500 and not wrong, wrong
    assert len(missed) <= 0.03 * len(rows), missed


def test_at_least_97_of_100_verdicts_on_two_faces_are_read_right_and_the_others_are_left_undecided():
    rows = answers("same")
    missed, wrong = misread(rows, lambda row: says_same(row["text"]), "same")
    assert len(rows) >= 500 and not wrong, wrong
    assert len(missed) <= 0.03 * len(rows), missed


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("happy", "happy"),
        ("Happy.", "happy"),
        ("ＨＡＰＰＹ", "happy"),  # full width
        ("The person looks delighted!", "happy"),
        ("She is unhappy", "sad"),
        ("angry", "angry"),
        ("He seems furious about it", "angry"),
        ("Her face is expressionless", "neutral"),
        ("There is no obvious emotion.", "neutral"),
        ("a shocked look", "surprise"),
        ("Disgusted", "disgust"),
        ("He’s terrified", "fear"),
    ],
)
def test_an_answer_that_names_one_emotion_has_its_class(text, label):
    assert decide(text, SEVEN) == label


SEVERAL = {
    # A negated emotion does not count.
    "not happy but sad": "sad",
    "The man isn't angry, he is surprised.": "surprise",
    "She doesn't look very happy. She looks sad.": "sad",
    "neither happy nor sad; afraid": "fear",
    "Rather than anger, there is fear.": "fear",
    "no sign of anger or fear, only sadness": "sad",
    "not only happy": "happy",
    "no doubt happy": "happy",
    "The person is not happy and seems angry": "angry",
    # Of several emotions, the one after a decision counts.
    "She smiles as if happy at first, later she cries. The answer is sad.": "sad",
    "Happy? Angry? Emotion: fear": "fear",
    "Between sadness and anger, most likely anger": "angry",
    "<think> happy or sad </think> <answer> sad </answer>": "sad",
    "<think> happy or sad </think> <answer> sad": "sad",
}


@pytest.mark.parametrize(("text", "label"), SEVERAL.items())
def test_of_several_emotions_the_one_that_is_not_negated_or_follows_a_decision_counts(text, label):
    assert decide(text, SEVEN) == label


@pytest.mark.parametrize(
    "text", ["", "   ", "I cannot tell.", "not happy", "the", "madam", "赤い", "a sadistic man", "1"]
)
def test_an_answer_without_an_emotion_has_no_class(text):
    assert decide(text, SEVEN) is None


@pytest.mark.parametrize(
    "text", ["happy and sad", "anger, fear", "happy, sad, neutral, angry, surprise, disgust, fear"]
)
def test_an_answer_with_several_emotions_and_no_decision_has_no_class(text):
    assert decide(text, SEVEN) is None


def test_all_mentioned_emotions_are_found_in_order_and_negated_ones_are_marked():
    text = "first surprised, then happy, then amazed again, never angry."
    found = [(mention.label, mention.denied) for mention in emotion_mentions(text, SEVEN)]
    assert found == [("surprise", False), ("happy", False), ("surprise", False), ("angry", True)]


def test_eleven_classes_tell_worry_from_fear_and_helplessness_from_sadness():
    words = {
        "He is worried": "anxiety",
        "helpless": "helplessness",
        "she was let down": "disappointment",
        "scorn": "contempt",
    }
    assert {text: decide(text, ELEVEN) for text in words} == words
    assert decide("He is worried", SEVEN) is None


@pytest.mark.parametrize("classes", [DFEW, MAFW])
def test_each_class_is_recognised_by_its_name(classes):
    names = emotion_names(classes)
    assert {label: decide(label, names) for label in classes} == {label: label for label in classes}


def test_no_word_stands_for_two_emotions():
    words = [word for group in SYNONYMS.values() for word in group]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Yes.", True),
        ("yes, both are him", True),
        ("No", False),
        ("No, they are not the same person.", False),
        ("They are the same person.", True),
        ("These are two different people.", False),
        ("This is not the same person", False),
        ("They are not different people", True),
        ("<think>hm</think><answer>no</answer>", False),
        ("I cannot see that", None),
        ("", None),
        ("It could be the same person or different people", None),
    ],
)
def test_whether_an_answer_says_that_two_faces_are_the_same_persons(text, same):
    assert says_same(text) is same
