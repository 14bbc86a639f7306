"""Plans a stage's training step for devices that are not available: its memory, its operations and its shortest time.

The compiled step is exactly the one that `favchat_jax.train` runs. Its arguments are shapes, so no weight is created.
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
from favchat_jax.checkpoints.initial import new_state
from favchat_jax.checkpoints.mistral_folder import read_config
from favchat_jax.checkpoints.run import weight_shapes
from favchat_jax.config import Config
from favchat_jax.errors import UserError, one_line
from favchat_jax.models import favchat
from favchat_jax.models.kernels.platform import PLAIN, compiling_for
from favchat_jax.models.kernels.quantized import store
from favchat_jax.models.mistral import MistralConfig
from favchat_jax.planning import cost
from favchat_jax.planning.targets import GIB, devices, find
from favchat_jax.training.optimizer import make_optimizer, schedule
from favchat_jax.training.step import batch_loss, make_step

# Triton chooses its matrix products by timing them on a GPU. Those of cuBLAS take as much memory or more.
OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}}
STEPS = 1000  # length of the schedule; it does not affect the plan


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the memory and time that a compiled step needs. Bytes are per device, other figures for all devices.

    Attributes:
        target: name of the target.
        stage: name of the stage, or answer.
        storage: width of the language model's kernels.
        devices: number of devices of the target.
        clips: clips per step.
        frozen_bytes: weights that do not train.
        trained_bytes: weights that train.
        optimizer_bytes: moments of the trained weights.
        activation_bytes: values that the forward pass keeps for the backward pass.
        temporary_bytes: all other memory except the arguments: gradients, gathered weights, scratch.
        argument_bytes: the arguments, as reported by the compiler.
        temp_bytes: memory in addition to the arguments, as reported by the compiler.
        peak_bytes_per_device: peak memory, as reported by the compiler.
        flops_per_step: operations of the model's matrix products, without rematerialisation.
        executed_flops: operations of all matrix products of the compiled step.
        roofline_seconds: lower bound of a step's time, from its products and from the traffic between devices.
        mfu_ceiling: flops_per_step in that time, as a share of the devices' peak rate.
        compile_seconds: time of the compilation.
        fits: whether the peak is within the usable memory.
        headroom_bytes: usable memory minus the peak; negative if the step does not fit.
        advice: option that would make the step fit; empty if it fits.
    """

    target: str
    stage: str
    storage: str
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
    """Holds a training step and the shapes of its arguments with their shardings."""

    step: Any
    state: Any
    frozen: Any
    batch: Any


def make_plan(config: Config, name: str, clips: int | None = None) -> Plan:
    """Compiles the training step of a config for a target.

    Args:
        config: config of a training stage.
        name: name of the target.
        clips: clips per step on all devices; by default the target's.

    Raises:
        UserError: the target is unknown, its compiler is missing, the batch does not divide among the devices, or the
            stage has no training step.
    """
    target = find(name)
    mesh, clips = _mesh_and_clips(config, name, clips)
    arguments = lay_out(config, mesh, clips)
    started = time.perf_counter()
    lowered = arguments.step.lower(arguments.state, arguments.frozen, arguments.batch)
    memory = lowered.compile(compiler_options=OPTIONS.get(target.platform)).memory_analysis()
    compile_seconds = time.perf_counter() - started
    frozen = device_bytes(arguments.frozen)
    activations = _activations_of_one_clip(config, mesh.devices.flat[0].platform)
    executed = _executed(config, clips)
    share = clips // (mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate)
    compute = cost.roofline_seconds(executed, mesh.size, target.flops, target.bandwidth)
    transfer = _received_bytes(arguments, config) / target.link if target.link else 0.0
    return summarise(
        name,
        config,
        clips,
        memory,
        peak=memory.peak_memory_in_bytes,
        held={
            "frozen_bytes": frozen,
            "trained_bytes": device_bytes(arguments.state.trainable),
            "optimizer_bytes": device_bytes(arguments.state.moments),
            "activation_bytes": min(activations * share, memory.temp_size_in_bytes),
        },
        needed_flops=flops_of_one_clip(config) * clips,
        executed_flops=cost.total_flops(executed),
        least_seconds=max(compute, transfer),
        compile_seconds=compile_seconds,
        advise=lambda lacking: _advice(config, share, lacking, memory.temp_size_in_bytes, frozen),
    )


