"""Plans answers for devices that are not available: clips are encoded, prompts read, and tokens drawn.

It compiles the programs that `generation.decoding` runs, with shapes as arguments. The weights stay on the devices
between them.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from favchat_jax import sharding
from favchat_jax.config import Config, MeshConfig
from favchat_jax.generation.decoding import Decoder, Decoding
from favchat_jax.generation.sampler import Sampling
from favchat_jax.generation.weights import from_training, size_of
from favchat_jax.models.kernels.platform import PLAIN, compiling_for
from favchat_jax.planning import cost, plan
from favchat_jax.planning.targets import GIB, devices, find

PROMPT = 512  # tokens of a prompt: a clip's visual tokens, the instruction and a question
NEW = 128  # tokens of an answer
END = 2  # Mistral's end-of-text token


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function, with its arguments as shapes with their shards.

    Attributes:
        name: its name.
        function: the jitted function.
        arguments: its arguments.
        options: its static arguments.
        weights: bytes of its arguments on a device that stay there between programs.
        times: how often the products of the function, or of `once`, are computed.
        once: one turn of its loop, for a loop that ends when all sequences have ended.
    """

    name: str
    function: Any
    arguments: tuple
    options: dict[str, int]
    weights: int
    times: int = 1
    once: Any = None


def make_plan(
    config: Config, name: str, clips: int = 1, storage: str = "full", sizes: MeshConfig | None = None
) -> plan.Plan:
    """Compiles the programs that answer one question about each of some clips, on a target.

    Args:
        config: of the stage whose model answers.
        name: name of the target.
        clips: number of clips that are answered together.
        storage: width of the language model's kernels.
        sizes: of the mesh; by default the one that answering picks.

    Returns:
        The plan, as for a training step. Its peak is that of the largest program, its temporaries are that program's
        memory besides its arguments, and its operations are those of all programs.

    Raises:
        UserError: the target is unknown, its compiler is missing, or the mesh does not suit it.
    """
    target, llm = find(name), plan.language_model(config)
    mesh = sharding.answering_mesh(
        sizes,
        heads=llm.num_key_value_heads,
        batch=clips,
        weights=size_of(plan.model_and_weights(config)[1], config, storage),
        devices=devices(name),
        memory=target.memory,
    )

    def lay_out() -> tuple[dict[str, int], list[Program]]:
        weights = decoding_weights(config, mesh, storage)
        decoder = Decoder(config, llm, END, storage=storage, mesh=mesh)
        asked = question(config, clips, mesh)
        _, programs = answering(config, clips, decoder, mesh, weights, asked, prompt=PROMPT, new=NEW)
        return {"frozen_bytes": plan.device_bytes(weights), "trained_bytes": 0, "optimizer_bytes": 0}, programs

    made = plan_of(lay_out, config, name, clips, mesh, lambda _, lacking: _advice(lacking, storage, mesh))
    return dataclasses.replace(made, stage="answer", storage=storage, devices=mesh.size)


def _advice(lacking: int, storage: str, mesh: Mesh) -> str:
    if storage == "full":
        return "--storage=int8"
    return f"fewer clips, or more devices: {lacking / GIB:.1f} GiB are lacking on each of {mesh.size}"


def decoding_weights(config: Config, mesh: Mesh, storage: str = "full") -> dict[str, Any]:
    """Returns the shapes of all weights in the decoding form with their shards, matrices in the computation's dtype."""
    dtype, llm = jnp.dtype(config.model.dtype), plan.language_model(config)
    shapes = plan.model_and_weights(config)[1]
    given = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype if len(leaf.shape) > 1 else leaf.dtype)
        for path, leaf in shapes.items()
    }
    flat = jax.eval_shape(lambda weights: from_training(weights, config, llm, storage), given)
    return sharding.as_placed(flat, sharding.partitions(flat, mesh))


