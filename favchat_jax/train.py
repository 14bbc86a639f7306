"""Trains one stage: python -m favchat_jax.train --config=configs/stage3.py [--config.FIELD=VALUE] [--workdir=DIR]

In the embedded preset, whatever a stage needs and does not find is made first: rendered clips, pretrained parts, the
stages before it. Other presets say what is missing and how to get it.
"""

import importlib
import logging
import time
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from favchat_jax import command_line, processes, sharding, stages
from favchat_jax.embedded import parts as pretraining
from favchat_jax.errors import UserError
from favchat_jax.rl import de_grpo
from favchat_jax.training.checks import check
from favchat_jax.training.loop import Outcome, is_finished, train

log = logging.getLogger("favchat_jax")


def default_workdir(config: ml_collections.ConfigDict) -> Path:
    """runs/PRESET-VARIANT[-ABLATION]/STAGE."""
    ablation = "" if config.ablation == "none" else f"-{config.ablation}"
    return Path("runs") / f"{config.preset}-{config.variant}{ablation}" / config.stage


def train_stage(config: ml_collections.ConfigDict, workdir: Path, profile: int = 0) -> Outcome:
    """Trains the stage of `config` in `workdir`, after what it needs; `profile` steps of it are traced.

    Raises:
        UserError: something is missing that cannot be made here; the message names the command that makes it.
    """
    check(config)
    if config.stage == "grpo":
        de_grpo.check(config)
        if profile:
            raise UserError("--profile traces the stages that learn from text; grpo is not one of them")
    else:  # before anything is made that it needs
        sharding.check_batch(config.batch, config.accumulate, sharding.make_mesh(config.mesh))
    if config.preset == "tiny":
        processes.first_alone(lambda: pretraining.make_missing_parts(config))
    else:
        _require_sources(config)
    previous = stages.STAGES[config.stage].before
    if previous and not is_finished(config.init.from_run):
        if config.preset != "tiny" or Path(config.init.from_run) != default_workdir(_stage_config(config, previous)):
            chosen = f"preset={config.preset},variant={config.variant},ablation={config.ablation}"
            raise UserError(
                f"init.from_run={config.init.from_run} holds no finished {previous}: name the workdir of one, "
                f"made with python -m favchat_jax.train --config=configs/{previous}.py:{chosen} --workdir=DIR"
            )
        _train_first(_stage_config(config, previous), config)
    if config.preset == "tiny" and not previous:
        stand_in = _stage_config(config, "stage1", variant="v1", ablation="none")
        if Path(config.init.qformer) == default_workdir(stand_in) and not is_finished(config.init.qformer):
            _train_first(stand_in, config)
    started = time.perf_counter()
    outcome = de_grpo.train(config, workdir) if config.stage == "grpo" else train(config, workdir, profile)
    if outcome.resumed_at == outcome.steps:
        log.info("%s in %s is already finished at step %d", config.stage, workdir, outcome.steps)
    elif outcome.finished:
        seconds = time.perf_counter() - started
        log.info("%s finished at step %d after %.0f s: %s", config.stage, outcome.step, seconds, workdir)
    else:
        log.info(
            "%s stopped at step %d of %d and saved; the same command goes on", config.stage, outcome.step, outcome.steps
        )
    return outcome


def _train_first(before: ml_collections.ConfigDict, config: ml_collections.ConfigDict) -> None:
    log.info("%s of %s needs %s, which is trained first", config.stage, config.variant, default_workdir(before))
    if not train_stage(before, default_workdir(before)).finished:
        raise SystemExit(0)  # SIGTERM: what was done is saved


def _stage_config(config: ml_collections.ConfigDict, stage: str, **other_choice: str) -> ml_collections.ConfigDict:
    """The default config of another stage of the same preset, variant, ablation and seed, made from the same parts."""
    chosen = {name: other_choice.get(name, config[name]) for name in ("preset", "variant", "ablation")}
    argument = ",".join(f"{name}={value}" for name, value in chosen.items())
    other = importlib.import_module(f"configs.{stage}").get_config(argument)
    for field in ("seed", "llm", "prompt_tokenizer"):
        other[field] = config[field]
    for part in ("umt", "facexformer", "videochat2") + (() if "variant" in other_choice else ("qformer",)):
        other.init[part] = config.init[part]
    other.data.packed = config.data.packed
    return other


def _require_sources(config: ml_collections.ConfigDict) -> None:
    if not config.llm.path:
        raise UserError("llm.path is not set: name the Hugging Face folder of Mistral with --config.llm.path=DIR")
    if not config.data.root:
        raise UserError(f"data.root is not set: name the folder of {config.data.name} with --config.data.root=DIR")
    if config.stage == "stage1":
        for part in ("umt", "facexformer"):
            given = config.init[part] or (part == "umt" and config.init.videochat2)
            if not given and not (part == "facexformer" and config.ablation == "no_face"):
                raise UserError(
                    f"init.{part} is not set: convert the published weights with python -m tools.convert_weights "
                    f"--kind={part} --src=FILE --out=DIR, then --config.init.{part}=DIR"
                )
        if config.variant == "v2" and not config.init.qformer:
            raise UserError(
                "init.qformer is not set, but v2 freezes its Q-Formers in stage 1: convert published ones with "
                "python -m tools.convert_weights --kind=qformer --src=FILE --out=DIR, or name a finished run of v1, "
                "then --config.init.qformer=DIR"
            )


def main() -> None:
    """Trains what the flags say."""
    config = _CONFIG.value
    if config is None:
        raise UserError("--config is missing: for example --config=configs/stage3.py")
    command_line.check_kind(_CONFIG, "stage", "configs/stage1.py, stage2.py, stage3.py, coldstart.py, grpo.py")
    with processes.joined(_PROCESSES.value):
        train_stage(config, Path(_WORKDIR.value or default_workdir(config)), _PROFILE.value)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the stage, for example configs/stage3.py")
    _WORKDIR = flags.DEFINE_string(
        "workdir", None, "Folder of the run; runs/PRESET-VARIANT[-ABLATION]/STAGE by default"
    )
    _PROFILE = flags.DEFINE_integer(
        "profile",
        0,
        "Steps of which a trace is written to WORKDIR/profile, for TensorBoard and Perfetto",
        lower_bound=0,
    )
    _PROCESSES = flags.DEFINE_string(
        "processes",
        "",
        "Run on several hosts, this command on each: auto where the cluster tells it, or HOST:PORT,COUNT,INDEX",
    )
    command_line.start(main)
