"""Computes rewards of the reinforcement stage (Data-Efficient GRPO) from responses in words.

A reward is a pure function of a group, the G responses to one question, so it may compare them. The facial reward
counts the words that an answer shares with the clip's attributes, emotion and action. The format reward asks for
`<think>...</think> <answer>...</answer>`. Two optional rewards are the authors': one for answers that need the order of
the frames, one for long answers.

As published (`published.py`), each target is compared with all words of an answer. An answer that names all three
targets then has too many words for each, and the best possible one earns about 0.4. Here, words that another target
explains cost nothing, and the best possible answer earns 1.

A config names rewards, including your own, by import path with a weight each (`rl.rewards` in `configs/grpo.py`).
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from favchat_jax.data.reasoning import answer_of
from favchat_jax.errors import UserError, one_line

TARGET_WEIGHTS = {"attributes": 0.4, "emotion": 0.3, "action": 0.3}
# The full text: nothing around the two parts, and no tag inside them.
_PART = r"((?:(?!</?(?:think|answer)>).)*)"
FORM = re.compile(rf"\s*<think>{_PART}</think>\s*<answer>{_PART}</answer>\s*", re.DOTALL)
GOOD = 0.1  # facial reward above which a response can earn an optional reward


@dataclasses.dataclass(frozen=True)
class Group:
    """Holds the responses to one question about one clip.

    Attributes:
        id: of the clip.
        question: the question.
        targets: target strings by name: attributes, emotion, action; an empty one earns and costs nothing.
        responses: G texts.
        lengths: number of tokens of each, including its end.
        complete: whether each ended before the limit of its length.
        shuffled: G // 2 responses about the clip's frames in another order; empty unless `rl.shuffled_frames` is set.
        answer: the expected answer; empty for the request to describe the clip.
    """

    id: str
    question: str
    targets: Mapping[str, str]
    responses: tuple[str, ...]
    lengths: tuple[int, ...]
    complete: tuple[bool, ...]
    shuffled: tuple[str, ...] = ()
    answer: str = ""


Reward = Callable[[Group], Sequence[float]]


def words(text: str) -> frozenset[str]:
    """Returns the set of a text's words in lower case, without punctuation and tags."""
    return frozenset(re.sub(r"[^\w\s]", " ", re.sub(r"</?(?:think|answer)>", " ", text.lower())).split())


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Returns shared words over all words of two sets; 0 if both are empty."""
    union = one | other
    return len(one & other) / len(union) if union else 0.0


def facial_score(answer: str, targets: Mapping[str, str]) -> float:
    """Returns 0.4 attributes + 0.3 emotion + 0.3 action, each the Jaccard overlap of the answer with the target.

    Before the comparison with a target, words that only other targets contain are removed from the answer. A target
    without words is left out, and the other weights are scaled to add up to 1.

    Raises:
        UserError: no target has any words, so all answers would earn the same.
    """
    known = {name: words(targets.get(name, "")) for name in TARGET_WEIGHTS}
    total = sum(weight for name, weight in TARGET_WEIGHTS.items() if known[name])
    if not total:
        raise UserError("all of attributes, emotion and action targets are empty: leave this sample out")
    said, wanted = words(answer), frozenset().union(*known.values())
    score = 0.0
    for name, weight in TARGET_WEIGHTS.items():
        score += weight * jaccard(said - (wanted - known[name]), known[name])
    return score / total


def facial(group: Group) -> list[float]:
    """Returns the facial reward of each response's answer."""
    return [facial_score(answer_of(response), group.targets) for response in group.responses]


def form(group: Group) -> list[float]:
    """Returns 1 for each complete `<think>...</think> <answer>...</answer>` with text in both parts, else 0."""
    return [
        float(complete and (found := FORM.fullmatch(response)) is not None and all(map(str.strip, found.groups())))
        for response, complete in zip(group.responses, group.complete, strict=True)
    ]


def temporal(group: Group, facial: Reward = facial) -> list[float]:
    """Returns 0.3 for good responses if the mean facial reward is at least 0.8 of that for shuffled frames, else 0.

    Raises:
        ValueError: the group has no responses about shuffled frames.
    """
    if not group.shuffled:
        raise ValueError("the temporal reward needs responses about shuffled frames: set rl.shuffled_frames=True")
    earned = facial(group)
    shuffled = facial(dataclasses.replace(group, responses=group.shuffled))
    ordered = np.mean(earned) >= 0.8 * np.mean(shuffled)
    return [0.3 if ordered and reward > GOOD else 0.0 for reward in earned]


def length(group: Group, facial: Reward = facial) -> list[float]:
    """Returns 0.2 for good responses of 320 to 512 tokens if the group has at least two good responses, else 0."""
    good = [reward > GOOD for reward in facial(group)]
    return [
        0.2 if is_good and sum(good) > 1 and 320 <= tokens <= 512 else 0.0
        for is_good, tokens in zip(good, group.lengths, strict=True)
    ]


def load(path: str) -> Reward:
    """Imports the reward function at a path `module:function`.

    Raises:
        UserError: it cannot be imported or called.
    """
    module, _, name = path.partition(":")
    try:
        reward = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's own module may raise any error
        reason = one_line(error)
        raise UserError(f"reward {path!r} cannot be imported ({reason}): write it as module:function") from None
    if not callable(reward):
        raise UserError(f"reward {path!r} is no function: write it as module:function")
    return reward


def evaluate(rewards: Mapping[str, tuple[Reward, float]], group: Group) -> dict[str, Float[np.ndarray, " G"]]:
    """Returns each unweighted reward of each response, and their weighted sum under `total`.

    Args:
        rewards: function and weight by name.
        group: the responses.

    Raises:
        UserError: a reward raises, or it returns a wrong number of values, or one that is not finite.
    """
    parts = {}
    for name, (reward, _) in rewards.items():
        where = f"reward {name} of clip {group.id}"
        try:
            values = [float(value) for value in reward(group)]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except Exception as error:  # the user's own function may raise any error
            raise UserError(f"{where} raised {type(error).__name__}: {one_line(error)}") from error
        if len(values) != len(group.responses):
            raise UserError(f"{where} gave {len(values)} values for {len(group.responses)} responses")
        if not all(map(math.isfinite, values)):
            raise UserError(f"{where} gave {values}: rewards must be finite numbers")
        parts[name] = np.array(values)
    weighted = (weight * parts[name] for name, (_, weight) in rewards.items())
    return {**parts, "total": sum(weighted, start=np.zeros(len(group.responses)))}
