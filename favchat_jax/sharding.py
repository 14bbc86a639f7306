"""Where everything lies on many devices: a mesh of three axes, and one table from a weight's path to mesh axes.

    data     shares the clips of a batch; every weight is whole along it
    fsdp     shares the clips too, and cuts weights, gradients and moments; a layer's weights are gathered as it runs
    tensor   cuts the language model's products themselves; visual weights, which are small, as `fsdp` does

One device is a mesh of 1 x 1 x 1, so that training has one path for all of them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from favchat_jax.config import Config, MeshConfig
from favchat_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
CLIPS = ("data", "fsdp")  # axes that share the clips of a batch
WEIGHTS = ("fsdp", "tensor")  # all axes that cut a weight

# Pattern on a weight's path -> what cuts its last dimensions; those before, as of stacked layers, stay whole, and so
# does a dimension that the axes do not divide. Every weight of every model matches exactly one row, and so do kernels
# of one shape that Muon stacks (`stacked/...`).
TABLE = (
    (r"llm/embed_tokens/embedding", P("tensor", "fsdp")),
    (r"llm/(layers/.*/(q|k|v|gate|up)_proj|lm_head)/kernel", P("fsdp", "tensor")),
    (r"llm/layers/.*/(o|down)_proj/kernel", P("tensor", "fsdp")),
    (r"llm/.*lora_a", P(WEIGHTS, None)),
    (r"llm/.*lora_b", P(None, WEIGHTS)),
    (r"llm/.*scale", P()),
    (r"(?!llm/).*/(kernel|linear_fuse)", P(WEIGHTS, None)),
    (r"(general|facial)_qformer/(.*/embedding|(extra_)?query_tokens)", P(None, WEIGHTS)),
    (r"(?!llm/).*/(bias|scale|[qv]_bias|relative_position_bias_table)|adapter/weights", P()),
)


def training_mesh(config: Config) -> Mesh:
    """The mesh that a stage trains on; for stage grpo, the first device.

    Raises:
        UserError: the devices or processes that are here do not suit the config.
    """
    if config.stage == "grpo":
        if jax.process_count() > 1:
            raise UserError("stage=grpo computes on one device, in one process: leave out --processes")
        return one_device()
    if config.data.keep_features and jax.process_count() > 1:
        raise UserError("data.keep_features=True is for a single process: leave it out where there are several")
    mesh = make_mesh(config.mesh)
    check_batch(config.batch, config.accumulate, mesh)
    return mesh


def make_mesh(sizes: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a config over `devices`, by default all that there are.

    Raises:
        UserError: there are not as many devices, or they do not divide.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.data, sizes.fsdp, sizes.tensor]
    given = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    known = math.prod(size for size in shape if size != -1)
    if known > len(devices):
        raise UserError(f"{given} needs {known} devices, and {len(devices)} are here: choose a smaller mesh")
    if -1 in shape:
        if len(devices) % known:
            raise UserError(f"{given} does not divide the {len(devices)} devices that are here: choose a divisor")
        shape[shape.index(-1)] = len(devices) // known
    count, local = math.prod(shape), jax.local_device_count()
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(f"{given} leaves devices of other processes without work: choose a mesh of {len(devices)}")
    if jax.process_count() > 1 and local % sizes.tensor:
        raise UserError(f"mesh.tensor={sizes.tensor} does not divide the {local} devices of a process")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:count])


def check_batch(batch: int, accumulate: int, mesh: Mesh, named: str = "batch") -> None:
    """Raises UserError where a batch, `named` by its option, does not divide into `accumulate` parts that the mesh's
    devices share."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (shares * accumulate):
        raise UserError(
            f"{named}={batch} does not divide over mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']} "
            f"devices x accumulate={accumulate} parts: choose a multiple of {shares * accumulate}, or another mesh"
        )


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """How the weight at `path` lies on the mesh; an error in the table (no row, or two) is a ValueError."""
    specs = [spec for pattern, spec in TABLE if re.fullmatch(pattern, path)]
    if len(specs) != 1:
        raise ValueError(f"weight {path} has {len(specs)} rows in the table of partitions, not one")
    axes = (None,) * (len(shape) - len(specs[0])) + tuple(specs[0])

    def cut(size: int, axis: Any) -> Any:
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        names = tuple(name for name in names if mesh.shape[name] > 1)
        return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None

    # In the shortest form, which is what the compiler gives results: the step must not compile again for another.
    spec = [cut(size, axis) for size, axis in zip(shape, axes, strict=True)]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, P(*spec))


def partitions(weights: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """`partition` of each weight in a flat dictionary of arrays or shapes."""
    return {path: partition(path, leaf.shape, mesh) for path, leaf in weights.items()}


def one_device() -> Mesh:
    """The mesh of the first device alone."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)


def place(path: str, weight: Any, mesh: Mesh, dtype: Any) -> jax.Array:
    """A weight in host memory as shards on the mesh; no device ever holds more than its own."""
    weight = np.asarray(weight)
    shards = partition(path, weight.shape, mesh)
    return jax.make_array_from_callback(weight.shape, shards, lambda index: weight[index].astype(dtype))


def as_placed(shapes: Any, shards: Any) -> Any:
    """A tree of shapes that say where they lie."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shards)


def state_partitions(state: Any, mesh: Mesh) -> Any:
    """How a `TrainState` of arrays or shapes lies on the mesh: moments as their weights, scalars everywhere."""

    def leaf_partition(key_path, leaf):
        # A moment's own key is its weight's path; what is no weight's (step, key, counts) is whole on every device.
        path = next((key.key for key in reversed(key_path) if "/" in str(getattr(key, "key", ""))), None)
        return partition(path, leaf.shape, mesh) if path and leaf.ndim else NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(leaf_partition, state)


def batch_partition(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: cut along its clips."""
    return NamedSharding(mesh, P(CLIPS))


def place_batch(arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """This process's part of a batch, a tree of arrays, as part of the whole one, each device with its own clips."""
    sharding = batch_partition(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), dict(arrays))


def by_clip(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """`x` with its first axis cut as clips are and its other axes whole; unchanged without a mesh of several devices.

    Models call it where the compiler might otherwise follow a weight's partition and cut activations along their
    channels.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(CLIPS))
