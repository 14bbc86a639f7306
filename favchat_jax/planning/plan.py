"""A stage's training step, compiled for devices that are not here: what it needs of them.

The step is the very one that `train.py` runs; only its arguments are shapes. No weight is ever made.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import Mesh

from favchat_jax import sharding, stages
from favchat_jax.checkpoints.mistral_folder import read_config
from favchat_jax.checkpoints.run import weight_shapes
from favchat_jax.config import Config
from favchat_jax.errors import UserError, one_line
from favchat_jax.models import favchat
from favchat_jax.models.kernels.attention import compiling_for
from favchat_jax.models.kernels.quantized import store
from favchat_jax.models.mistral import MistralConfig
from favchat_jax.planning import cost
from favchat_jax.planning.targets import GIB, devices, find
from favchat_jax.training.optimizer import make_optimizer, schedule
from favchat_jax.training.step import batch_loss, make_step, new_state

# Triton's products are chosen by trying them out, for which there is no GPU; cuBLAS's take as much memory or more.
OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}}
STEPS = 1000  # of the schedule, whose length changes nothing here


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled step needs. Bytes are a device's; the rest is of all devices together.

    Attributes:
        frozen_bytes, trained_bytes, optimizer_bytes: weights that do not and do learn, and moments.
        activation_bytes: what the forward pass keeps for the backward pass.
        temporary_bytes: the rest of what the step takes beside its arguments: gradients, gathered weights, scratch.
        argument_bytes, temp_bytes, peak_bytes_per_device: the compiler's own account.
        flops_per_step: products that the model needs; `executed_flops` has those of rematerialisation besides.
        roofline_seconds: least time of a step: of its products, or of moving weights and gradients between devices.
        mfu_ceiling: flops_per_step in that time, as a share of what the devices can do.
        fits: whether the peak is within the usable memory; headroom_bytes: by how much, or how little.
        advice: which option would make it fit; empty where it does.
    """

    target: str
    stage: str
    devices: int
    clips: int
    frozen_bytes: int
    trained_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    temporary_bytes: int
    argument_bytes: int
    temp_bytes: int
    peak_bytes_per_device: int
    flops_per_step: float
    executed_flops: float
    roofline_seconds: float
    mfu_ceiling: float
    compile_seconds: float
    fits: bool
    headroom_bytes: int
    advice: str


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The shapes of a step's arguments and where they lie, and the step."""

    model: favchat.FaVChat
    step: Any
    state: Any
    frozen: Any
    batch: Any


def make_plan(config: Config, name: str, clips: int | None = None) -> Plan:
    """Compiles the step of a config for a target.

    Args:
        config: of a training stage.
        name: the target's.
        clips: of a step, on all devices; by default as the target says.

    Raises:
        UserError: the target is unknown or its compiler missing, the batch does not divide, or the stage is no
            training.
    """
    target = find(name)
    mesh, clips = _mesh_and_clips(config, name, clips)
    arguments = lay_out(config, mesh, clips)
    started = time.perf_counter()
    lowered = arguments.step.lower(arguments.state, arguments.frozen, arguments.batch)
    memory = lowered.compile(compiler_options=OPTIONS.get(target.platform)).memory_analysis()
    seconds = time.perf_counter() - started
    frozen = _held(arguments.frozen)
    flops, activations = _of_one_clip(config, mesh.devices.flat[0].platform)
    executed = _executed(config, clips)
    share = clips // (mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate)
    activations = min(activations * share, memory.temp_size_in_bytes)
    least = max(
        cost.roofline_seconds(executed, mesh.size, target.flops, target.bandwidth),
        _moved(arguments, config) / target.link if target.link else 0.0,
    )
    return plan_of(
        name,
        config,
        clips,
        memory,
        peak=memory.peak_memory_in_bytes,
        held={
            "frozen_bytes": frozen,
            "trained_bytes": _held(arguments.state.trainable),
            "optimizer_bytes": _held(arguments.state.moments),
            "activation_bytes": activations,
        },
        flops=(flops * clips, cost.total_flops(executed)),
        seconds=(least, seconds),
        advise=lambda lacking: _advice(config, share, lacking, memory.temp_size_in_bytes, frozen),
    )


