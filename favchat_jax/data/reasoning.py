"""Responses with a thought before the answer: `<think>` a thought `</think> <answer>` an answer `</answer>`.

They are written for the cold start of the reinforcement stage, from a clip's target strings. On purpose they differ in
wording and in how much they say, so that this stage finds better and worse ones among a policy's responses. Whoever
needs the answer alone reads it with `answer_of`.
"""

import re

import numpy as np

from favchat_jax.data.record import Record

# One of stage 1's requests (`loader.INSTRUCTIONS`): the Q-Formers know from it that all that is seen is asked for.
QUESTION = "What can be seen in this video? Describe it."
ANSWERS = (
    "{attributes}, {emotion}, {action}",
    "The person looks {emotion} and is {action}.",
    "The person has {attributes} and looks {emotion}.",
    "{attributes}",
)


def can_be_told(record: Record) -> bool:
    """Whether a clip shows a face of which all three targets are known."""
    return record.has_face and all(record.targets.get(name) for name in ("attributes", "emotion", "action"))


def response(record: Record, rng: np.random.Generator) -> str:
    """`<think>` what is seen `</think> <answer>` all or a part of it `</answer>`, or what the source itself has."""
    if record.reasoning:
        return record.reasoning
    words = record.targets["attributes"].split()
    told = {"emotion": record.targets["emotion"], "action": record.targets["action"]}
    answer = ANSWERS[rng.integers(len(ANSWERS))].format(attributes=_some(words, rng), **told)
    return f"<think> {_some(words, rng)}, {told['action']} </think> <answer> {answer} </answer>"


def from_summary(summary: str, targets: dict[str, str], rng: np.random.Generator) -> str:
    """A response whose thought is what was written of a clip."""
    return f"<think> {summary} </think> <answer> {ANSWERS[rng.integers(len(ANSWERS))].format(**targets)} </answer>"


def answer_of(response: str) -> str:
    """The answer in a response: the last `<answer>` up to `</answer>`, or to the end where the response was cut off.

    The last tag counts, since a thought may quote an answer and then reject it. Without a tag, the entire response is
    the answer.
    """
    last = re.split(r"<answer>", response, flags=re.IGNORECASE)[-1]
    return re.split(r"</answer>", last, flags=re.IGNORECASE)[0].strip()


def _some(words: list[str], rng: np.random.Generator) -> str:
    """The first few words, or all."""
    return " ".join(words[: rng.integers(2, len(words) + 1)] if len(words) > 2 else words)
