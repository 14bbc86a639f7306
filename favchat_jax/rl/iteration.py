"""Runs one iteration of Data-Efficient GRPO: responses, rewards, the pool's judgement, and updates of the policy."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float, Int

from favchat_jax.checkpoints.run import Assembly
from favchat_jax.checkpoints.store import TrainState
from favchat_jax.errors import RunError
from favchat_jax.generation.sampler import Sampling
from favchat_jax.rl.objective import group_advantages
from favchat_jax.rl.policy import make_score, make_update
from favchat_jax.rl.pool import Pool
from favchat_jax.rl.rollouts import Rollouts
from favchat_jax.rl.samples import Sample
from favchat_jax.sharding import place_rows, to_host
from favchat_jax.training.step import Weights

UTILITY_BINS = 5


class Iteration:
    """Updates the policy with responses to some samples.

    Args:
        parts: the model of the reinforcement stage.
        optimizer: moves the trainable weights.
        mesh: devices that hold all weights.
        rollouts: draws and rewards responses.
        pool: judges the samples.
        frozen: weights that never change.
        reference: trainable weights that the run started from.
    """

    def __init__(
        self,
        parts: Assembly,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        rollouts: Rollouts,
        pool: Pool,
        frozen: dict[str, jax.Array],
        reference: Weights,
    ):
        config, self._settings = parts.config, parts.config.reinforcement
        self._seed, self._mesh, self._rollouts, self._pool = config.seed, mesh, rollouts, pool
        self._frozen, self._reference = frozen, reference
        self._score = make_score(parts.model, self._settings, config.loss_chunk, mesh)
        self._update = make_update(parts.model, optimizer, self._settings, config.loss_chunk, mesh)

    def __call__(
        self, state: TrainState, places: Int[np.ndarray, " b"], samples: Sequence[Sample]
    ) -> tuple[TrainState, dict[str, float]]:
        """Runs an iteration; returns the state after it and its measurements.

        Args:
            state: its memory is donated to the new one.
            places: of the samples in the pool.
            samples: at most `config.batch`.

        Raises:
            UserError: a reward fails; state and pool are as before.
            RunError: the gradient is NaN or infinite.
        """
        started, settings, count = time.perf_counter(), self._settings, len(samples)

        # Responses, and their log-probabilities
        seed = self._seed * 1_000_003 + self._pool.iteration
        sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed)
        rollout = self._rollouts.draw({**state.trainable, **self._frozen}, samples, settings.group, sampling)
        features, encoded = rollout.features, self._rollouts.batch(rollout)
        counted, batch = encoded.pop("counted"), place_rows(encoded, self._mesh)
        batch |= {
            "old": self._score(state.trainable, self._frozen, features, batch),
            "reference": self._score(self._reference, self._frozen, features, batch),
        }
        lengths = counted.sum(-1)
        certainty = np.where(counted, to_host(batch["old"]), 0).sum(-1) / lengths

        # Rewards, and the judgement of the samples
        rewards = self._rollouts.rewards(rollout)
        weights, utility = self._pool.update(places, rewards["total"], certainty[:count])

        # Updates; padding has no advantage and does not count
        advantages = np.zeros(lengths.shape, np.float32)
        advantages[:count] = weights[:, None] * group_advantages(rewards["total"], unbiased=settings.published)
        counted &= (np.arange(len(lengths)) < count)[:, None, None]
        batch |= place_rows({"advantages": advantages, "counted": counted}, self._mesh)
        for _ in range(settings.updates):
            state, values = self._update(state, self._frozen, features, batch)

        measured = {name: float(value) for name, value in jax.device_get(values).items()}
        if not np.isfinite(measured["gradient_norm"]):
            clips = ", ".join(sample.record.id for sample in samples)
            where = f"step {int(state.step) + 1} is not finite, clips {clips}"
            raise RunError(f"the gradient of {where}: lower optimizer.learning_rate")
        measured |= _figures(rewards, lengths[:count], utility)
        states = self._pool.counts()
        measured |= {f"share_{name}": number / sum(states.values()) for name, number in states.items()}
        return dataclasses.replace(state, step=state.step + 1), {**measured, "seconds": time.perf_counter() - started}


def _figures(
    rewards: Mapping[str, Float[np.ndarray, "b G"]], lengths: Int[np.ndarray, "b G"], utility: Float[np.ndarray, " b"]
) -> dict[str, float]:
    """Returns the figures of an iteration's responses for the metrics."""
    values = {f"reward_{name}": float(part.mean()) for name, part in rewards.items()}
    values["reward"] = values.pop("reward_total")
    values |= {"rollouts": float(lengths.size), "tokens": float(lengths.sum())}
    values["response_tokens"] = float(lengths.mean())
    values["tied_groups"] = float(np.mean(np.ptp(rewards["total"], axis=1) == 0))
    bins = np.histogram(np.clip(utility, 0, 1), UTILITY_BINS, (0, 1))[0] / len(utility)
    return values | {f"utility_{i}": float(share) for i, share in enumerate(bins)}
