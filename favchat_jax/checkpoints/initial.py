"""The weights that a stage starts from: the language model's, those of the stage before, converted ones, fresh ones."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from favchat_jax import sharding
from favchat_jax.checkpoints.run import Shapes, Weights, initialise, load_llm, weight_shapes
from favchat_jax.checkpoints.store import load_run_weights
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
    for source, dtype, loaded in _sources(config, shapes):
        for path, leaf in loaded:
            if path not in shapes:
                raise UserError(f"{source} holds {path}, which this model has not: check variant, ablation and preset")
            if leaf.shape != shapes[path].shape:
                raise UserError(f"{source}: {path} has shape {leaf.shape}, expected {shapes[path].shape}")
            weights[path] = sharding.place(path, leaf, mesh, dtype)
    missing = {path: shape for path, shape in shapes.items() if path not in weights}
    if missing:
        log.info("%d of %d weight arrays start afresh", len(missing), len(shapes))

        def fresh() -> Weights:
            drawn = flatten_dict(initialise(model, config.model, config.seed), sep="/")
            return {path: drawn[path] for path in missing}

        weights |= jax.jit(fresh, out_shardings=sharding.partitions(missing, mesh))()
    return weights


def _sources(config: Config, shapes: Shapes) -> Iterator[tuple[str, Any, Iterable[tuple[str, Any]]]]:
    """Where weights come from, their dtype, and the weights by path; a later source replaces an earlier one's."""
    init, dtype = config.init, config.model.dtype
    yield config.llm.path, dtype, load_llm(config.llm.path, dtype)
    parts = () if init.from_run else (init.umt, init.facexformer, init.qformer)
    for source in filter(None, (init.videochat2, *parts)):
        yield source, jnp.float32, _converted(source, config)
    if init.from_run:
        yield init.from_run, jnp.float32, _previous_stage(config, shapes).items()


def _converted(source: str, config: Config) -> Iterator[tuple[str, Any]]:
    """Weights of a converted folder under their paths in the model.

    A Q-Former and its projection go to both streams; weights of parts that the stage or the ablation lacks are dropped.
    Of a run that `init.qformer` names, both Q-Formers and their linear layers are taken.
    """
    absent = {
        "facexformer/": config.ablation == "no_face",
        "linear_fuse/": config.ablation != "no_granularity",
        "llm/": not STAGES[config.stage].lora,
    }
    dropped = tuple(part for part, lacks in absent.items() if lacks)
    is_run = source == config.init.qformer and (Path(source) / "llm.json").exists()
    for path, leaf in (load_run_weights(source) if is_run else load_weights(source)).items():
        if is_run:
            if group_of(path) in ("qformers", "linears"):
                yield path, leaf
        elif source == config.init.qformer or path.startswith(("qformer/", "proj/")):
            part = f"qformer/{path}" if source == config.init.qformer else path
            yield from ((f"{stream}_{part}", leaf) for stream in ("general", "facial"))
        elif not path.startswith(dropped):
            yield path, leaf


def _previous_stage(config: Config, shapes: Shapes) -> Mapping[str, Any]:
    """The weights of `init.from_run`, which have to be of the stage before and of the same model."""
    source = config.init.from_run
    before = stored_config(source)
    for field in ("preset", "variant", "ablation"):
        there, here = getattr(before, field), getattr(config, field)
        if there != here:
            raise UserError(f"init.from_run={source} is of {field}={there}, this run of {field}={here}")
    expected = STAGES[config.stage].before
    if before.stage != expected:
        raise UserError(f"init.from_run={source} is {before.stage}, but {config.stage} starts from {expected}")
    had_adapters = STAGES[before.stage].lora
    return load_run_weights(source, [path for path in shapes if had_adapters or group_of(path) != "lora"])
