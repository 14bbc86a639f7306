"""Plans an iteration of the reinforcement stage for a device that is not available: rollouts, scores and updates.

It compiles the programs that `rl.de_grpo` runs, in its order, with shapes as arguments. Arrays that stay on the device
between programs count in each of them: the language model's base with separate adapters (scores, updates) and with
merged ones (rollouts), the moments, and the adapters at the start of the run.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import SingleDeviceSharding

from favchat_jax import stages
from favchat_jax.checkpoints.initial import new_state
from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.generation.decoding import Decoder, Decoding
from favchat_jax.generation.weights import from_training
from favchat_jax.models.kernels.platform import PLAIN, compiling_for
from favchat_jax.planning import cost, plan
from favchat_jax.planning.targets import GIB, devices, find
from favchat_jax.rl import policy
from favchat_jax.training.optimizer import make_optimizer

PROMPT = 256  # tokens of a prompt: a clip's visual tokens, the instruction and a question
END = 2  # Mistral's end-of-text token


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function of an iteration, with its arguments as shapes.

    Attributes:
        name: its name.
        function: the jitted function.
        arguments: its arguments.
        options: its static arguments.
        weights: bytes of its arguments that stay on the device between programs.
        times: how often an iteration computes the products of the function, or of `once`.
        once: one turn of its loop, for a loop that ends when all responses have ended.
    """

    name: str
    function: Any
    arguments: tuple
    options: dict[str, int]
    weights: int
    times: int = 1
    once: Any = None


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
    device = devices(name)[0]
    held, programs = _lay_out(config, clips, device)
    resident, started = sum(held.values()), time.perf_counter()
    peaks, products = [], []
    for program in programs:
        with compiling_for(device.platform):
            lowered = program.function.lower(*program.arguments, **program.options)
        memory = lowered.compile(compiler_options=plan.OPTIONS.get(target.platform)).memory_analysis()
        # The compiler counts only the arguments that the program reads, but all of them occupy memory.
        taken = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
        peaks.append((resident + _bytes(program.arguments) - program.weights + taken, memory))
        products += list(_products(program))
    peak, memory = max(peaks, key=lambda found: found[0])
    flops = cost.total_flops(products)
    return plan.summarise(
        name,
        config,
        clips,
        memory,
        peak=peak,
        held={
            "frozen_bytes": held["frozen"] + held["merged"],
            "trained_bytes": held["trained"] + held["reference"],
            "optimizer_bytes": held["moments"],
            "activation_bytes": 0,
        },
        needed_flops=flops,
        executed_flops=flops,
        least_seconds=cost.roofline_seconds(products, 1, target.flops, target.bandwidth),
        compile_seconds=time.perf_counter() - started,
        advise=lambda _: _advice(resident, target.usable),
    )


def _advice(resident: int, usable: int) -> str:
    """Suggests a change that makes an iteration fit; `resident` bytes stay on the device."""
    if resident > usable:
        return f"a device with more memory: {resident / GIB:.1f} GiB of weights and moments stay on it"
    return "a smaller rl.group or rl.max_new_tokens"