def summarise(
    name: str,
    config: Config,
    clips: int,
    memory: Any,
    *,
    peak: int,
    held: Mapping[str, int],
    needed_flops: float,
    executed_flops: float,
    least_seconds: float,
    compile_seconds: float,
    advise: Callable[[int], str],
) -> Plan:
    """Returns the plan of a step or an iteration that was compiled for a target.

    Args:
        name: name of the target.
        config: config of the stage.
        clips: clips per step.
        memory: the compiler's memory analysis.
        peak: bytes that a device needs.
        held: bytes of weights, moments and activations, under the names of `Plan`.
        needed_flops: operations of the model's matrix products, without rematerialisation.
        executed_flops: operations of all matrix products.
        least_seconds: lower bound of the time.
        compile_seconds: time of the compilation.
        advise: returns the option that would make it fit, given the lacking bytes.
    """
    target = find(name)
    headroom = target.usable - peak
    return Plan(
        target=name,
        stage=config.stage,
        storage=config.llm.storage,
        devices=target.devices,
        clips=clips,
        **held,
        temporary_bytes=memory.temp_size_in_bytes - held["activation_bytes"],
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes_per_device=peak,
        flops_per_step=needed_flops,
        executed_flops=executed_flops,
        roofline_seconds=least_seconds,
        mfu_ceiling=needed_flops / (target.devices * target.flops * least_seconds),
        compile_seconds=compile_seconds,
        fits=headroom >= 0,
        headroom_bytes=headroom,
        advice="" if headroom >= 0 else advise(-headroom),
    )


def lay_out(config: Config, mesh: Mesh, clips: int) -> Arguments:
    """Returns the training step of a config on a mesh, and the shapes of its arguments.

    Raises:
        UserError: the batch does not divide among the devices, or the stage has no training step.
    """
    if stages.STAGES[config.stage].text is None:
        raise UserError(
            f"stage={config.stage} draws its own responses, and has no single step to save: leave out --save"
        )
    sharding.check_batch(clips, config.accumulate, mesh, f"clips={clips}")
    model, shapes = model_and_weights(config)
    trainable, frozen = stages.split(shapes, config.variant, config.stage)
    frozen = stored(frozen, config)
    optimizer, rate = make_optimizer(config.optimizer, STEPS), schedule(config.optimizer, STEPS)
    state = jax.eval_shape(lambda weights: new_state(weights, optimizer, config.seed), trainable)
    batch = batch_shapes(config, clips)
    return Arguments(
        step=make_step(model, optimizer, rate, accumulate=config.accumulate, chunk=config.loss_chunk, mesh=mesh),
        state=sharding.as_placed(state, sharding.state_partitions(state, mesh)),
        frozen=sharding.as_placed(frozen, sharding.partitions(frozen, mesh)),
        batch=sharding.as_placed(batch, jax.tree.map(lambda _: sharding.batch_partition(mesh), batch)),
    )


def stored(frozen: dict[str, Any], config: Config) -> dict[str, Any]:
    """Returns the shapes of frozen weights in the computation's dtype and the config's storage."""
    dtype = jnp.dtype(config.model.dtype)
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in frozen.items()}
    return jax.eval_shape(lambda weights: store(weights, config.llm.storage), frozen)


