"""Trains the reinforcement stage: Data-Efficient GRPO moves LoRA and adapters (FaVChat v2).

An iteration draws samples from the pool, answers each G times and rewards the responses. The pool then judges the
samples, and the policy is updated (`iteration.py`). The reference policy is a copy of the LoRA and adapters that the
run started from; both share one base. Encoders and Q-Formers do not train, so an iteration encodes a clip once. A
checkpoint holds everything that decides the next iteration, so a run resumes to the bit.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from favchat_jax import sharding
from favchat_jax.checkpoints.initial import starting_state
from favchat_jax.checkpoints.run import assemble
from favchat_jax.checkpoints.store import Checkpoints, TrainState
from favchat_jax.checkpoints.weights_folder import load_weights, save_weights
from favchat_jax.checkpoints.workdir import claim
from favchat_jax.config import Config, RLConfig
from favchat_jax.data.sources import prepare
from favchat_jax.errors import UserError
from favchat_jax.processes import any_process, first_alone, is_first
from favchat_jax.programs import keep_programs
from favchat_jax.rl import rewards
from favchat_jax.rl.curves import draw_curves
from favchat_jax.rl.iteration import Iteration
from favchat_jax.rl.pool import Pool
from favchat_jax.rl.rollouts import Rollouts
from favchat_jax.rl.samples import Samples, draw
from favchat_jax.signals import termination
from favchat_jax.training.metrics import Metrics, cut_lines
from favchat_jax.training.optimizer import make_optimizer
from favchat_jax.training.progress import Outcome

log = logging.getLogger("favchat_jax")


def train(config: Config, workdir: Path, mesh: Mesh) -> Outcome:
    """Trains in `workdir`, from its newest checkpoint if there is one; a step is an iteration.

    All processes of a run draw the same samples and judge them alike; devices share out the responses.

    Raises:
        UserError: no sample is usable, a reward fails, or as in `favchat_jax.train.train`.
        RunError: the gradient became NaN or infinite.
    """
    settings = config.reinforcement
    functions = load_rewards(settings)

    # Model
    parts = assemble(config)
    claim(workdir, config, parts.fingerprint)
    keep_programs(workdir)

    # Data: samples to learn from, judged in a pool, and held-out ones
    data = config.data
    first_alone(lambda: prepare(data.name, data.root or None, data.packed, missing_share=data.missing_share))
    samples = Samples(parts, settings.split, settings.samples)
    heldout = Samples(parts, settings.heldout_split, settings.heldout_samples)
    pool = Pool(
        len(samples), settings.pool, config.seed, efficient=settings.data_efficient, published=settings.published
    )

    with Checkpoints(workdir, config.checkpoints_kept, alike=True) as checkpoints:
        # Weights
        optimizer = make_optimizer(config.optimizer, config.steps * settings.updates)
        state, frozen, data_state = starting_state(parts, optimizer, checkpoints, mesh)
        step = resumed_at = int(state.step)
        if data_state is not None:
            pool.set_state(data_state)
            samples.set_state(data_state.get("samples"))
        if step == 0:
            save_weights(workdir / "reference", state.trainable, {"of": "the policy that a run started from"})
        loaded = load_weights(workdir / "reference").items()
        reference = {path: sharding.place(path, leaf, mesh, leaf.dtype) for path, leaf in loaded}

        # Step
        rollouts = Rollouts(parts, functions, {**state.trainable, **frozen}, samples.longest_prompt, mesh)
        iterate = Iteration(parts, optimizer, mesh, rollouts, pool, frozen, reference)
        measure = functools.partial(measure_heldout, config, workdir, rollouts, heldout, frozen)

        # Loop, until the last step, an empty pool, SIGTERM or Ctrl-C
        steps, first = config.steps, is_first()
        if first:
            cut_lines(workdir / "heldout.jsonl", step or -1)  # a run from the start repeats all measurements
        with (
            Metrics(workdir, step, config.log_every) as metrics,
            termination("this iteration is finished and saved; the same command resumes the run") as stop,
            tqdm(total=steps, initial=step, desc="grpo", unit="step", mininterval=1, disable=not first) as bar,
        ):
            if step == 0:
                measure(state)
            data_state = _data_state(pool, samples)
            try:
                while step < steps and not any_process(stop.is_set()):
                    places, drawn = draw(pool, samples, config.batch)
                    if not drawn:
                        log.info("the pool ran empty at step %d: every sample was discarded; the run ends here", step)
                        steps = step
                        break
                    state, values = iterate(state, places, drawn)
                    step, data_state = step + 1, _data_state(pool, samples)
                    metrics.add(step, values, len(drawn))
                    if step % settings.measure_every == 0:
                        measure(state)
                    if step % config.checkpoint_every == 0:
                        checkpoints.save(state, data_state)
                    bar.update()
                    bar.set_postfix(reward=f"{values['reward']:.3f}", kl=f"{values['kl']:.3f}")
                if step == steps > resumed_at and step % settings.measure_every:
                    measure(state)
            except UserError:  # a reward fails, or too many samples are bad: the iterations before are kept
                _save_last(checkpoints, state, data_state)
                raise
            _save_last(checkpoints, state, _data_state(pool, samples))
            checkpoints.wait()
    if first:
        draw_curves(workdir)
    return Outcome(step, steps, resumed_at)


def _data_state(pool: Pool, samples: Samples) -> dict[str, Any]:
    """Returns everything that decides the next samples, as JSON."""
    return {**pool.get_state(), "samples": samples.get_state()}


def _save_last(checkpoints: Checkpoints, state: TrainState, data_state: dict[str, Any]) -> None:
    """Saves the last iteration unless it is saved already."""
    if int(state.step) not in (0, checkpoints.latest()):
        checkpoints.save(state, data_state)


def measure_heldout(
    config: Config,
    workdir: Path,
    rollouts: Rollouts,
    samples: Samples,
    frozen: dict[str, jax.Array],
    state: TrainState,
) -> None:
    """Adds the mean rewards of held-out samples to heldout.jsonl."""
    step, means = int(state.step), rollouts.measure({**state.trainable, **frozen}, samples)
    if not is_first():
        return
    line = {"step": step, "rollouts": step * config.batch * config.reinforcement.group, **means}
    with (workdir / "heldout.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    log.info("step %d, held-out: %s", step, ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()))


def load_rewards(settings: RLConfig) -> dict[str, tuple[rewards.Reward, float]]:
    """Returns the function and the weight of each reward; raises UserError if one cannot be imported."""
    return {name: (rewards.load(reward.path), reward.weight) for name, reward in settings.rewards.items()}
