"""Trains one stage: python -m favchat_jax.train --config=configs/stage3.py [--config.FIELD=VALUE] [--workdir=DIR]

In the embedded preset, missing inputs of a stage are made first: rendered clips, pretrained parts, earlier stages. In
other presets, the command names each missing input and how to get it.

Order within the loop: a batch is fetched and its step dispatched; meanwhile the metrics of the step before are read, so
that the device never waits; then a checkpoint is written if one is due. A saved iterator therefore stands exactly after
the last trained batch. With the same config and number of processes, a run resumes to the bit.
"""

import contextlib
import json
import logging
import time
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags
from tqdm import tqdm

from favchat_jax import command_line, processes
from favchat_jax.checkpoints.initial import starting_state
from favchat_jax.checkpoints.run import assemble
from favchat_jax.checkpoints.store import Checkpoints
from favchat_jax.checkpoints.workdir import check_config, claim, has_steps, occupied
from favchat_jax.config import Config
from favchat_jax.data.sources import builder_of
from favchat_jax.embedded.prepare import PRESET, prepare
from favchat_jax.errors import UserError
from favchat_jax.evaluation.questions import check_training
from favchat_jax.programs import keep_programs
from favchat_jax.rl import de_grpo
from favchat_jax.sharding import training_mesh
from favchat_jax.signals import termination
from favchat_jax.training.batches import next_batch, open_batches
from favchat_jax.training.features import placement
from favchat_jax.training.metrics import Metrics, Pending
from favchat_jax.training.optimizer import make_optimizer, schedule
from favchat_jax.training.profile import tracing
from favchat_jax.training.progress import Outcome
from favchat_jax.training.step import make_step

LESS_MEMORY = (
    "raise --config.accumulate or lower --config.batch (grpo: rl.group, rl.max_new_tokens, rl.merged_rollouts=False), "
    "set --config.model.remat=block or --config.llm.storage=int8, or share the weights over more devices: --config.mesh"
)

log = logging.getLogger("favchat_jax")


def train_stage(config: Config, workdir: Path, profile: int = 0) -> Outcome:
    """Trains a stage in `workdir`, after the earlier stages that it needs; `profile` of its steps are traced.

    Returns:
        The outcome of the stage, or of an earlier one that was stopped.

    Raises:
        UserError: an input is missing and cannot be made here; the message names the command that makes it.
    """
    mesh = training_mesh(config)
    builder_of(config.data.name)  # mistakes are refused before anything is made
    if config.stage == "grpo":
        de_grpo.load_rewards(config.reinforcement)
        if profile:
            raise UserError("--profile traces the stages that learn from text; grpo is not one of them")
    with occupied(workdir):
        check_config(workdir, config)
        for earlier in prepare(config):
            folder = earlier.default_workdir
            log.info("%s of %s needs %s, which is trained first", config.stage, config.variant, folder)
            with occupied(folder):
                outcome = _run(earlier, folder, training_mesh(earlier))
            if not outcome.finished:
                return outcome
        return _run(config, workdir, mesh, profile)


def _run(config: Config, workdir: Path, mesh: Mesh, profile: int = 0) -> Outcome:
    """Trains one stage and reports how it ended."""
    started = time.perf_counter()
    outcome = de_grpo.train(config, workdir, mesh) if config.stage == "grpo" else train(config, workdir, mesh, profile)
    if outcome.resumed_at >= outcome.steps:
        log.info("%s in %s is already finished at step %d", config.stage, workdir, outcome.steps)
    elif outcome.finished:
        seconds = time.perf_counter() - started
        log.info("%s finished at step %d after %.0f s: %s", config.stage, outcome.step, seconds, workdir)
    else:
        stopped = config.stage, outcome.step, outcome.steps
        log.info("%s stopped at step %d of %d and saved; the same command resumes it", *stopped)
    return outcome