def batch_shapes(config: Config, clips: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of `data.loader` in the longest bucket."""
    words, longest = config.data.prompt_length, config.data.buckets[-1]
    questions = config.data.questions if stages.STAGES[config.stage].text in ("qa", "face_qa") else 1
    shapes = {
        "frames": (config.frames_shape, jnp.uint8),
        "tokens": ((questions, longest), jnp.int32),
        "loss_mask": ((questions, longest), jnp.bool_),
        "prompt": ((questions, words), jnp.int32),
        "prompt_mask": ((questions, words), jnp.bool_),
    }
    return {name: jax.ShapeDtypeStruct((clips, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def save(config: Config, name: str, clips: int | None = None) -> bytes:
    """Lowers the training step of a config for a target and serialises it; `load` restores it on the target.

    The bytes hold the program and the shardings, but no weights and no Python code. Arguments and results are flat
    lists.
    """
    return export_step(lay_out(config, *_mesh_and_clips(config, name, clips)), find(name).platform)


def _mesh_and_clips(config: Config, name: str, clips: int | None) -> tuple[Mesh, int]:
    """Returns the config's mesh over a target's devices, or over some of them, and the clips per step."""
    mesh = sharding.make_mesh(config.mesh, devices(name))
    return mesh, clips or find(name).clips or config.batch * mesh.size


def export_step(arguments: Arguments, platform: str) -> bytes:
    """Serialises a training step for a platform, see `save`."""
    leaves, tree = jax.tree.flatten((arguments.state, arguments.frozen, arguments.batch))
    shards = [leaf.sharding for leaf in leaves]
    step = arguments.step.__wrapped__  # a function compiled within another cannot have compiler options of its own
    flat = jax.jit(lambda *leaves: jax.tree.leaves(step(*tree.unflatten(leaves))), in_shardings=shards)
    return export.export(flat, platforms=[platform])(*leaves).serialize()


def load(artefact: bytes) -> export.Exported:
    """Restores a saved step, which `.call(*leaves)` runs; nothing is unpickled.

    Raises:
        UserError: the bytes are not a saved step.
    """
    try:
        return export.deserialize(bytearray(artefact))
    except Exception as error:  # the format's reader raises errors of many kinds
        reason = one_line(error)
        raise UserError(f"this is not a saved step ({reason}): make it again with tools.aot_compile --save") from None


@functools.lru_cache(maxsize=8)
def model_and_weights(config: Config) -> tuple[favchat.FaVChat, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the model of a config in its training form, and the shapes of its weights by path."""
    model = build(config)
    return model, weight_shapes(model, config.model)


def language_model(config: Config) -> MistralConfig:
    """Returns the sizes of a config's language model.

    Raises:
        UserError: the config names no folder, and its preset is not the paper's.
    """
    if config.llm.path:
        return read_config(config.llm.path)
    if config.preset == "paper":
        return MistralConfig()
    raise UserError("llm.path is not set: name the Hugging Face folder of a Mistral with --config.llm.path=DIR")


@functools.lru_cache(maxsize=8)
def flops_of_one_clip(config: Config) -> float:
    """Returns the operations of the forward and backward pass on one clip, without rematerialisation.

    They are counted with plain attention, since a custom kernel hides its products.
    """
    loss, (trainable, frozen, batch) = _loss_of_one_clip(config.updated({"model.remat": ""}))
    with compiling_for(PLAIN):
        return cost.total_flops(cost.products(jax.make_jaxpr(jax.value_and_grad(loss))(trainable, frozen, batch)))


@functools.lru_cache(maxsize=8)
def _activations_of_one_clip(config: Config, platform: str) -> int:
    """Returns the bytes that the forward pass on one clip keeps, with rematerialisation and a platform's attention."""
    loss, (trainable, frozen, batch) = _loss_of_one_clip(config)

    def forward(weights, frozen, batch):
        value, backward = jax.vjp(lambda w: loss(w, frozen, batch), weights)
        return value, [leaf for leaf in jax.tree.leaves(backward) if isinstance(leaf, jax.Array)]

    with compiling_for(platform):
        kept = jax.make_jaxpr(forward)(trainable, frozen, batch)
    weights = {leaf.shape for leaf in (*trainable.values(), *frozen.values())}
    return cost.saved_bytes(kept, weights)


def _loss_of_one_clip(config: Config) -> tuple[Callable, tuple]:
    """Returns the loss of a batch of one clip, and the shapes of its arguments."""
    model, shapes = model_and_weights(config)
    trainable, frozen = stages.split(shapes, config.variant, config.stage)

    def loss(weights, frozen, batch):
        return batch_loss(model, {**weights, **frozen}, batch, jax.random.key(0), config.loss_chunk)[0]

    return loss, (trainable, stored(frozen, config), batch_shapes(config, 1))


@functools.lru_cache(maxsize=8)
def _executed(config: Config, clips: int) -> list[cost.Product]:
    """Returns all matrix products of a step, traced for a CPU, whose plain attention shows its products."""
    arguments = lay_out(config, sharding.one_device(), clips)
    return list(cost.products(arguments.step.trace(arguments.state, arguments.frozen, arguments.batch).jaxpr))


def build(config: Config) -> favchat.FaVChat:
    """Builds the model of a config in its training form."""
    return favchat.build(
        config.model,
        language_model(config),
        variant=config.variant,
        ablation=config.ablation,
        lora_rank=config.lora_rank,
        storage=config.llm.storage,
    )


def _shard_size(leaf: Any) -> int:
    """Returns the number of elements of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def device_bytes(tree: Any) -> int:
    """Returns the bytes of a tree on one device."""
    return sum(_shard_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _received_bytes(arguments: Arguments, config: Config) -> float:
    """Returns the bytes that a device receives in a step.

    These are sharded weights, gathered for the forward pass and again for the backward pass in the computation's dtype,
    and float32 gradients, which each device sums for its own shard.
    """

    def elsewhere(tree):
        return sum(leaf.size - _shard_size(leaf) for leaf in jax.tree.leaves(tree))

    trained = elsewhere(arguments.state.trainable)
    width = jnp.dtype(config.model.dtype).itemsize
    return 2 * width * (elsewhere(arguments.frozen) + trained) + 4 * trained


def _advice(config: Config, share: int, lacking: int, temp: int, frozen: int) -> str:
    """Suggests the option that frees the lacking bytes, by an estimate.

    Args:
        config: config of the stage.
        share: clips of a device in one part of the batch.
        lacking: bytes that a device lacks.
        temp: bytes in addition to the arguments; splitting the batch into n parts divides them by n.
        frozen: bytes of frozen weights.
    """
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