def question(config: Config, clips: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a question about each clip, as the Q-Formers read it."""
    words = clips, 1, config.data.prompt_length
    return rows({"prompt": (words, jnp.int32), "prompt_mask": (words, jnp.bool_)}, mesh)


def answering(
    config: Config,
    clips: int,
    decoder: Decoder,
    mesh: Mesh,
    weights: Mapping[str, Any],
    asked: Mapping[str, Any],
    *,
    prompt: int,
    new: int,
    copies: int = 1,
) -> tuple[Any, list[Program]]:
    """Returns the shapes of the clips' features, and the programs that compute features and answers.

    Args:
        config: of the model.
        clips: number of clips.
        decoder: of the model.
        mesh: devices that answer.
        weights: from `decoding_weights`.
        asked: from `question`.
        prompt: tokens of a prompt.
        new: tokens of an answer.
        copies: answers to each prompt.
    """
    held = plan.device_bytes(weights)
    params = {"params": unflatten_dict(weights, sep="/")}
    frames = rows({"frames": ((clips, *config.frames_shape), jnp.uint8)}, mesh)["frames"]
    features = _split(jax.eval_shape(decoder.encode, params, frames), mesh)
    prompts = rows({"tokens": ((clips, 1, prompt), jnp.int32), "last": ((clips,), jnp.int32)}, mesh) | dict(asked)
    everywhere = NamedSharding(mesh, P())
    key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere)
    how = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=everywhere), Sampling().drawing())
    reading = (params, features, prompts, key, how)
    room = {"room": new, "copies": copies}
    begun = jax.eval_shape(lambda *x: decoder.begin(*x, **room), *reading)
    cache = jax.tree.map(lambda leaf: _cache_shape(leaf, mesh), begun.cache)
    begun = _split(begun, mesh)._replace(cache=cache, key=key)

    def one_token(params, state: Decoding, *_):
        return decoder.model.apply(params, state.token, state.position, state.cache, method="decode")

    return features, [
        Program("encode", decoder.encode, (params, frames), {}, held),
        Program("begin", decoder.begin, reading, room, held),
        Program("advance", decoder.advance, (params, begun, how), {"count": new - 1}, held, new - 1, one_token),
    ]


def plan_of(
    lay_out: Callable[[], tuple[dict[str, int], list[Program]]],
    config: Config,
    name: str,
    clips: int,
    mesh: Mesh,
    advise: Callable[[int, int], str],
) -> plan.Plan:
    """Compiles programs for a target, one after another, and plans them together.

    Args:
        lay_out: returns the bytes that stay on a device, under the names of `Plan`, and the programs.
        config: of the stage.
        name: name of the target.
        clips: number of clips.
        mesh: devices of the target.
        advise: returns what would make it fit, given the bytes that stay on a device and those that it lacks.
    """
    target, started = find(name), time.perf_counter()
    with compiling_for(mesh.devices.flat[0].platform):
        held, programs = lay_out()
        resident = sum(held.values())
        peak, memory = largest(programs, resident, target.platform)
    products = [product for program in programs for product in program_products(program)]
    flops = cost.total_flops(products)
    return plan.summarise(
        name,
        config,
        clips,
        memory,
        peak=peak,
        held={**held, "activation_bytes": 0},
        needed_flops=flops,
        executed_flops=flops,
        least_seconds=cost.roofline_seconds(products, mesh.size, target.flops, target.bandwidth),
        compile_seconds=time.perf_counter() - started,
        advise=lambda lacking: advise(resident, lacking),
    )


def largest(programs: list[Program], resident: int, platform: str) -> tuple[int, Any]:
    """Compiles programs; returns the bytes that a device needs for the largest, and the compiler's analysis of it.

    Args:
        programs: of one kind of device.
        resident: bytes that stay on a device between them.
        platform: of the target.
    """
    peaks = []
    for program in programs:
        lowered = program.function.lower(*program.arguments, **program.options)
        memory = lowered.compile(compiler_options=plan.OPTIONS.get(platform)).memory_analysis()
        # The compiler counts only the arguments that the program reads, but all of them occupy memory.
        taken = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
        peaks.append((resident + plan.device_bytes(program.arguments) - program.weights + taken, memory))
    return max(peaks, key=lambda found: found[0])


def program_products(program: Program) -> Iterator[cost.Product]:
    """Yields the products of all runs of a program, on all devices together."""
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), program.arguments)
    function = program.once or (lambda *arguments: program.function.__wrapped__(*arguments, **program.options))
    with compiling_for(PLAIN):
        traced = jax.make_jaxpr(function)(*arguments)
    for product in cost.products(traced):
        yield dataclasses.replace(product, times=product.times * program.times)


def rows(of: Mapping[str, tuple], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes as arrays that `sharding.place_rows` has placed."""
    return _split({name: jax.ShapeDtypeStruct(*shape_and_dtype) for name, shape_and_dtype in of.items()}, mesh)


def _split(shapes: Any, mesh: Mesh) -> Any:
    return sharding.as_placed(shapes, jax.tree.map(lambda leaf: sharding.rows_partition(leaf.shape, mesh), shapes))


def _cache_shape(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    spec = P(*sharding.divided(leaf.shape, sharding.cache_axes(len(leaf.shape)), mesh))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
