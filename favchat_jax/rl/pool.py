"""Keeps the pool of training samples: how useful each one was, its state, and which samples are drawn next.

A sample's G responses teach most if their rewards differ and if the policy is undecided between them. With R the mean
|difference| of two responses' rewards, P that of their mean token log-probabilities, and R', P' running means of both
over all samples seen:

    utility = sqrt( R / (R + R')  x  P / (P + P') )                  in [0, 1), 1/2 for a usual sample
    s <- utility at the first visit,  0.8 s + 0.2 utility after it

    visits < discovery       discover   delta = 1
    s <= tau_remove          discard    delta = 0, never drawn again
    s >  tau_keep            cool down  delta = 0.5, rests
    else                     exploit    delta = 1

    weight w = delta x utility / (mean of delta x utility over the batch)

The published form (`published.py`) multiplies geometric means over all pairs. One tie among the responses brings it
close to 0, its scale is that of the rewards, and s starts at 0, below tau_remove. It multiplies the advantage by
tanh(margin - baseline), which can flip its sign, and it draws all samples once an epoch. Here, arithmetic means
tolerate ties, running means make utility free of scale, samples are judged only after their discovery, and no weight
is negative.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from favchat_jax.config import PoolConfig
from favchat_jax.errors import UserError
from favchat_jax.rl import published
from favchat_jax.rl.objective import pairwise

DISCOVER, EXPLOIT, COOL_DOWN, DISCARD = STATES = ("discover", "exploit", "cool_down", "discard")
DELTA = {DISCOVER: 1.0, EXPLOIT: 1.0, COOL_DOWN: 0.5, DISCARD: 0.0}
USUAL = 0.5  # utility of a usual sample; the prior of one that was not seen yet


def saturating(values: Float[np.ndarray, " B"], usual: float) -> Float[np.ndarray, " B"]:
    """Returns v / (v + usual): 0 for 0, 1/2 for the usual value, always below 1; 0 if both are 0."""
    total = values + usual
    return np.divide(values, total, out=np.zeros_like(values, dtype=np.float64), where=total > 0)


class Pool:
    """Holds every sample's state and draws samples; `get_state` returns everything that decides the next draws.

    Args:
        size: number of samples.
        settings: thresholds and smoothing.
        seed: of the draws.
        efficient: False for plain GRPO: shuffled epochs, no states, weights of 1.
        published: whether judgements have the published form, which draws in shuffled epochs too.
    """

    def __init__(self, size: int, settings: PoolConfig, seed: int, *, efficient: bool = True, published: bool = False):
        self.size, self.settings, self.efficient, self.published = size, settings, efficient, published
        self.score = np.zeros(size)
        self.visits = np.zeros(size, np.int64)
        self.resting_until = np.zeros(size, np.int64)
        self.discarded = np.zeros(size, bool)
        self.bad: set[int] = set()
        self.usual: tuple[float, ...] | None = None  # R', P'
        self.iteration = 0
        self._discovery = 1 if published else settings.discovery
        self._queue: list[int] = []
        self._rng = np.random.default_rng(seed)

    def states(self) -> list[str]:
        """Returns the state of each sample."""
        judged = np.where(self.score > self.settings.tau_keep, COOL_DOWN, EXPLOIT)
        kept = np.where(self.visits < self._discovery, DISCOVER, judged)
        return np.where(self.discarded, DISCARD, kept).tolist()

    def counts(self) -> dict[str, int]:
        """Returns the number of samples in each state, without bad ones."""
        states = [state for sample, state in enumerate(self.states()) if sample not in self.bad]
        return {state: states.count(state) for state in STATES}

    def draw(self, count: int) -> Int[np.ndarray, " count"]:
        """Draws different samples for the next iteration; fewer than `count`, or none, if more are discarded or bad.

        A sample is drawn with a probability in proportion to its s (1/2 before its first visit). One that cools down
        rests first, unless too few others are left. Shuffled epochs repeat the samples of a small pool instead.
        """
        self.iteration += 1
        return self.draw_more(count, ())

    def draw_more(self, count: int, drawn: Collection[int]) -> Int[np.ndarray, " count"]:
        """Draws samples for the same iteration, besides those that it has `drawn`, in place of bad ones."""
        if not self.efficient or self.published:
            return self._next_of_epoch(count)
        kept = np.flatnonzero(~self.discarded)
        kept = kept[~np.isin(kept, [*self.bad, *drawn])]
        awake = kept[self.resting_until[kept] < self.iteration]
        if len(awake) < min(count, len(kept)):
            awake = kept
        hope = np.where(self.visits[awake] == 0, USUAL, self.score[awake]) + 1e-9
        # Gumbel keys: the samples with the largest are a draw without replacement in proportion to `hope`.
        keys = np.log(hope) + self._rng.gumbel(size=len(awake))
        return awake[np.argsort(-keys, kind="stable")[:count]]

    def _next_of_epoch(self, count: int) -> Int[np.ndarray, " count"]:
        usable = self.size - len(self.bad)
        self._queue = [sample for sample in self._queue if sample not in self.bad]
        while usable and len(self._queue) < count:
            self._queue += [sample for sample in self._rng.permutation(self.size).tolist() if sample not in self.bad]
        drawn, self._queue = self._queue[:count], self._queue[count:]
        return np.array(drawn, np.int64)

    def leave_out(self, sample: int) -> None:
        """Never draws a sample again, because it cannot be used."""
        self.bad.add(sample)

    def update(
        self,
        samples: Int[np.ndarray, " B"],
        rewards: Float[np.ndarray, "B G"],
        log_probabilities: Float[np.ndarray, "B G"],
    ) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
        """Judges samples by their groups of responses; returns each sample's weight w and its utility.

        Args:
            samples: places in the pool; different ones, except in shuffled epochs.
            rewards: of their responses.
            log_probabilities: mean over each response's tokens, under the policy that answered.
        """
        utility = (published.utilities if self.published else self._utility)(rewards, log_probabilities)
        first = self.visits[samples] == 0
        self.visits[samples] += 1
        if not self.efficient:
            return np.ones(len(samples)), utility
        if self.published:
            return self._judge_as_published(samples, rewards, utility), utility
        settings = self.settings
        smoothed = settings.smoothing * self.score[samples] + (1 - settings.smoothing) * utility
        self.score[samples] = np.where(first, utility, smoothed)
        judged = self.visits[samples] >= self._discovery
        self.discarded[samples] = judged & (self.score[samples] <= settings.tau_remove)
        states = np.array(self.states())[samples]
        self.resting_until[samples[states == COOL_DOWN]] = self.iteration + settings.rest
        share = np.array([DELTA[state] for state in states]) * utility
        return share / share.mean() if share.any() else np.zeros(len(samples)), utility

    def _judge_as_published(
        self, samples: Int[np.ndarray, " B"], rewards: Float[np.ndarray, "B G"], utility: Float[np.ndarray, " B"]
    ) -> Float[np.ndarray, " B"]:
        """Moves the states of samples and returns their weights; `discarded` marks a delta of 0 at the last visit."""
        settings, score = self.settings, np.zeros(len(samples))
        for i, sample in enumerate(samples):  # one after another: a small pool may hold a sample twice in a batch
            self.score[sample] = settings.smoothing * self.score[sample] + (1 - settings.smoothing) * utility[i]
            score[i] = self.score[sample]
        delta = published.deltas(score, settings)
        self.discarded[samples] = delta == 0
        return published.weights(rewards, delta, settings.published_baseline)

    def _utility(
        self, rewards: Float[np.ndarray, "B G"], log_probabilities: Float[np.ndarray, "B G"]
    ) -> Float[np.ndarray, " B"]:
        spreads = pairwise(rewards).mean(axis=1), pairwise(log_probabilities).mean(axis=1)
        now = tuple(float(spread.mean()) for spread in spreads)
        if self.usual is not None:
            kept = self.settings.smoothing
            now = tuple(kept * old + (1 - kept) * new for old, new in zip(self.usual, now, strict=True))
        self.usual = now
        separability, sensitivity = (saturating(x, usual) for x, usual in zip(spreads, now, strict=True))
        return np.sqrt(separability * sensitivity)

    def get_state(self) -> dict[str, Any]:
        """Returns everything that decides the next draws and judgements, as JSON."""
        return {
            "score": self.score.tolist(),
            "visits": self.visits.tolist(),
            "resting_until": self.resting_until.tolist(),
            "discarded": self.discarded.tolist(),
            "bad": sorted(self.bad),
            "usual": None if self.usual is None else [float(value) for value in self.usual],
            "iteration": self.iteration,
            "queue": [int(sample) for sample in self._queue],
            "rng": self._rng.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes where `get_state` was called; raises UserError if that pool had another number of samples."""
        if len(state["score"]) != self.size:
            raise UserError(
                f"the checkpoint's pool has {len(state['score'])} samples, this data has {self.size}: "
                "restore the data as it was, or choose another --workdir"
            )
        self.score = np.array(state["score"], np.float64)
        self.visits = np.array(state["visits"], np.int64)
        self.resting_until = np.array(state["resting_until"], np.int64)
        self.discarded = np.array(state["discarded"], bool)
        self.bad = set(state.get("bad", []))  # absent in older checkpoints
        self.usual = None if state["usual"] is None else tuple(state["usual"])
        self.iteration, self._queue = state["iteration"], list(state["queue"])
        self._rng.bit_generator.state = state["rng"]
