"""Places arrays on devices: a mesh of three axes, and one table from a weight's path to mesh axes.

    data     splits the clips of a batch; every device along it has all weights
    fsdp     splits the clips and also weights, gradients and moments; a layer's weights are gathered when it runs
    tensor   splits the language model's products; visual weights, which are small, it splits as `fsdp` does

One device is a mesh of 1 x 1 x 1, so the same code trains on any number of devices.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from favchat_jax.config import Config, MeshConfig
from favchat_jax.errors import UserError

USABLE = 0.8  # share of a device's memory that weights may take, so that answers have room
AXES = ("data", "fsdp", "tensor")
CLIPS = ("data", "fsdp")  # axes that split the clips of a batch
WEIGHTS = ("fsdp", "tensor")  # all axes that split a weight

# Pattern on a weight's path -> axes that split its last dimensions. Earlier dimensions, such as stacked layers, are not
# split, nor is a dimension that the axes do not divide. Every weight of every model matches exactly one row, and so do
# the kernels that Muon stacks (`stacked/...`).
TABLE = (
    (r"llm/embed_tokens/embedding", P("tensor", "fsdp")),
    (r"llm/(layers/.*/(q|k|v|gate|up)_proj|lm_head)/kernel", P("fsdp", "tensor")),
    (r"llm/layers/.*/(o|down)_proj/kernel", P("tensor", "fsdp")),
    (r"llm/(layers_\d+/(qkv|gate_up)_proj|lm_head)/transposed(_scale)?", P("tensor", "fsdp")),
    (r"llm/layers_\d+/(qkv|gate_up)_proj/joins", P("tensor", None, "fsdp")),
    (r"llm/layers_\d+/(o|down)_proj/transposed(_scale)?", P("fsdp", "tensor")),
    (r"llm/.*lora_a", P(WEIGHTS, None)),
    (r"llm/.*lora_b", P(None, WEIGHTS)),
    (r"llm/(.*/)?(kernel_)?scale", P()),
    (r"(?!llm/).*/(kernel|linear_fuse)", P(WEIGHTS, None)),
    (r"(general|facial)_qformer/(.*/embedding|(extra_)?query_tokens)", P(None, WEIGHTS)),
    (r"(?!llm/).*/(bias|scale|[qv]_bias|relative_position_bias_table)|adapter/weights", P()),
)


def training_mesh(config: Config) -> Mesh:
    """Makes the mesh that a stage trains on.

    Raises:
        UserError: this machine's devices or processes do not suit the config.
    """
    if config.data.keep_features and jax.process_count() > 1:
        raise UserError("data.keep_features=True is for a single process: leave it out on several hosts")
    mesh, local = make_mesh(config.mesh), jax.local_device_count()
    if config.stage == "grpo":  # every process has all samples, so any mesh will do
        check_responses(config, mesh)
        return mesh
    if jax.process_count() > 1 and local % mesh.shape["tensor"]:
        given = f"mesh.tensor={mesh.shape['tensor']}"
        raise UserError(f"{given} does not divide the {local} devices of a process: choose a divisor")
    check_batch(config.batch, config.accumulate, mesh, f"batch={config.batch}")
    return mesh


def check_responses(config: Config, mesh: Mesh, samples: int | None = None) -> None:
    """Raises UserError if the responses of an iteration, by default to `config.batch` samples, do not divide."""
    samples, group = samples or config.batch, config.reinforcement.group
    check_batch(samples * group, 1, mesh, f"batch={samples} x rl.group={group} responses, together")


def make_mesh(sizes: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of a config over `devices`, by default over all.

    Raises:
        UserError: there are too few devices, or the axes do not divide their number.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.data, sizes.fsdp, sizes.tensor]
    given = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    known = math.prod(size for size in shape if size != -1)
    if known > len(devices):
        raise UserError(f"{given} needs {known} devices, but this run has {len(devices)}: choose a smaller mesh")
    if -1 in shape:
        if len(devices) % known:
            raise UserError(f"{given} does not divide the {len(devices)} devices of this run: choose a divisor")
        shape[shape.index(-1)] = len(devices) // known
    count = math.prod(shape)
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(f"{given} leaves devices of other processes idle: choose a mesh of {len(devices)}")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:count])


def answering_mesh(
    sizes: MeshConfig | None,
    *,
    heads: int,
    batch: int = 1,
    weights: int = 0,
    devices: list[jax.Device] | None = None,
    memory: float | None = None,
) -> Mesh:
    """Makes the mesh that answers questions, over the devices of this process.

    By default, it is the one with most devices along `data` whose share of the weights fits a device; `batch` clips
    must divide over `data`, and the heads over `tensor`. For one clip, all devices are along `tensor`.

    Args:
        sizes: of its axes, if they are given.
        heads: of keys and values in the language model, which `tensor` cuts.
        batch: number of clips that are answered together.
        weights: bytes of all weights.
        devices: by default those of this process.
        memory: bytes of a device; by default what it says, if it does.

    Raises:
        UserError: `sizes` do not suit the devices or the heads.
    """
    devices = devices or jax.local_devices()
    if sizes is not None:
        mesh = make_mesh(sizes, devices)
        if heads % mesh.shape["tensor"]:
            given = f"mesh.tensor={mesh.shape['tensor']}"
            raise UserError(f"{given} does not divide the language model's {heads} key/value heads: choose a divisor")
        return mesh
    if memory is None:
        memory = (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    data, tensor = 1, math.gcd(len(devices), heads)
    for size in (n for n in range(1, tensor + 1) if tensor % n == 0 and batch % (len(devices) // n) == 0):
        if weights / size <= USABLE * memory:
            data, tensor = len(devices) // size, size
            break
    return make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), devices)


def check_batch(batch: int, accumulate: int, mesh: Mesh, named: str) -> None:
    """Raises UserError if a batch does not divide into `accumulate` parts that the mesh's devices can split.

    Args:
        batch: number of clips, or of responses.
        accumulate: number of parts.
        mesh: of the run.
        named: the options that set it, with their values.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (shares * accumulate):
        raise UserError(
            f"{named} does not divide over mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']} "
            f"devices x accumulate={accumulate} parts: choose a multiple of {shares * accumulate}, or another mesh"
        )


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the weight at `path`; raises ValueError if not exactly one row of the table fits."""
    specs = [spec for pattern, spec in TABLE if re.fullmatch(pattern, path)]
    if len(specs) != 1:
        raise ValueError(f"weight {path} has {len(specs)} rows in the table of partitions, not one")
    axes = (None,) * (len(shape) - len(specs[0])) + tuple(specs[0])

    def cut(size: int, axis: Any) -> Any:
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        names = tuple(name for name in names if mesh.shape[name] > 1)
        return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None

    # The shortest form, as the compiler gives it to results: another form would compile the step again.
    spec = [cut(size, axis) for size, axis in zip(shape, axes, strict=True)]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, P(*spec))


def partitions(weights: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns `partition` of each weight in a flat dictionary of arrays or shapes."""
    return {path: partition(path, leaf.shape, mesh) for path, leaf in weights.items()}


