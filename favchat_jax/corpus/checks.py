"""Checks an endpoint's answers. Each problem is a short sentence, which is sent back with the next attempt."""

import functools
import json
import re
from pathlib import Path

import jsonschema

from favchat_jax.corpus.claims import Labels, contradictions, pair_contradictions
from favchat_jax.data.record import Question

PROMPTS = Path(__file__).with_name("prompts")
SUMMARY_WORDS = (20, 160)  # the prompt asks for 40 to 90; a small deviation is accepted
QUESTION_WORDS = (3, 30)
ANSWER_WORDS = (1, 45)
KINDS = ("appearance", "emotion", "motion", "general")
FEWEST_PAIRS = 2  # the paper has 2 to 4 per clip

REFUSAL = re.compile(
    r"\b(?:(?:i'?m|i am|we are) (?:sorry|unable|not able)|i (?:can'?t|cannot|can not|won'?t|must decline)|as an ai\b"
    r"|unable to (?:assist|help|comply|identify|describe)|can(?:no|')t (?:assist|help|comply)"
    r"|against my (?:policy|guidelines))",
    re.IGNORECASE,
)
MATERIAL = re.compile(
    r"\b(?:(?:the|these|this|provided|given) (?:labels?|attributes?|images?|pictures?|frames?|features? dictionary)"
    r"|(?:frame|image|picture) \d+|json|according to the (?:labels?|features?|summary)|the summary)\b",
    re.IGNORECASE,
)


def parse_features(text: str, labels: Labels) -> tuple[dict, list[str]]:
    """Returns the feature dictionary in an answer, and its problems."""
    features, problems = _parse(text, "features")
    if problems:
        return {}, problems
    words = json.dumps(features, ensure_ascii=False)
    return features, contradictions(words, {**labels, "emotion": ()})  # emotions are timed there


def parse_summary(text: str, labels: Labels) -> tuple[str, list[str]]:
    """Returns the summary in an answer, and its problems."""
    summary = " ".join(text.split())
    return summary, _prose(summary, SUMMARY_WORDS) or contradictions(summary, labels)


def parse_questions(text: str, labels: Labels) -> tuple[tuple[Question, ...], list[str]]:
    """Returns the pairs without problems in an answer, and the problems of the others."""
    published, problems = _parse(text, "questions")
    if problems:
        return (), problems
    good: list[Question] = []
    for pair in published["questions"]:
        pair = Question(*(" ".join(pair[name].split()) for name in ("question", "answer", "kind")))
        found = check_pair(pair, labels)
        if any(_normal(pair.question) == _normal(other.question) for other in good):
            found.append("it is asked twice")
        problems += [f"question {pair.question!r}: {problem}" for problem in found]
        if not found:
            good.append(pair)
    return tuple(good), problems


def check_pair(pair: Question, labels: Labels) -> list[str]:
    """Returns the problems of one question-answer pair."""
    problems = _prose(pair.question, QUESTION_WORDS) + _prose(pair.answer, ANSWER_WORDS)
    if not problems and not pair.question.endswith("?"):
        problems.append("it does not end with a question mark")
    if not problems and _normal(pair.answer) in _normal(pair.question) and len(pair.answer.split()) > 1:
        problems.append("the question gives its answer away")
    return problems or pair_contradictions(pair.question, pair.answer, labels)


def _prose(text: str, words: tuple[int, int]) -> list[str]:
    """Returns the problems that any text can have."""
    count = len(text.split())
    if not text:
        return ["the text is empty"]
    if REFUSAL.search(text.replace("\u2019", "'")):
        return ["the text is a refusal"]
    if not words[0] <= count <= words[1]:
        return [f"the text has {count} words; {words[0]} to {words[1]} are wanted"]
    if found := MATERIAL.search(text):
        return [f"the text speaks of {found[0]!r} and not of the video alone"]
    return []


def _parse(text: str, schema: str) -> tuple[dict, list[str]]:
    """Returns the JSON object in an answer, with or without a Markdown fence, and how it violates its schema."""
    text = re.sub(r"^```\w*\s*|\s*```$", "", text.strip())
    if not text:
        return {}, ["the text is empty"]
    try:
        published = json.loads(text)
        json.dumps(published, ensure_ascii=False).encode()  # fails for an escaped lone surrogate
    except (ValueError, RecursionError):
        refused = REFUSAL.search(text.replace("\u2019", "'"))
        return {}, ["the text is a refusal" if refused else "the text is not JSON"]
    error = jsonschema.exceptions.best_match(_validator(schema).iter_errors(published))
    if error is None:
        return published, []
    place = "/".join(map(str, error.absolute_path)) or "the object"
    return {}, [f"the JSON does not satisfy the schema: {place}: {error.message[:200]}"]


@functools.cache
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((PROMPTS / f"{schema}.schema.json").read_text()))


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