def train(config: Config, workdir: Path, mesh: Mesh, profile: int = 0) -> Outcome:
    """Trains one stage that learns from text, from the newest checkpoint in `workdir` if there is one.

    Args:
        config: of the stage.
        workdir: folder of everything that the run writes.
        mesh: devices that share the work.
        profile: number of steps that are traced to `workdir/profile`.

    Raises:
        UserError: the workdir belongs to another config, a source of weights or data is missing, the disk is full.
        RunError: the loss became NaN or infinite.
    """
    # Model
    parts = assemble(config)
    if not has_steps(workdir):
        check_training(parts, benchmarks=config.preset != PRESET)
    claim(workdir, config, parts.fingerprint)
    keep_programs(workdir)

    # Data
    with (
        contextlib.closing(open_batches(parts)) as batches,
        Checkpoints(workdir, config.checkpoints_kept) as checkpoints,
    ):
        steps = config.total_steps(batches.dataset_length)

        # Weights
        optimizer, rate = make_optimizer(config.optimizer, steps), schedule(config.optimizer, steps)
        state, frozen, iterator_state = starting_state(parts, optimizer, checkpoints, mesh)
        if iterator_state is not None:
            batches.set_state(iterator_state)
        step = resumed_at = int(state.step)
        if step >= steps:
            return Outcome(step, steps, resumed_at)

        # Step
        update = make_step(
            parts.model, optimizer, rate, accumulate=config.accumulate, chunk=config.loss_chunk, mesh=mesh
        )
        place = placement(parts, workdir, frozen, mesh)

        # Loop, until the last step, SIGTERM or Ctrl-C
        silent = not processes.is_first()
        with (
            Metrics(workdir, resumed_at, config.log_every) as metrics,
            tracing(workdir, profile, resumed_at) as trace,
            termination("this step is finished and saved; the same command resumes the run") as stop,
            tqdm(total=steps, initial=step, desc=config.stage, unit="step", mininterval=1, disable=silent) as bar,
        ):
            pending, stopping = None, False
            while step < steps and not stopping:
                batch, waited = next_batch(batches, pending)
                trace(step, state)
                state, values = update(state, frozen, place(batch))
                step += 1
                if pending:
                    pending.read(metrics)
                pending = Pending(step, values, batch, waited)
                # Several processes ask each other only now and then, because the answer waits for the device.
                if jax.process_count() == 1 or step % config.log_every == 0:
                    stopping = processes.any_process(stop.is_set())
                if step % config.checkpoint_every == 0 or step == steps or stopping:
                    pending.read(metrics)
                    pending = None
                    checkpoints.save(state, batches.get_state())
                bar.update()
                if metrics.latest:
                    rate_now = f"{metrics.latest['clips_per_second']:.0f}/s"
                    bar.set_postfix(loss=f"{metrics.latest['loss']:.3f}", clips=rate_now)
            checkpoints.wait()
    return Outcome(step, steps, resumed_at)


def main() -> None:
    """Trains what the flags say."""
    if _CONFIG.value is None:
        raise UserError("--config is missing: for example --config=configs/stage3.py")
    command_line.check_kind(_CONFIG, "stage", "configs/stage1.py, stage2.py, stage3.py, coldstart.py, grpo.py")
    config = Config.from_ml_collections(_CONFIG.value)
    if _PRINT_CONFIG.value:
        print(json.dumps(config.to_json(), indent=1))
        return
    workdir = Path(_WORKDIR.value or config.default_workdir)
    with processes.joined(_PROCESSES.value, [config.to_json(), str(workdir)]):
        train_stage(config, workdir, _PROFILE.value)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the stage, for example configs/stage3.py")
    _WORKDIR = flags.DEFINE_string(
        "workdir", None, "Folder of the run; runs/PRESET-VARIANT[-ABLATION]/STAGE by default"
    )
    _PROFILE = flags.DEFINE_integer(
        "profile",
        0,
        "Number of steps whose trace is written to WORKDIR/profile, for TensorBoard and Perfetto",
        lower_bound=0,
    )
    _PROCESSES = flags.DEFINE_string(
        "processes",
        "",
        processes.PLACE,
    )
    _PRINT_CONFIG = flags.DEFINE_bool(
        "print_config", False, "Print the config with the options given, and train nothing"
    )
    command_line.start(main, less_memory=LESS_MEMORY)