def one_device(devices: list[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of the first device, by default of this process."""
    return Mesh(np.array((devices or jax.local_devices())[:1]).reshape(1, 1, 1), AXES)


def place(path: str, weight: Any, mesh: Mesh, dtype: Any) -> jax.Array:
    """Places a weight of host memory on the mesh; each device receives only its own shard."""
    weight = np.asarray(weight)
    shards = partition(path, weight.shape, mesh)
    return jax.make_array_from_callback(weight.shape, shards, lambda index: weight[index].astype(dtype, copy=False))


def as_placed(shapes: Any, shards: Any) -> Any:
    """Returns a tree of shapes with their shardings."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shards)


def state_partitions(state: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a `TrainState` of arrays or shapes: moments as weights, scalars on every device."""

    def leaf_partition(key_path, leaf):
        # A moment's key is its weight's path; other leaves (step, key, counts) have no path and are on every device.
        path = next((key.key for key in reversed(key_path) if "/" in str(getattr(key, "key", ""))), None)
        return partition(path, leaf.shape, mesh) if path and leaf.ndim else NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(leaf_partition, state)


def batch_partition(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, which is split along its clips."""
    return NamedSharding(mesh, P(CLIPS))


def place_rows(arrays: Any, mesh: Mesh) -> Any:
    """Places a tree of arrays that every process holds whole: split along their first axis, or whole on every device.

    They are whole where the first axis does not divide, such as a single clip.
    """

    def placed(array: Any) -> jax.Array:
        shards = rows_partition(array.shape, mesh)
        return jax.make_array_from_callback(array.shape, shards, lambda index: array[index])

    return arrays if mesh.size == 1 else jax.tree.map(placed, arrays)


def rows_partition(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns the sharding that `place_rows` gives to an array."""
    return NamedSharding(mesh, P(*divided(shape, (CLIPS,), mesh)))


def place_batch(arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Places this process's part of a batch, a tree of arrays, with each device's clips on it."""
    sharding = batch_partition(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), dict(arrays))


def to_host(array: Any) -> np.ndarray:
    """Gathers an array into host memory from all its shards. Every process of a run has to call it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def by_clip(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """Constrains `x` to be split along its first axis only, as clips are; no effect on a single device.

    Otherwise the compiler might follow a weight's partition and split activations along their channels.
    """
    return _constrained(x, CLIPS)


def by_clip_and_head(x: Shaped[Array, "*layers B K C S"]) -> Shaped[Array, "*layers B K C S"]:
    """Constrains a cache to be split along its rows, as clips are, and along its key/value heads."""
    return _constrained(x, *cache_axes(x.ndim))


def cache_axes(dimensions: int) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes that cut the first dimensions of a cache: none of the layers, then rows and heads."""
    return *((),) * (dimensions - 4), CLIPS, ("tensor",)


def _constrained(x: Array, *axes: tuple[str, ...]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*divided(x.shape, axes, mesh)))


def divided(shape: tuple[int, ...], axes: Sequence[tuple[str, ...]], mesh: Any) -> list[tuple[str, ...] | None]:
    """Returns the mesh axes that cut each of the first dimensions; None for one that they do not divide."""
    pairs = zip(shape, axes, strict=False)
    return [
        names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None for size, names in pairs
    ]
