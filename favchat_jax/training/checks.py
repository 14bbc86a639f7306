"""What a run refuses before any work is done for it: values that suit no run, and a workdir of another config."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

from favchat_jax.checkpoints.store import load_config
from favchat_jax.errors import UserError
from favchat_jax.models.favchat import ABLATIONS, VARIANTS
from favchat_jax.models.kernels.remat import POLICIES
from favchat_jax.stages import STAGES
from favchat_jax.training.features import check_keeping

AT_LEAST = {
    1: ("batch", "accumulate", "loss_chunk", "log_every", "checkpoint_every", "checkpoints_kept")
    + ("data.questions", "data.prompt_length", "model.frames", "model.image_size"),
    0: ("steps", "seed", "data.workers"),
}
# Fields that change where and how a run is computed, not what: they may differ. Dropout draws anew for other parts.
FREE = ("mesh", "model.remat", "accumulate", "loss_chunk", "data.keep_features")
ONE_OF = {
    "variant": VARIANTS,
    "ablation": ABLATIONS,
    "stage": tuple(STAGES),
    "model.dtype": ("float32", "bfloat16"),
    "llm.storage": ("full", "int8", "int4"),
    "model.remat": tuple(POLICIES),
    "data.sampling": ("rand", "middle"),
}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError where a value of the config suits no run, before any work is done for it."""
    flat = flatten_dict(config.to_dict(), sep=".")
    for field, known in ONE_OF.items():
        if flat[field] not in known:
            raise UserError(
                f"{field}={flat[field]} is unknown: choose one of {', '.join(name or 'nothing' for name in known)}"
            )
    for least, fields in AT_LEAST.items():
        for field in fields:
            if flat[field] < least:
                raise UserError(f"{field}={flat[field]} is too small: give at least {least}")
    if config.steps == 0 and not 0 < config.epochs < math.inf:
        raise UserError(f"steps=0 and epochs={config.epochs}: one of them must be a number above 0")
    if not 0 < config.optimizer.learning_rate < math.inf:
        raise UserError(f"optimizer.learning_rate={config.optimizer.learning_rate}: give a number above 0")
    buckets = config.data.buckets
    whole = all(isinstance(length, int) and length > 0 for length in buckets)
    if not buckets or not whole or list(buckets) != sorted(set(buckets)):
        raise UserError(f"data.buckets={buckets}: give whole numbers above 0 in ascending order, as in (48,128)")
    if config.data.keep_features:
        check_keeping(config)


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Makes a new workdir; raises UserError where it cannot be written, or holds steps of a run of another config."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").touch()
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written ({error.strerror}): choose another --workdir") from None
    if not (workdir / "config.json").exists() or not any((workdir / "checkpoints").glob("[0-9]*")):
        return  # what failed before its first saved step may be mended here
    found = differing(load_config(workdir), json.loads(config.to_json()))
    fields = sorted(field for field in found if not field.startswith(FREE))
    if fields:
        raise UserError(
            f"{workdir} was made with another config; these fields differ: {', '.join(fields)}. "
            "Choose another --workdir or the same values"
        )


def differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The fields in which two configs differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differing(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield f"{path} ({one} there, {other} here)"
