"""The weights that a stage starts from: the language model's, those of the stage before, converted ones, fresh ones."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from favchat_jax import sharding
from favchat_jax.checkpoints.run import (
    Shapes,
    Weights,
    check_none_missing,
    initialise,
    load_llm,
    visual_and_lora,
    weight_shapes,
)
from favchat_jax.checkpoints.weights_folder import load_weights
from favchat_jax.checkpoints.workdir import stored_config
from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.models.favchat import FaVChat
from favchat_jax.stages import STAGES, group_of

log = logging.getLogger("favchat_jax")


def initial_weights(config: Config, model: FaVChat, mesh: jax.sharding.Mesh | None = None) -> Weights:
    """Every weight that a stage starts from, each on its shards from the first; by default on the first device.

    The language model's base comes from its folder; the rest from the stage before (`init.from_run`) or, where none is
    named, from the folders of `init.umt`, `init.facexformer` and `init.qformer`. What none of them has comes from
    `init.videochat2` (its LoRA enters in stage 2, which follows a stage without), and the rest is drawn afresh.

    Raises:
        UserError: a source is missing, damaged, or holds a weight of another shape.
    """
    mesh = mesh or sharding.one_device()
    shapes = weight_shapes(model, config)
    weights: Weights = {}

    def take(source: str, loaded: Iterable[tuple[str, Any]], dtype: Any = jnp.float32) -> None:
        for path, leaf in loaded:
            if path not in shapes:
                raise UserError(f"{source} holds {path}, which this model has not: check variant, ablation and preset")
            if leaf.shape != shapes[path].shape:
                raise UserError(f"{source}: {path} has shape {leaf.shape}, expected {shapes[path].shape}")
            weights[path] = sharding.place(path, leaf, mesh, dtype)

    take(config.llm.path, load_llm(config.llm.path, config.model.dtype), config.model.dtype)
    if config.init.videochat2:
        take(config.init.videochat2, _placed(load_weights(config.init.videochat2), config))
    if config.init.from_run:
        take(config.init.from_run, _previous_stage(config, shapes).items())
    else:
        for source in filter(None, (config.init.umt, config.init.facexformer)):
            take(source, _placed(load_weights(source), config))
        if config.init.qformer:
            take(config.init.qformer, _placed(_qformer(config.init.qformer), config))
    missing = {path: shape for path, shape in shapes.items() if path not in weights}
    if missing:
        log.info("%d of %d weight arrays start afresh", len(missing), len(shapes))

        def fresh() -> Weights:
            drawn = flatten_dict(initialise(model, config.model, config.seed), sep="/")
            return {path: drawn[path] for path in missing}

        weights |= jax.jit(fresh, out_shardings=sharding.partitions(missing, mesh))()
    return weights


def _qformer(source: str) -> Weights:
    """A converted Q-Former; of a run, both of its Q-Formers and their linear layers."""
    if (Path(source) / "llm.json").exists():
        weights = visual_and_lora(source)
        return {path: leaf for path, leaf in weights.items() if group_of(path) in ("qformers", "linears")}
    return {f"qformer/{path}": leaf for path, leaf in load_weights(source).items()}


def _placed(weights: Mapping[str, Any], config: Config) -> Iterable[tuple[str, Any]]:
    """Converted weights under their paths in the model: a Q-Former and its projection go to both streams, and weights
    of parts that the stage or the ablation lacks are dropped."""
    absent = {
        "facexformer/": config.ablation == "no_face",
        "linear_fuse/": config.ablation != "no_granularity",
        "llm/": not STAGES[config.stage].lora,
    }
    dropped = tuple(part for part, lacks in absent.items() if lacks)
    for path, leaf in weights.items():
        if path.startswith(("qformer/", "proj/")):
            yield from ((f"{stream}_{path}", leaf) for stream in ("general", "facial"))
        elif not path.startswith(dropped):
            yield path, leaf


def _previous_stage(config: Config, shapes: Shapes) -> Weights:
    source = config.init.from_run
    before = stored_config(source)
    for field in ("preset", "variant", "ablation"):
        there, here = getattr(before, field), getattr(config, field)
        if there != here:
            raise UserError(f"init.from_run={source} is of {field}={there}, this run of {field}={here}")
    expected = STAGES[config.stage].before
    if before.stage != expected:
        raise UserError(f"init.from_run={source} is {before.stage}, but {config.stage} starts from {expected}")
    weights = visual_and_lora(source)
    had_adapters = STAGES[before.stage].lora
    check_none_missing(source, weights, {p: s for p, s in shapes.items() if had_adapters or group_of(p) != "lora"})
    return weights
