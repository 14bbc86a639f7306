"""What makes GRPO data-efficient: how useful a sample was, what becomes of it, and which samples come next.

A sample's group of G responses teaches where rewards differ and where the policy is not of one mind. With R the mean
|difference| of two responses' rewards, P that of their mean token log-probabilities, and R', P' running means of both
over all samples seen:

    utility = sqrt( R / (R + R')  x  P / (P + P') )                  in [0, 1), 1/2 for a usual sample
    s <- utility at the first visit,  0.8 s + 0.2 utility after it

    visits < discovery       discover   delta = 1
    s <= tau_remove          discard    delta = 0, never drawn again
    s >  tau_keep            cool down  delta = 0.5, rests
    else                     exploit    delta = 1

    weight w = delta x utility / (mean of delta x utility over the batch)

The published form (`published_utility`, `published_weights`) multiplies geometric means of all pairs: one tie among the
responses brings it to nothing, its size is that of the rewards, s starts at 0, under tau_remove, and the advantage is
multiplied by tanh(margin - baseline), which can turn its sign. Here arithmetic means forgive ties, running means make
utility free of scale, discovery comes before any judgement, and no weight is negative.
"""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from favchat_jax.config import PoolConfig

DISCOVER, EXPLOIT, COOL_DOWN, DISCARD = STATES = ("discover", "exploit", "cool_down", "discard")
DELTA = {DISCOVER: 1.0, EXPLOIT: 1.0, COOL_DOWN: 0.5, DISCARD: 0.0}
PAIR_FLOOR = 1e-6  # of the published form
USUAL = 0.5  # utility of a usual sample, and so the prior of one not seen


def pairwise(values: Float[np.ndarray, "B G"]) -> Float[np.ndarray, "B P"]:
    """|difference| of each of the P = G (G - 1) / 2 pairs of a group."""
    first, second = np.array(list(itertools.combinations(range(values.shape[1]), 2))).T
    return np.abs(values[:, first] - values[:, second])


def saturating(values: Float[np.ndarray, " B"], usual: float) -> Float[np.ndarray, " B"]:
    """v / (v + usual): 0 for 0, 1/2 for the usual value, never 1; 0 where both are 0."""
    total = values + usual
    return np.divide(values, total, out=np.zeros_like(values, dtype=np.float64), where=total > 0)


def published_utility(
    rewards: Float[np.ndarray, "B G"], log_probabilities: Float[np.ndarray, "B G"]
) -> Float[np.ndarray, " B"]:
    """Product of the geometric means of (pairwise difference + 1e-6) of rewards and of mean token log-probabilities."""
    means = (np.exp(np.log(pairwise(x) + PAIR_FLOOR).mean(axis=1)) for x in (rewards, log_probabilities))
    return np.prod(list(means), axis=0)


def published_weights(
    rewards: Float[np.ndarray, "B G"], delta: Float[np.ndarray, " B"], baseline: float
) -> Float[np.ndarray, " B"]:
    """tanh(delta x (mean pairwise reward margin - baseline)): negative where the margin is under the baseline."""
    return np.tanh(delta * (pairwise(rewards).mean(axis=1) - baseline))