def _lay_out(config: Config, clips: int, device: jax.Device) -> tuple[dict[str, int], list[Program]]:
    """Returns the bytes that stay on the device, by kind, and the programs of an iteration in their order."""
    dtype = jnp.dtype(config.model.dtype)
    model, shapes = plan.model_and_weights(config)
    trainable, frozen = stages.split(shapes, config.variant, config.stage)
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in frozen.items()}
    optimizer = make_optimizer(config.optimizer, plan.STEPS)
    state = jax.eval_shape(lambda weights: new_state(weights, optimizer, config.seed), trainable)
    decoder = Decoder(config, plan.language_model(config), END)
    decoding = jax.eval_shape(lambda w: from_training(w, config, plan.language_model(config)), {**trainable, **frozen})
    merged = {"params": unflatten_dict(decoding, sep="/")}
    held = {
        "frozen": _bytes(frozen),
        "merged": _bytes({path: leaf for path, leaf in decoding.items() if path not in shapes}),
        "trained": _bytes(trainable),
        "reference": _bytes(trainable),
        "moments": _bytes(state.moments),
    }
    words = clips, 1, config.data.prompt_length
    asked = _shapes({"prompt": (words, jnp.int32), "prompt_mask": (words, jnp.bool_)})
    features, rollouts = _rollouts(config, clips, decoder, merged, asked)
    update = policy.make_update(model, optimizer, config.rl, config.loss_chunk).__wrapped__
    # Wrapped in a new jit, without the compiler options of the platform that compiles.
    compiled = policy.make_score(model, config.rl, config.loss_chunk), jax.jit(update, donate_argnums=0)
    programs = [*rollouts, *_updates(config, clips, compiled, state, frozen, features, asked)]
    where = SingleDeviceSharding(device)
    return held, [dataclasses.replace(p, arguments=_placed(p.arguments, where)) for p in programs]


def _rollouts(config: Config, clips: int, decoder: Decoder, merged: Any, asked: dict) -> tuple[Any, list[Program]]:
    """Returns the shapes of the clips' features, and the programs that compute the features and the responses.

    `asked` is the question for the Q-Formers.
    """
    settings, size, weights = config.rl, config.model.image_size, _bytes(merged)
    frames = jax.ShapeDtypeStruct((clips, config.model.frames, size, size, 3), jnp.uint8)
    features = jax.eval_shape(decoder.encode, merged, frames)
    prompts = _shapes({"tokens": ((clips, 1, PROMPT), jnp.int32), "last": ((clips,), jnp.int32)}) | asked
    key, how = jax.ShapeDtypeStruct((2,), jnp.uint32), (jax.ShapeDtypeStruct((), jnp.float32),) * 2
    reading = (merged, features, prompts, key, *how)
    room = {"room": settings.max_new_tokens, "copies": settings.group}
    begun = jax.eval_shape(lambda *x: decoder.begin(*x, **room), *reading)
    rest = settings.max_new_tokens - 1

    def one_token(params, state: Decoding, *_):
        return decoder.model.apply(params, state.token, state.position, state.cache, method="decode")

    return features, [
        Program("encode", decoder.encode, (merged, frames), {}, weights),
        Program("begin", decoder.begin, reading, room, weights),
        Program("advance", decoder.advance, (merged, begun, *how), {"count": rest}, weights, rest, one_token),
    ]


def _updates(
    config: Config, clips: int, compiled: tuple, state: Any, frozen: dict, features: Any, asked: dict
) -> list[Program]:
    """Returns the programs that score the responses (by policy and reference) and that update the policy."""
    score, update = compiled
    size = clips, config.rl.group, PROMPT + config.rl.max_new_tokens
    batch = _shapes({"tokens": (size, jnp.int32)}) | asked
    judged = {name: (size, jnp.float32) for name in ("old", "reference")}
    judged = _shapes({**judged, "counted": (size, jnp.bool_), "advantages": (size[:2], jnp.float32)})
    weights = _bytes((state.trainable, frozen))
    return [
        Program("score", score, (state.trainable, frozen, features, batch), {}, weights, 2),
        Program(
            "update",
            update,
            (state, frozen, features, {**batch, **judged}),
            {},
            weights + _bytes(state.moments),
            config.rl.updates,
        ),
    ]


def _products(program: Program) -> Iterator[cost.Product]:
    """Yields the products of all runs of a program in an iteration."""
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), program.arguments)
    function = program.once or (lambda *arguments: program.function.__wrapped__(*arguments, **program.options))
    with compiling_for(PLAIN):
        traced = jax.make_jaxpr(function)(*arguments)
    for product in cost.products(traced):
        yield dataclasses.replace(product, times=product.times * program.times)


def _shapes(of: dict[str, tuple]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(*shape_and_dtype) for name, shape_and_dtype in of.items()}


def _placed(tree: Any, where: SingleDeviceSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