def plan_of(
    name: str,
    config: Config,
    clips: int,
    memory: Any,
    *,
    peak: int,
    held: Mapping[str, int],
    flops: tuple[float, float],
    seconds: tuple[float, float],
    advise: Callable[[int], str],
) -> Plan:
    """The plan of what was compiled for a target.

    Args:
        name: the target's.
        config: of the stage.
        clips: of a step.
        memory: the compiler's account of it.
        peak: bytes that a device needs.
        held: bytes of weights, moments and activations, under the names of `Plan`.
        flops: of the step's products, as the model needs them and as they are executed.
        seconds: that a step takes at least, and that compiling took.
        advise: which option would make it fit, given the bytes that are lacking.
    """
    target, (needed, executed), (least, compiling) = find(name), flops, seconds
    headroom = target.usable - peak
    return Plan(
        target=name,
        stage=config.stage,
        devices=target.devices,
        clips=clips,
        **held,
        temporary_bytes=memory.temp_size_in_bytes - held["activation_bytes"],
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes_per_device=peak,
        flops_per_step=needed,
        executed_flops=executed,
        roofline_seconds=least,
        mfu_ceiling=needed / (target.devices * target.flops * least),
        compile_seconds=compiling,
        fits=headroom >= 0,
        headroom_bytes=headroom,
        advice="" if headroom >= 0 else advise(-headroom),
    )


def lay_out(config: Config, mesh: Mesh, clips: int) -> Arguments:
    """The step of a config on a mesh, with the shapes of all that goes into it."""
    stage = stages.STAGES[config.stage]
    if stage.text is None:
        raise UserError(
            f"stage={config.stage} draws its own responses, and has no single step to save: leave out --save"
        )
    sharding.check_batch(clips, config.accumulate, mesh, "clips")
    model, shapes = model_and_weights(config)
    trainable, frozen = stages.split(shapes, config.variant, config.stage)
    frozen = _stored(frozen, config)
    optimizer, rate = make_optimizer(config.optimizer, STEPS), schedule(config.optimizer, STEPS)
    state = jax.eval_shape(lambda weights: new_state(weights, optimizer, config.seed), trainable)
    batch = batch_shapes(config, clips)
    return Arguments(
        model=model,
        step=make_step(model, optimizer, rate, accumulate=config.accumulate, chunk=config.loss_chunk, mesh=mesh),
        state=sharding.as_placed(state, sharding.state_partitions(state, mesh)),
        frozen=sharding.as_placed(frozen, sharding.partitions(frozen, mesh)),
        batch=sharding.as_placed(batch, jax.tree.map(lambda _: sharding.batch_partition(mesh), batch)),
    )


def _stored(frozen: dict[str, Any], config: Config) -> dict[str, Any]:
    """The shapes of frozen weights as a run of the config holds them."""
    dtype = jnp.dtype(config.model.dtype)
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in frozen.items()}
    return jax.eval_shape(lambda weights: store(weights, config.llm.storage), frozen)