class Pool:
    """Every sample's state, and the draws from those that live; the whole of it is `get_state`.

    Args:
        size: number of samples.
        settings: thresholds and smoothing.
        seed: of the draws.
        efficient: False for plain GRPO: shuffled epochs, no states, weights of 1.
        published: whether utility and weights have the published form.
    """

    def __init__(self, size: int, settings: PoolConfig, seed: int, *, efficient: bool = True, published: bool = False):
        self.size, self.settings, self.efficient, self.published = size, settings, efficient, published
        self.score = np.zeros(size)
        self.visits = np.zeros(size, np.int64)
        self.resting_until = np.zeros(size, np.int64)
        self.discarded = np.zeros(size, bool)
        self.usual: tuple[float, float] | None = None  # R', P'
        self.iteration = 0
        self._queue: list[int] = []
        self._rng = np.random.default_rng(seed)

    def state_of(self, sample: int) -> str:
        """Where a sample stands in its life."""
        if self.discarded[sample]:
            return DISCARD
        if self.visits[sample] < (1 if self.published else self.settings.discovery):
            return DISCOVER
        return COOL_DOWN if self.score[sample] > self.settings.tau_keep else EXPLOIT

    def counts(self) -> dict[str, int]:
        """Samples in each state."""
        states = [self.state_of(sample) for sample in range(self.size)]
        return {state: states.count(state) for state in STATES}

    def draw(self, count: int) -> Int[np.ndarray, " count"]:
        """The samples of the next iteration, no sample twice; fewer where fewer live, none where none does.

        A living sample is drawn with a probability in proportion to its s (that of a usual one before it was seen);
        one that cools down rests first, unless too few others live.
        """
        self.iteration += 1
        if not self.efficient:
            return self._next_of_epoch(count)
        living = np.flatnonzero(~self.discarded)
        awake = living[self.resting_until[living] < self.iteration]
        if len(awake) < min(count, len(living)):
            awake = living
        hope = np.where(self.visits[awake] == 0, USUAL, self.score[awake]) + 1e-9
        # Gumbel keys: the largest are a draw without replacement in proportion to `hope`.
        keys = np.log(hope) + self._rng.gumbel(size=len(awake))
        return awake[np.argsort(-keys, kind="stable")[:count]]

    def _next_of_epoch(self, count: int) -> Int[np.ndarray, " count"]:
        while len(self._queue) < count:
            self._queue += self._rng.permutation(self.size).tolist()
        drawn, self._queue = self._queue[:count], self._queue[count:]
        return np.array(drawn)

    def update(
        self,
        samples: Int[np.ndarray, " B"],
        rewards: Float[np.ndarray, "B G"],
        log_probabilities: Float[np.ndarray, "B G"],
    ) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
        """Takes in what the groups of `samples` were worth; returns each sample's weight w and its utility.

        Args:
            samples: different samples.
            rewards: of their responses.
            log_probabilities: mean over each response's tokens, under the policy that answered.
        """
        chosen, ours = self.settings, not self.published
        utility = self._utility(rewards, log_probabilities) if ours else published_utility(rewards, log_probabilities)
        if not self.efficient:
            self.visits[samples] += 1
            return np.ones(len(samples)), utility
        first = (self.visits[samples] == 0) & ours
        smoothed = chosen.smoothing * self.score[samples] + (1 - chosen.smoothing) * utility
        self.score[samples] = np.where(first, utility, smoothed)
        self.visits[samples] += 1
        judged = self.visits[samples] >= (chosen.discovery if ours else 1)
        self.discarded[samples] = judged & (self.score[samples] <= chosen.tau_remove)
        states = [self.state_of(sample) for sample in samples]
        tired = samples[[state == COOL_DOWN for state in states]]
        self.resting_until[tired] = self.iteration + chosen.rest
        delta = np.array([DELTA[state] for state in states])
        if not ours:
            return published_weights(rewards, delta, chosen.published_baseline), utility
        share = delta * utility
        return share / share.mean() if share.any() else np.zeros(len(samples)), utility

    def _utility(self, rewards: Float[np.ndarray, "B G"], log_probabilities: Float[np.ndarray, "B G"]):
        spreads = pairwise(rewards).mean(axis=1), pairwise(log_probabilities).mean(axis=1)
        now = [float(spread.mean()) for spread in spreads]
        kept = self.settings.smoothing
        self.usual = tuple(now if self.usual is None else kept * np.array(self.usual) + (1 - kept) * np.array(now))
        separability, sensitivity = (saturating(x, usual) for x, usual in zip(spreads, self.usual, strict=True))
        return np.sqrt(separability * sensitivity)

    def get_state(self) -> dict[str, Any]:
        """All that decides what comes next, as JSON can hold it."""
        return {
            "score": self.score.tolist(),
            "visits": self.visits.tolist(),
            "resting_until": self.resting_until.tolist(),
            "discarded": self.discarded.tolist(),
            "usual": None if self.usual is None else [float(value) for value in self.usual],
            "iteration": self.iteration,
            "queue": [int(sample) for sample in self._queue],
            "rng": self._rng.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called."""
        self.score = np.array(state["score"], np.float64)
        self.visits = np.array(state["visits"], np.int64)
        self.resting_until = np.array(state["resting_until"], np.int64)
        self.discarded = np.array(state["discarded"], bool)
        self.usual = None if state["usual"] is None else tuple(state["usual"])
        self.iteration, self._queue = state["iteration"], list(state["queue"])
        self._rng.bit_generator.state = state["rng"]
