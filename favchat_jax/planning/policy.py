"""Plans an iteration of the reinforcement stage for devices that are not available: rollouts, scores and updates.

It compiles the programs that `rl.de_grpo` runs, in its order, with shapes as arguments. Arrays that stay on a device
between programs count in each of them: the language model's base, the moments, the adapters at the start of the run,
and a merged copy for rollouts if there is one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from favchat_jax import sharding, stages
from favchat_jax.checkpoints.initial import new_state
from favchat_jax.config import Config
from favchat_jax.generation.decoding import Decoder
from favchat_jax.generation.weights import from_training
from favchat_jax.planning import plan
from favchat_jax.planning.answer import END, Program, answering, plan_of, question, rows
from favchat_jax.planning.targets import GIB, devices, find
from favchat_jax.rl import policy
from favchat_jax.training.optimizer import make_optimizer

PROMPT = 256  # tokens of a prompt: a clip's visual tokens, the instruction and a question


def make_policy_plan(config: Config, name: str, clips: int | None = None) -> plan.Plan:
    """Compiles an iteration of the reinforcement stage for a target.

    Args:
        config: of stage `grpo`.
        name: name of the target.
        clips: samples per iteration; by default `config.batch`.

    Returns:
        The plan, as for a training step. Its peak is that of the largest program, its temporaries are that program's
        memory besides its arguments, including activations, and its operations are those of all programs. The lower
        bound of its time leaves out the traffic between devices.

    Raises:
        UserError: the target is unknown, its compiler is missing, or the responses do not divide among its devices.
    """
    clips = clips or config.batch
    mesh = sharding.make_mesh(config.mesh, devices(name))
    sharding.check_responses(config, mesh, clips)

    def lay_out() -> tuple[dict[str, int], list[Program]]:
        held, programs = _lay_out(config, clips, mesh)
        return {
            "frozen_bytes": held["frozen"] + held["merged"],
            "trained_bytes": held["trained"] + held["reference"],
            "optimizer_bytes": held["moments"],
        }, programs

    return plan_of(lay_out, config, name, clips, mesh, lambda resident, _: _advice(config, resident, find(name).usable))


def _advice(config: Config, resident: int, usable: int) -> str:
    """Suggests a change that makes an iteration fit; `resident` bytes stay on a device."""
    if config.reinforcement.merged_rollouts:
        return "rl.merged_rollouts=False"
    if resident <= usable:
        return "a smaller rl.group or rl.max_new_tokens"
    if config.llm.storage == "full":
        return "llm.storage=int8"
    return f"more devices: {resident / GIB:.1f} GiB of weights and moments stay on each"


def _lay_out(config: Config, clips: int, mesh: Mesh) -> tuple[dict[str, int], list[Program]]:
    """Returns the bytes that stay on a device, by kind, and the programs of an iteration in their order."""
    llm, settings = plan.language_model(config), config.reinforcement
    model, shapes = plan.model_and_weights(config)
    trainable, frozen = stages.split(shapes, config.variant, config.stage)
    optimizer = make_optimizer(config.optimizer, plan.STEPS)
    state = jax.eval_shape(lambda weights: new_state(weights, optimizer, config.seed), trainable)
    state = sharding.as_placed(state, sharding.state_partitions(state, mesh))
    frozen = plan.stored(frozen, config)
    frozen = sharding.as_placed(frozen, sharding.partitions(frozen, mesh))
    own = weights = {**state.trainable, **frozen}
    if settings.merged_rollouts:
        decoding = jax.eval_shape(lambda weights: from_training(weights, config, llm), weights)
        weights = sharding.as_placed(decoding, sharding.partitions(decoding, mesh))
    held = {
        "frozen": plan.device_bytes(frozen),
        "merged": plan.device_bytes({p: leaf for p, leaf in weights.items() if p not in own}),
        "trained": plan.device_bytes(state.trainable),
        "reference": plan.device_bytes(state.trainable),
        "moments": plan.device_bytes(state.moments),
    }
    asked = question(config, clips, mesh)
    long = {"prompt": PROMPT, "new": settings.max_new_tokens, "copies": settings.group}
    form = {"storage": config.llm.storage, "trained": not settings.merged_rollouts}
    decoder = Decoder(config, llm, END, mesh=mesh, **form)
    features, rollouts = answering(config, clips, decoder, mesh, weights, asked, **long)
    update = policy.make_update(model, optimizer, settings, config.loss_chunk, mesh).__wrapped__
    # Wrapped in a new jit, without the compiler options of the platform that compiles.
    compiled = policy.make_score(model, settings, config.loss_chunk, mesh), jax.jit(update, donate_argnums=0)
    return held, [*rollouts, *_updates(config, clips, compiled, state, frozen, features, asked, mesh)]


def _updates(
    config: Config, clips: int, compiled: tuple, state: Any, frozen: dict, features: Any, asked: dict, mesh: Mesh
) -> list[Program]:
    """Returns the programs that score the responses (by policy and reference) and that update the policy."""
    score, update = compiled
    size = clips, config.reinforcement.group, PROMPT + config.reinforcement.max_new_tokens
    batch = rows({"tokens": (size, jnp.int32)}, mesh) | asked
    scores = {name: (size, jnp.float32) for name in ("old", "reference")}
    judged = rows({**scores, "counted": (size, jnp.bool_), "advantages": (size[:2], jnp.float32)}, mesh)
    weights = plan.device_bytes((state.trainable, frozen))
    return [
        Program("score", score, (state.trainable, frozen, features, batch), {}, weights, 2),
        Program(
            "update",
            update,
            (state, frozen, features, {**batch, **judged}),
            {},
            weights + plan.device_bytes(state.moments),
            config.reinforcement.updates,
        ),
    ]
