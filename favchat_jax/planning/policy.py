"""Plans an iteration of the reinforcement stage for a device that is not available: rollouts, scores and updates.

It compiles the programs that `rl.de_grpo` runs, in its order, with shapes as arguments. Arrays that stay on the device
between programs count in each of them: the language model's base with separate adapters (scores, updates) and with
merged ones (rollouts), the moments, and the adapters at the start of the run.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from favchat_jax import sharding, stages
from favchat_jax.checkpoints.initial import new_state
from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.generation.decoding import Decoder
from favchat_jax.generation.weights import from_training
from favchat_jax.planning import plan
from favchat_jax.planning.answer import END, Program, answering, plan_of, question, rows
from favchat_jax.planning.targets import GIB, devices, find
from favchat_jax.rl import policy
from favchat_jax.training.optimizer import make_optimizer

PROMPT = 256  # tokens of a prompt: a clip's visual tokens, the instruction and a question


def make_policy_plan(config: Config, name: str, clips: int | None = None) -> plan.Plan:
    """Compiles an iteration of the reinforcement stage for one device of a target.

    Args:
        config: of stage `grpo`.
        name: a target with one device.
        clips: samples per iteration; by default `config.batch`.

    Returns:
        The plan, as for a training step. Its peak is that of the largest program, its temporaries are that program's
        memory besides its arguments, including activations, and its operations are those of all programs.

    Raises:
        UserError: the target is unknown, has several devices, or its compiler is missing.
    """
    target = find(name)
    if target.devices > 1:
        raise UserError(f"--target={name} has several devices, but stage=grpo uses one: name a target with one device")
    clips = clips or config.batch
    mesh = sharding.one_device(devices(name))

    def lay_out() -> tuple[dict[str, int], list[Program]]:
        held, programs = _lay_out(config, clips, mesh)
        return {
            "frozen_bytes": held["frozen"] + held["merged"],
            "trained_bytes": held["trained"] + held["reference"],
            "optimizer_bytes": held["moments"],
        }, programs

    return plan_of(lay_out, config, name, clips, mesh, lambda resident, _: _advice(resident, target.usable))


def _advice(resident: int, usable: int) -> str:
    """Suggests a change that makes an iteration fit; `resident` bytes stay on the device."""
    if resident > usable:
        return f"a device with more memory: {resident / GIB:.1f} GiB of weights and moments stay on it"
    return "a smaller rl.group or rl.max_new_tokens"


def _lay_out(config: Config, clips: int, mesh: Mesh) -> tuple[dict[str, int], list[Program]]:
    """Returns the bytes that stay on the device, by kind, and the programs of an iteration in their order."""
    dtype, llm = jnp.dtype(config.model.dtype), plan.language_model(config)
    model, shapes = plan.model_and_weights(config)
    trainable, frozen = stages.split(shapes, config.variant, config.stage)
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in frozen.items()}
    optimizer = make_optimizer(config.optimizer, plan.STEPS)
    state = jax.eval_shape(lambda weights: new_state(weights, optimizer, config.seed), trainable)
    state = sharding.as_placed(state, sharding.state_partitions(state, mesh))
    frozen = sharding.as_placed(frozen, sharding.partitions(frozen, mesh))
    decoding = jax.eval_shape(lambda weights: from_training(weights, config, llm), {**state.trainable, **frozen})
    decoding = sharding.as_placed(decoding, sharding.partitions(decoding, mesh))
    held = {
        "frozen": plan.device_bytes(frozen),
        "merged": plan.device_bytes({path: leaf for path, leaf in decoding.items() if path not in shapes}),
        "trained": plan.device_bytes(state.trainable),
        "reference": plan.device_bytes(state.trainable),
        "moments": plan.device_bytes(state.moments),
    }
    asked, settings = question(config, clips, mesh), config.rl
    long = {"prompt": PROMPT, "new": settings.max_new_tokens, "copies": settings.group}
    decoder = Decoder(config, llm, END, mesh=mesh)
    features, rollouts = answering(config, clips, decoder, mesh, decoding, asked, **long)
    update = policy.make_update(model, optimizer, config.rl, config.loss_chunk, mesh).__wrapped__
    # Wrapped in a new jit, without the compiler options of the platform that compiles.
    compiled = policy.make_score(model, config.rl, config.loss_chunk, mesh), jax.jit(update, donate_argnums=0)
    return held, [*rollouts, *_updates(config, clips, compiled, state, frozen, features, asked, mesh)]


def _updates(
    config: Config, clips: int, compiled: tuple, state: Any, frozen: dict, features: Any, asked: dict, mesh: Mesh
) -> list[Program]:
    """Returns the programs that score the responses (by policy and reference) and that update the policy."""
    score, update = compiled
    size = clips, config.rl.group, PROMPT + config.rl.max_new_tokens
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
            config.rl.updates,
        ),
    ]