def batch_shapes(config: Config, clips: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch in the longest bucket, as `data.loader` makes it."""
    size, words, longest = config.model.image_size, config.data.prompt_length, config.data.buckets[-1]
    questions = config.data.questions if stages.STAGES[config.stage].text in ("qa", "face_qa") else 1
    shapes = {
        "frames": ((config.model.frames, size, size, 3), jnp.uint8),
        "tokens": ((questions, longest), jnp.int32),
        "loss_mask": ((questions, longest), jnp.bool_),
        "prompt": ((questions, words), jnp.int32),
        "prompt_mask": ((questions, words), jnp.bool_),
    }
    return {name: jax.ShapeDtypeStruct((clips, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def save(config: Config, name: str, clips: int | None = None) -> bytes:
    """The step of a config, lowered for a target, as bytes that `load` turns into a function wherever the devices are.

    It holds the program and where everything lies, no weights and no Python; arguments and results are flat.
    """
    return export_step(lay_out(config, *_mesh_and_clips(config, name, clips)), find(name).platform)


def _mesh_and_clips(config: Config, name: str, clips: int | None) -> tuple[Mesh, int]:
    """The mesh of a config over a target's devices, not all of which it has to take, and the clips of a step there."""
    mesh = sharding.make_mesh(config.mesh, devices(name))
    return mesh, clips or find(name).clips or config.batch * mesh.size


def export_step(arguments: Arguments, platform: str) -> bytes:
    """`save` of a step that is laid out."""
    leaves, tree = jax.tree.flatten((arguments.state, arguments.frozen, arguments.batch))
    shards = [leaf.sharding for leaf in leaves]
    step = arguments.step.__wrapped__  # what is compiled within another function may have no options of its own
    flat = jax.jit(lambda *leaves: jax.tree.leaves(step(*tree.unflatten(leaves))), in_shardings=shards)
    return export.export(flat, platforms=[platform])(*leaves).serialize()


def load(artefact: bytes) -> export.Exported:
    """A saved step: `.call(*leaves)` runs it; raises UserError for other bytes. Nothing is unpickled."""
    try:
        return export.deserialize(bytearray(artefact))
    except Exception as error:  # the reader of the format raises what it stumbles over
        reason = one_line(error)
        raise UserError(f"this is no saved step ({reason}): make it again with tools.aot_compile --save") from None


@functools.lru_cache(maxsize=8)
def model_and_weights(config: Config) -> tuple[favchat.FaVChat, dict[str, jax.ShapeDtypeStruct]]:
    """The model of a config in its training form, and the shapes of its weights by path."""
    model = build(config)
    return model, weight_shapes(model, config)


def language_model(config: Config) -> MistralConfig:
    """Sizes of a config's language model; raises UserError where they are not known."""
    if config.preset == "paper" and not config.llm.path:
        return MistralConfig()
    if not config.llm.path:
        raise UserError("llm.path is not set: name the Hugging Face folder of a Mistral with --config.llm.path=DIR")
    return read_config(config.llm.path)


@functools.lru_cache(maxsize=8)
def _of_one_clip(config: Config, platform: str) -> tuple[float, int]:
    """(operations of the forward and backward pass without rematerialisation, bytes of activations with it).

    The operations are those of plain attention, whose products can be counted, the bytes those of the platform's.
    """
    trainable, frozen = stages.split(model_and_weights(config)[1], config.variant, config.stage)
    frozen = _stored(frozen, config)
    batch = batch_shapes(config, 1)

    def loss(model):
        def of(weights, frozen, batch):
            return batch_loss(model, {**weights, **frozen}, batch, jax.random.key(0), config.loss_chunk)[0]

        return of

    def forward(weights, frozen, batch):
        value, backward = jax.vjp(lambda w: loss(model_and_weights(config)[0])(w, frozen, batch), weights)
        return value, [leaf for leaf in jax.tree.leaves(backward) if isinstance(leaf, jax.Array)]

    with compiling_for(platform):
        kept = jax.make_jaxpr(forward)(trainable, frozen, batch)
    plain = build(config.updated({"model.remat": ""}))
    gradient = jax.make_jaxpr(jax.value_and_grad(loss(plain)))(trainable, frozen, batch)
    weights = {leaf.shape for leaf in (*trainable.values(), *frozen.values())}
    return cost.total_flops(cost.products(gradient)), cost.saved_bytes(kept, weights)


@functools.lru_cache(maxsize=8)
def _executed(config: Config, clips: int) -> list[cost.Product]:
    """The products of the whole step, traced for a CPU, where attention is plain and its products can be counted."""
    arguments = lay_out(config, sharding.one_device(), clips)
    return list(cost.products(arguments.step.trace(arguments.state, arguments.frozen, arguments.batch).jaxpr))


def build(config: Config) -> favchat.FaVChat:
    """The model of a config in its training form."""
    return favchat.build(
        config.model,
        language_model(config),
        variant=config.variant,
        ablation=config.ablation,
        lora_rank=config.lora_rank,
        storage=config.llm.storage,
    )


def _held(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _moved(arguments: Arguments, config: Config) -> float:
    """Bytes that a device receives in a step: cut weights, gathered for the forward and for the backward pass in the
    computation's dtype, and gradients in float32, summed where they lie."""
    width = jnp.dtype(config.model.dtype).itemsize

    def elsewhere(tree):
        return sum(leaf.size - math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))

    trained = elsewhere(arguments.state.trainable)
    return 2 * width * (elsewhere(arguments.frozen) + trained) + 4 * trained


def _advice(config: Config, share: int, lacking: int, temp: int, frozen: int) -> str:
    """Which option frees what is lacking, by estimate: the parts of a batch take turns with what a step needs beside
    its arguments. `share` is a device's clips in a part."""
    if not config.model.remat:
        return "model.remat=block"
    for parts in (2, 4, 8, 16):
        if share % parts == 0 and temp * (1 - 1 / parts) >= lacking:
            return f"accumulate={config.accumulate * parts}"
    if config.llm.storage == "full" and lacking <= 0.4 * frozen:
        return "llm.storage=int8"
    if lacking <= temp * (1 - 1 / share) + 0.9 * frozen:
        parts = f"accumulate={config.accumulate * share} on " if share > 1 else ""
        return f"{parts}two or more devices"
    return f"more devices: {lacking / GIB:.1f} GiB are lacking on each"
