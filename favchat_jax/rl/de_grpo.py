"""Data-Efficient GRPO: groups of responses, their rewards, and updates of LoRA and adapters (FaVChat v2).

An iteration: draw samples from the living pool, answer each G times, reward the responses, let the pool judge the
samples, and move the policy by `rl/objective.py`. The reference policy is the frozen copy of the LoRA and adapters
that the run started from, over the one base; encoders and Q-Formers do not train, so a clip is encoded once an
iteration. Everything that decides the next iteration is in the checkpoint, so that a resumed run is exact.
"""

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from tqdm import tqdm

from favchat_jax.checkpoints.run import assemble
from favchat_jax.checkpoints.store import Checkpoints, TrainState
from favchat_jax.checkpoints.weights_folder import load_weights, save_weights
from favchat_jax.checkpoints.workdir import claim
from favchat_jax.config import Config, RLConfig
from favchat_jax.data import reasoning
from favchat_jax.data.record import Record
from favchat_jax.data.sources import open_dataset, prepare
from favchat_jax.errors import RunError, UserError
from favchat_jax.generation.sampler import Sampling
from favchat_jax.rl import objective, rewards
from favchat_jax.rl.curves import draw_curves
from favchat_jax.rl.policy import make_score, make_update
from favchat_jax.rl.pool import Pool
from favchat_jax.rl.rollouts import Rollouts
from favchat_jax.signals import termination
from favchat_jax.training.metrics import Metrics, cut_lines
from favchat_jax.training.optimizer import make_optimizer
from favchat_jax.training.programs import keep_programs
from favchat_jax.training.progress import Outcome
from favchat_jax.training.starting import starting_state

log = logging.getLogger("favchat_jax")

UTILITY_BINS = 5


