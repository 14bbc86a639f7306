"""Provides the state and the frozen weights that a run starts or resumes from.

A run resumes from its newest checkpoint. A new one takes its weights from the language model's folder, from the stage
before or from converted folders, and draws the rest.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from favchat_jax import sharding, stages
from favchat_jax.checkpoints.mistral_folder import each_weight
from favchat_jax.checkpoints.run import Assembly, Weights, initialise, load_frozen, load_trained
from favchat_jax.checkpoints.store import Checkpoints, TrainState
from favchat_jax.checkpoints.weights_folder import load_weights, save_weights
from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.models.kernels.quantized import store

log = logging.getLogger("favchat_jax")


def starting_state(
    parts: Assembly, optimizer: optax.GradientTransformation, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.Array], dict[str, Any] | None]:
    """Restores the newest checkpoint, or makes the state before the first step and saves the frozen weights.

    Returns:
        (state, frozen weights, both on their shards, state of the iterator that was saved beside). The last is None at
        a start, and if another number of processes saved it.
    """
    config, dtype = parts.config, jnp.dtype(parts.config.model.dtype)
    trainable, frozen_shapes = stages.split(parts.shapes, config.variant, config.stage)
    like = jax.eval_shape(
        lambda: new_state({p: jnp.zeros(s.shape, s.dtype) for p, s in trainable.items()}, optimizer, config.seed)
    )
    shards = sharding.state_partitions(like, mesh)
    restored = checkpoints.restore(sharding.as_placed(like, shards))
    if restored:
        state, iterator_state = restored
        if iterator_state is None:
            log.warning("this run has another number of processes than before: the stream of clips restarts")
        loaded = itertools.chain(each_weight(config.llm.path, dtype, "llm/"), load_frozen(checkpoints.workdir).items())
        frozen = {path: sharding.place(path, leaf, mesh, dtype) for path, leaf in loaded}
        log.info("resuming at step %d", int(state.step))
    else:
        frozen = initial_weights(parts, mesh)
        begin = jax.jit(new_state, static_argnums=(1, 2), out_shardings=shards, donate_argnums=0)
        state = begin({path: frozen.pop(path) for path in trainable}, optimizer, config.seed)
        iterator_state = None
        kept = {path: leaf for path, leaf in frozen.items() if not path.startswith("llm/")}
        if kept:
            save_weights(checkpoints.workdir / "frozen", kept, {"of": "frozen weights of a run"})
        frozen = {path: jnp.asarray(leaf, dtype) for path, leaf in frozen.items()}
    if set(frozen) != set(frozen_shapes):
        raise UserError(f"{checkpoints.workdir}/frozen is not of this config: delete the workdir and train again")
    frozen = store(frozen, config.llm.storage)
    return state, jax.device_put(frozen, sharding.partitions(frozen, mesh)), iterator_state


def new_state(trainable: Weights, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Makes the state before the first step."""
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)


def initial_weights(parts: Assembly, mesh: Mesh | None = None) -> Weights:
    """Loads or draws every weight that a stage starts from, each directly on its shards; by default on one device.

    The language model's base comes from its folder; the rest from the stage before (`init.from_run`) or, if none is
    named, from the folders of `init.umt`, `init.facexformer` and `init.qformer`. `init.videochat2` fills in for all of
    them (its LoRA enters in stage 2, since stage 1 has no adapters). Weights without a source are drawn.

    Raises:
        UserError: a source is missing, damaged, or holds a weight of another shape.
    """
    config, shapes, mesh = parts.config, parts.shapes, mesh or sharding.one_device()
    weights: Weights = {}
    for source, dtype, loaded in _sources(parts):
        for path, leaf in loaded:
            if path not in shapes:
                raise UserError(f"{source} holds {path}, which this model lacks: check variant, ablation and preset")
            if leaf.shape != shapes[path].shape:
                raise UserError(f"{source}: {path} has shape {leaf.shape}, expected {shapes[path].shape}")
            weights[path] = sharding.place(path, leaf, mesh, dtype)
    missing = {path: shape for path, shape in shapes.items() if path not in weights}
    if missing:
        log.info("%d of %d weight arrays are drawn", len(missing), len(shapes))

        def fresh() -> Weights:
            drawn = flatten_dict(initialise(parts.model, config.model, config.seed), sep="/")
            return {path: drawn[path] for path in missing}

        weights |= jax.jit(fresh, out_shardings=sharding.partitions(missing, mesh))()
    return weights


def _sources(parts: Assembly) -> Iterator[tuple[str, Any, Iterable[tuple[str, Any]]]]:
    """Yields each source of weights, their dtype, and the weights by path; a later source replaces an earlier one's."""
    config, init = parts.config, parts.config.init
    yield config.llm.path, config.model.dtype, each_weight(config.llm.path, config.model.dtype, "llm/")
    converted = () if init.from_run else (init.umt, init.facexformer, init.qformer)
    for source in filter(None, (init.videochat2, *converted)):
        yield source, jnp.float32, _converted(source, config)
    if init.from_run:
        before = stages.STAGES[config.stage].before
        had_adapters = before is not None and stages.STAGES[before].lora
        shapes = {p: s for p, s in parts.shapes.items() if had_adapters or stages.group_of(p) != "lora"}
        yield init.from_run, jnp.float32, load_trained(init.from_run, shapes).items()


def _converted(source: str, config: Config) -> Iterator[tuple[str, Any]]:
    """Yields a converted folder's weights under their paths in the model.

    A Q-Former and its projection go to both streams; weights of parts that the stage or the ablation lacks are dropped.
    If `init.qformer` names a run, both of its Q-Formers and their linear layers are taken.
    """
    absent = {
        "facexformer/": config.ablation == "no_face",
        "linear_fuse/": config.ablation != "no_granularity",
        "llm/": not stages.STAGES[config.stage].lora,
    }
    dropped = tuple(part for part, lacks in absent.items() if lacks)
    is_run = source == config.init.qformer and (Path(source) / "llm.json").exists()
    for path, leaf in (load_trained(source) if is_run else load_weights(source)).items():
        if is_run:
            if stages.group_of(path) in ("qformers", "linears"):
                yield path, leaf
        elif source == config.init.qformer or path.startswith(("qformer/", "proj/")):
            part = f"qformer/{path}" if source == config.init.qformer else path
            yield from ((f"{stream}_{part}", leaf) for stream in ("general", "facial"))
        elif not path.startswith(dropped):
            yield path, leaf
