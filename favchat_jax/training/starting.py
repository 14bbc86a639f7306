"""The state and frozen weights that a run starts or resumes from: its newest checkpoint, or the stage's sources."""

import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from favchat_jax import sharding, stages
from favchat_jax.checkpoints.initial import initial_weights
from favchat_jax.checkpoints.run import load_llm, weight_shapes
from favchat_jax.checkpoints.store import Checkpoints, frozen_weights
from favchat_jax.checkpoints.weights_folder import save_weights
from favchat_jax.checkpoints.workdir import bind
from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.models.favchat import FaVChat
from favchat_jax.models.kernels.quantized import store
from favchat_jax.processes import first_alone
from favchat_jax.training.step import TrainState, new_state

log = logging.getLogger("favchat_jax")


def starting_state(
    config: Config, model: FaVChat, optimizer: optax.GradientTransformation, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[TrainState, dict[str, jax.Array], dict[str, Any] | None]:
    """Restores the newest checkpoint, or makes the state before the first step and notes in the workdir what it is of.

    Returns:
        (state, frozen weights, both on their shards, state of the iterator that was saved beside). The last is None at
        a start, and where another number of processes saved it.
    """
    workdir, dtype = checkpoints.workdir, jnp.dtype(config.model.dtype)
    trainable, frozen_shapes = stages.split(weight_shapes(model, config), config.variant, config.stage)
    like = jax.eval_shape(
        lambda: new_state({p: jnp.zeros(s.shape, s.dtype) for p, s in trainable.items()}, optimizer, config.seed)
    )
    shards = sharding.state_partitions(like, mesh)
    restored = checkpoints.restore(sharding.as_placed(like, shards))
    if restored:
        state, iterator_state = restored
        if iterator_state is None:
            log.warning("another number of processes read the clips until here: their stream starts anew")
        loaded = itertools.chain(load_llm(config.llm.path, dtype), frozen_weights(workdir).items())
        frozen = {path: sharding.place(path, leaf, mesh, dtype) for path, leaf in loaded}
        log.info("resuming at step %d", int(state.step))
    else:
        frozen = initial_weights(config, model, mesh)
        trainable = {path: frozen.pop(path) for path in trainable}
        kept = {path: leaf for path, leaf in frozen.items() if stages.group_of(path) != "llm"}
        if kept:
            save_weights(workdir / "frozen", kept, {"of": "frozen weights of a run"})
        first_alone(lambda: bind(workdir, config))
        begin = jax.jit(new_state, static_argnums=(1, 2), out_shardings=shards, donate_argnums=0)
        state, iterator_state = begin(trainable, optimizer, config.seed), None
        frozen = {path: jnp.asarray(leaf, dtype) for path, leaf in frozen.items()}
    if set(frozen) != set(frozen_shapes):
        raise UserError(f"{workdir}/frozen is not of this config: delete the workdir and train again")
    frozen = store(frozen, config.llm.storage)
    return state, jax.device_put(frozen, sharding.partitions(frozen, mesh)), iterator_state
