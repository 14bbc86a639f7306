"""Writes responses with a thought before the answer: `<think>` thought `</think> <answer>` answer `</answer>`.

The cold start of the reinforcement stage learns them. They come from a clip's target strings and differ in wording and
completeness on purpose, so that the reinforcement stage finds better and worse ones among a policy's responses.
`answer_of` reads the answer alone.
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
    """Returns the answer in a response: the last `<answer>` up to `</answer>`, or to the end if it was cut off.

    The last tag counts, since a thought may quote an answer and then reject it. Without a tag, the entire response is
    the answer.
    """
    last = re.split(r"<answer>", response, flags=re.IGNORECASE)[-1]
    return re.split(r"</answer>", last, flags=re.IGNORECASE)[0].strip()


def _some(text: str, rng: np.random.Generator) -> str:
    """Returns the first words of a text, two or more, or all of them."""
    words = text.split()
    return " ".join(words[: rng.integers(2, len(words) + 1)] if len(words) > 2 else words)
