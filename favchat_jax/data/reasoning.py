"""Writes responses with a thought before the answer: `<think>` thought `</think> <answer>` answer `</answer>`.

The cold start of the reinforcement stage learns them. They come from a clip's target strings and differ in wording and
completeness on purpose, so that the reinforcement stage finds better and worse ones among a policy's responses.
`answer_of` reads the answer alone, also from models that mark their thoughts otherwise.
"""

import re

import numpy as np

from favchat_jax.data.record import Record

# One of stage 1's questions (`loader.INSTRUCTIONS`), for which the Q-Formers have learned to look at everything.
QUESTION = "What can be seen in this video? Describe it."
ANSWERS = (
    "{attributes}, {emotion}, {action}",
    "The person looks {emotion} and is {action}.",
    "The person has {attributes} and looks {emotion}.",
    "{attributes}",
)

# The marks of a thought: <think>, <thinking>, [THINK], ◁think▷, <seed:think>, <|begin_of_thought|> and their like.
_NAME = r"(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|rationale)"
THOUGHT = re.compile(rf"(?:<\|?|\[|◁)(?:\w+:|begin_of_)?{_NAME}(?:\|?>|\]|▷)", re.IGNORECASE)
THOUGHT_END = re.compile(rf"(?:<\|?|\[|◁)(?:/|end_of_)(?:\w+:)?{_NAME}(?:\|?>|\]|▷)", re.IGNORECASE)
ANSWER = re.compile(r"<answer>|<\|begin_of_(?:solution|box)\|>", re.IGNORECASE)
ANSWER_END = re.compile(r"</answer>|<\|end_of_(?:solution|box)\|>", re.IGNORECASE)
# gpt-oss thinks in a channel of its own; servers that do not parse it leave the marks, or their text alone.
CHANNEL = re.compile(r"<\|channel\|>analysis<\|message\|>|^analysis(?=.*assistantfinal)", re.DOTALL)
LAST_CHANNEL = re.compile(r"<\|channel\|>final<\|message\|>|assistantfinal")


def has_face_and_targets(record: Record) -> bool:
    """Returns whether a clip shows a face and has all three targets."""
    return record.has_face and all(record.targets.get(name) for name in ("attributes", "emotion", "action"))


def response(record: Record, rng: np.random.Generator) -> str:
    """Returns the response of the source if it has one, else a random one from all or some of the targets."""
    if record.reasoning:
        return record.reasoning
    words, emotion, action = (record.targets[name] for name in ("attributes", "emotion", "action"))
    template = ANSWERS[rng.integers(len(ANSWERS))]
    answer = template.format(attributes=_some(words, rng), emotion=emotion, action=action)
    return f"<think> {_some(words, rng)}, {action} </think> <answer> {answer} </answer>"


def from_summary(summary: str, targets: dict[str, str], rng: np.random.Generator) -> str:
    """Returns a response whose thought is a clip's summary."""
    return f"<think> {summary} </think> <answer> {ANSWERS[rng.integers(len(ANSWERS))].format(**targets)} </answer>"


def answer_of(response: str) -> str:
    """Returns the answer in a response, without the thoughts before it.

    The answer is the last `<answer>` after the thoughts, up to `</answer>`, or to the end if it was cut off. The last
    tag counts, since a thought may quote an answer and then reject it. Without a tag, the answer is all that is no
    thought. A thought without an end is one that was cut off, and a response of it alone has the answer "".
    """
    if CHANNEL.search(response):
        _, *final = LAST_CHANNEL.split(response, maxsplit=1)
        return re.sub(r"<\|\w+\|>", "", final[0]).strip() if final else ""
    last = THOUGHT_END.split(response)[-1]
    if ANSWER.search(last):
        return ANSWER_END.split(ANSWER.split(last)[-1])[0].strip()
    said = ANSWER_END.split(THOUGHT.split(last)[0])[0].strip()
    first, *thoughts = THOUGHT.split(response)
    return said or (answer_of(first) if thoughts else "")  # some explain an answer afterwards


def _some(text: str, rng: np.random.Generator) -> str:
    """Returns the first words of a text, two or more, or all of them."""
    words = text.split()
    return " ".join(words[: rng.integers(2, len(words) + 1)] if len(words) > 2 else words)