def train(config: Config, workdir: Path, mesh: Mesh) -> Outcome:
    """Trains on one device in `workdir`, from its newest checkpoint if there is one; a step is an iteration.

    Raises:
        UserError: there are no usable samples, a reward misbehaves, or as in `favchat_jax.train.train`.
        RunError: the gradient became NaN or infinite.
    """
    settings = config.reinforcement
    functions = load_rewards(settings)
    claim(workdir, config)
    keep_programs(workdir)

    # Data: clips to learn from, judged in a pool, and held-out ones
    prepare(config.data.name, config.data.root or None, config.data.packed)
    clips = UsableClips(config, settings.split, settings.samples)
    heldout = UsableClips(config, settings.heldout_split, settings.heldout_samples)
    published = settings.utility == "published"
    pool = Pool(len(clips), settings.pool, config.seed, efficient=settings.data_efficient, published=published)

    # Model and weights
    parts = assemble(config)
    optimizer = make_optimizer(config.optimizer, config.steps * settings.updates)
    with Checkpoints(workdir, config.checkpoints_kept) as checkpoints:
        state, frozen, pool_state = starting_state(config, parts.model, optimizer, checkpoints, mesh)
        step = resumed_at = int(state.step)
        if pool_state is not None:
            pool.set_state(pool_state)
        if step == 0:
            save_weights(workdir / "reference", state.trainable, {"of": "the policy that a run started from"})
        reference = {path: jnp.asarray(leaf) for path, leaf in load_weights(workdir / "reference").items()}

        # Step
        rollouts = Rollouts(config, parts, functions, {**state.trainable, **frozen})
        score = make_score(parts.model, settings, config.loss_chunk)
        update = make_update(parts.model, optimizer, settings, config.loss_chunk)

        def iterate(state: TrainState, samples: Int[np.ndarray, " b"]) -> tuple[TrainState, dict[str, float]]:
            """Responses, rewards, judgement and updates for some samples."""
            sampling = Sampling(
                settings.max_new_tokens, settings.temperature, settings.top_p, config.seed * 1_000_003 + pool.iteration
            )
            drawn = rollouts.draw({**state.trainable, **frozen}, clips[samples], settings.group, sampling)
            batch: dict[str, Any] = dict(rollouts.batch(drawn))
            count = len(samples)
            batch["old"] = score(state.trainable, frozen, drawn.features, batch)
            batch["reference"] = score(reference, frozen, drawn.features, batch)
            lengths = batch["counted"].sum(-1)
            certainty = np.where(batch["counted"], np.asarray(batch["old"]), 0).sum(-1) / lengths
            worth = rollouts.rewards(drawn)
            weights, utility = pool.update(samples, worth["total"], certainty[:count])
            advantages = np.zeros(lengths.shape, np.float32)
            advantages[:count] = weights[:, None] * objective.group_advantages(worth["total"])
            batch["advantages"] = advantages
            batch["counted"] = batch["counted"] & (np.arange(len(lengths)) < count)[:, None, None]
            for _ in range(settings.updates):
                state, values = update(state, frozen, drawn.features, batch)
            moved = {name: float(value) for name, value in jax.device_get(values).items()}
            if not np.isfinite(moved["gradient_norm"]):
                raise RunError(
                    f"the gradient of step {int(state.step) + 1} is not finite, clips "
                    f"{', '.join(record.id for record in drawn.records)}: lower optimizer.learning_rate"
                )
            figures = _summary(worth, lengths[:count], utility) | _shares(pool)
            return dataclasses.replace(state, step=state.step + 1), moved | figures

        def measure(step: int) -> None:
            means = rollouts.measure({**state.trainable, **frozen}, heldout)
            line = {"step": step, "rollouts": step * config.batch * settings.group, **means}
            with (workdir / "heldout.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            log.info("step %d, held-out: %s", step, ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()))

        def save(pool_state: dict[str, Any] | None) -> None:
            if step not in (0, checkpoints.latest()):
                checkpoints.save(state, pool_state or pool.get_state())

        # Loop
        steps = config.steps
        cut_lines(workdir / "heldout.jsonl", step or -1)  # a run from the start repeats all measurements
        with (
            Metrics(workdir, step, config.log_every) as metrics,
            termination("this iteration is finished and saved, and the same command goes on") as stop,
            tqdm(total=steps, initial=step, desc="grpo", unit="step", mininterval=1) as bar,
        ):
            if step == 0:
                measure(0)
            try:
                while step < steps and not stop.is_set():
                    started, pool_state = time.perf_counter(), pool.get_state()
                    samples = pool.draw(config.batch)
                    if not len(samples):
                        log.info("the pool ran empty at step %d: every sample was discarded; the run ends here", step)
                        steps = step
                        break
                    state, values = iterate(state, samples)
                    step, pool_state = step + 1, pool.get_state()
                    metrics.add(step, {**values, "seconds": time.perf_counter() - started}, len(samples))
                    if step % settings.measure_every == 0:
                        measure(step)
                    if step % config.checkpoint_every == 0:
                        save(pool_state)
                    bar.update()
                    bar.set_postfix(reward=f"{values['reward']:.3f}", kl=f"{values['kl']:.3f}")
                if step == steps > resumed_at and step % settings.measure_every:
                    measure(step)
            except UserError:  # a reward misbehaves: the iterations before are kept
                metrics.flush(step)
                save(pool_state)
                raise
            metrics.flush(step)
            save(None)
            checkpoints.wait()
    draw_curves(workdir)
    return Outcome(step, steps, resumed_at)


def load_rewards(settings: RLConfig) -> dict[str, tuple[rewards.Reward, float]]:
    """Function and weight of each reward; raises UserError where one cannot be imported."""
    return {name: (rewards.load(reward.path), reward.weight) for name, reward in settings.rewards.items()}


class UsableClips(Sequence[Record]):
    """The first `limit` clips of a split (0: all) that show a face with all targets, read when they are asked for.

    Raises:
        UserError: there are none.
    """

    def __init__(self, config: Config, split: str, limit: int):
        self._source = open_dataset(config.data.name, config.data.packed, split)
        usable = (i for i in range(len(self._source)) if reasoning.can_be_told(self._source[i]))
        self._places = list(itertools.islice(usable, limit or None))
        if not self._places:
            raise UserError(
                f"no clip of split {split} has attribute, emotion and action targets: name another rl.split"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, chosen: Any) -> Any:
        """One clip's record, or those of a slice or an array of positions."""
        if isinstance(chosen, slice):
            return [self._source[place] for place in self._places[chosen]]
        return (
            [self._source[self._places[i]] for i in chosen] if np.ndim(chosen) else self._source[self._places[chosen]]
        )


def _summary(
    worth: Mapping[str, Float[np.ndarray, "b G"]], lengths: Int[np.ndarray, "b G"], utility: Float[np.ndarray, " b"]
) -> dict[str, float]:
    """What is logged of an iteration's responses."""
    values = {f"reward_{name}": float(part.mean()) for name, part in worth.items()}
    values["reward"] = values.pop("reward_total")
    values |= {"rollouts": float(lengths.size), "tokens": float(lengths.sum())}
    values["response_tokens"] = float(lengths.mean())
    values["tied_groups"] = float(np.mean(np.ptp(worth["total"], axis=1) == 0))
    bins = np.histogram(np.clip(utility, 0, 1), UTILITY_BINS, (0, 1))[0] / len(utility)
    return values | {f"utility_{i}": float(share) for i, share in enumerate(bins)}


def _shares(pool: Pool) -> dict[str, float]:
    return {f"share_{state}": count / pool.size for state, count in pool.counts().items()}
