"""Provides the inputs of a stage: makes them in the embedded preset, requires them in the others."""

import importlib
from pathlib import Path

from favchat_jax import processes
from favchat_jax.checkpoints.workdir import check_stage_before
from favchat_jax.config import Config
from favchat_jax.embedded.parts import make_missing_parts
from favchat_jax.errors import UserError
from favchat_jax.stages import STAGES
from favchat_jax.training.progress import is_finished

PRESET = "tiny"


def prepare(config: Config) -> list[Config]:
    """Makes the embedded preset's missing parts, and returns the stages that must be trained first, in order.

    Each of those stages is trained in its default workdir.

    Raises:
        UserError: a missing input cannot be made here, and the message names the command that makes it; or the run to
            start from is not the stage before of the same model.
    """
    if config.preset != PRESET:
        config.require_sources()
    stages = [config]
    while before := _missing_before(stages[0]):
        stages.insert(0, before)
    if config.preset == PRESET:
        processes.first_alone(lambda: [make_missing_parts(stage) for stage in reversed(stages)])
    return stages[:-1]


def stage_config(stage: str, argument: str) -> Config:
    """Returns the config of a stage from its file in `configs/`; the argument is the text after the file's colon."""
    try:
        file = importlib.import_module(f"configs.{stage}").get_config(argument)
    except ModuleNotFoundError:  # the package is installed without the clone's configs
        message = f"{stage} must be trained first, and its config configs/{stage}.py is not here: run in a clone"
        raise UserError(f"{message}, or name a finished run with --config.init.from_run=WORKDIR") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    return Config.from_ml_collections(file)


def _missing_before(config: Config) -> Config | None:
    """Returns the config of the stage that must be trained before `config`'s; None if nothing is missing."""
    before, made_here = STAGES[config.stage].before, config.preset == PRESET
    if before is None:  # v2 freezes its Q-Formers in the first stage and takes them from v1's first stage
        earlier, source = made_here and _default(config, "stage1", variant="v1", ablation="none"), config.init.qformer
    else:
        earlier, source = made_here and _default(config, before), config.init.from_run
    is_earlier = earlier and Path(source) == earlier.default_workdir
    if before is None and not is_earlier:
        return None
    if before and (Path(source) / "config.json").exists():
        check_stage_before(config)
    if is_finished(source):
        return None
    if is_earlier:
        return earlier
    chosen = f"preset={config.preset},variant={config.variant},ablation={config.ablation}"
    raise UserError(
        f"init.from_run={source} holds no finished {before}: train one "
        f"with python -m favchat_jax.train --config=configs/{before}.py:{chosen} --workdir=DIR"
    )


def _default(config: Config, stage: str, **kind: str) -> Config:
    """Returns the default config of an earlier stage with the parts, data and seed of `config`.

    `kind` overrides preset, variant or ablation.
    """
    chosen = {name: kind.get(name, getattr(config, name)) for name in ("preset", "variant", "ablation")}
    argument = ",".join(f"{name}={value}" for name, value in chosen.items())
    default = stage_config(stage, argument)
    parts = ["umt", "facexformer", "videochat2"] + ([] if kind else ["qformer"])
    same = {f"init.{part}": getattr(config.init, part) for part in parts} | {"data.packed": config.data.packed}
    return default.updated(
        {"seed": config.seed, "llm.path": config.llm.path, "llm.storage": config.llm.storage}
        | {"prompt_tokenizer": config.prompt_tokenizer, **same}
    )
