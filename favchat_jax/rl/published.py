"""Computes rewards, judgements and prompts as FaVChat's authors do, for comparison with this project's forms.

Source: github.com/heavenhellchen/FaVChat, `src/r1-v/src/open_r1`: rewards and prompts in `favchat_grpo.py`, utility in
`favchat_components.py`, the judgement and the options of the rewards in `trainer/favchat_grpo_trainer.py`.

A sample has a state s, which starts at 0. It is visited once an epoch, and delta holds for that visit:

    utility = geometric mean of (pairwise |reward difference| + 1e-6)
              x the same of the responses' mean token log-probabilities
    s <- 0.8 s + 0.2 utility
    delta = 0 if s < tau_remove,  0.5 if s > tau_keep,  else 1
    weight w = tanh( delta x (mean pairwise |reward difference| - baseline) )

`configs/grpo.py:recipe=published` sets all of this. docs/explanation/decisions.md lists what still differs.
"""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from favchat_jax.config import PoolConfig
from favchat_jax.rl import rewards
from favchat_jax.rl.objective import pairwise
from favchat_jax.rl.rewards import TARGET_WEIGHTS, Group, jaccard

PAIR_FLOOR = 1e-6  # added to each difference
KL_BOUND = 10.0  # largest |log ratio| to the reference that counts in the KL penalty
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FORM = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
# The authors' structure in other words: the question, a request for both tags, and a hint about the kind of answer.
PROMPT = (
    "{question}\nLook closely at the face, its expression and its movements. Write your thoughts between <think> and "
    "</think>, then your answer between <answer> and </answer>. {hint}"
)
HINTS = {
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is a number.",
    "regression": "The answer is a number.",
    "OCR": "The answer is the text that can be read in the video.",
}
FREE_HINT = "The answer is a short sentence."  # for all other kinds of question


def prompt(question: str, kind: str) -> str:
    """Returns a question with the request to think first; `kind` is that of `record.Question`."""
    return PROMPT.format(question=question, hint=HINTS.get(kind, FREE_HINT))


def answer_of(response: str) -> str:
    """Returns the first complete answer in a response; without one, the entire response with its tags."""
    found = ANSWER.search(response)
    return found[1] if found else response


def words(text: str) -> frozenset[str]:
    """Returns the set of runs of ASCII letters and digits, in lower case; other characters, such as _, separate."""
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Returns shared words over all words of two sets; 1 if both are empty."""
    return jaccard(one, other) if one or other else 1.0


def facial_score(answer: str, targets: Mapping[str, str], expected: str = "") -> float:
    """Returns 0.4 attributes + 0.3 emotion + 0.3 action, each the overlap of all words of the answer with the target.

    An empty target costs its share, which only an empty answer earns. Without any target, the score is the overlap with
    `expected`.
    """
    said = words(answer)
    if not any(targets.get(name) for name in TARGET_WEIGHTS):
        return overlap(said, words(answer_of(expected)))
    return sum(weight * overlap(said, words(targets.get(name, ""))) for name, weight in TARGET_WEIGHTS.items())


def facial(group: Group) -> list[float]:
    """Returns the facial reward of each response."""
    return [facial_score(answer_of(response), group.targets, group.answer) for response in group.responses]


def form(group: Group) -> list[float]:
    """Returns 1 for each response that begins with `<think>`, ends with `</answer>` and has both parts, else 0.

    The parts may be empty and may hold tags. A response that was cut off counts like any other.
    """
    return [float(FORM.fullmatch(response) is not None) for response in group.responses]


def temporal(group: Group) -> list[float]:
    """Returns the bonus for answers that need the order of the frames, on top of this facial reward."""
    return rewards.temporal(group, facial)


def length(group: Group) -> list[float]:
    """Returns the bonus for long responses, on top of this facial reward."""
    return rewards.length(group, facial)


def utilities(totals: Float[np.ndarray, "B G"], log_probabilities: Float[np.ndarray, "B G"]) -> Float[np.ndarray, " B"]:
    """Returns each sample's utility."""
    means = (np.exp(np.log(pairwise(x) + PAIR_FLOOR).mean(axis=1)) for x in (totals, log_probabilities))
    return np.prod(list(means), axis=0)


def deltas(score: Float[np.ndarray, " B"], settings: PoolConfig) -> Float[np.ndarray, " B"]:
    """Returns delta for each sample's state s after its visit."""
    return np.where(score < settings.tau_remove, 0.0, np.where(score > settings.tau_keep, 0.5, 1.0))


def weights(
    totals: Float[np.ndarray, "B G"], delta: Float[np.ndarray, " B"], baseline: float
) -> Float[np.ndarray, " B"]:
    """Returns each sample's weight, which is negative if its margin is below the baseline."""
    return np.tanh(delta * (pairwise(totals).mean(axis=1) - baseline))
