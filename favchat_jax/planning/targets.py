"""Lists the accelerators for which runs can be planned, and describes their devices to a compiler.

Peak rates are the manufacturers' figures for dense bfloat16 products with float32 sums.
"""

import dataclasses
import functools
import os

import jax
from jax.experimental import topologies

from favchat_jax.errors import UserError, one_line

GIB = 2**30
USABLE = 0.9  # share of a device's memory; the rest goes to the runtime, its kernels and fragmentation


@dataclasses.dataclass(frozen=True)
class Target:
    """Describes a group of devices of one kind.

    Attributes:
        platform: cuda or tpu.
        topology: number and arrangement of the devices in the compiler's notation.
        devices: number of devices.
        memory: bytes per device.
        flops: floating-point operations per second of a device, in products.
        bandwidth: bytes per second between a device and its memory.
        link: bytes per second that a device sends to the others while it receives as many; 0 for a single device.
        clips: clips per step on all devices; None: the config's batch for one device times their number.
        storage: storage of the language model's base in tables of all targets.
        chip: for a GPU, the fields of the compiler's description that differ between kinds.
    """

    platform: str
    topology: str
    devices: int
    memory: int
    flops: float
    bandwidth: float
    link: float = 0.0
    clips: int | None = None
    storage: str = "full"
    chip: tuple[tuple[str, int], ...] = ()

    @property
    def usable(self) -> int:
        """Returns the bytes of a device that a step may use."""
        return int(USABLE * self.memory)


def _gpu(devices: int, memory: int, flops: float, bandwidth: float, chip: dict[str, int], **others) -> Target:
    return Target("cuda", f"1x{devices}x1", devices, memory, flops, bandwidth, chip=tuple(chip.items()), **others)


_AMPERE = {"major": 8, "minor": 0, "cores": 108, "l2": 40 << 20, "core_memory": 167936, "block_memory": 166912}
_HOPPER = {"major": 9, "minor": 0, "cores": 132, "l2": 50 << 20, "core_memory": 233472, "block_memory": 232448}
_ADA = {"major": 8, "minor": 9, "cores": 128, "l2": 72 << 20, "core_memory": 102400, "block_memory": 101376}
TARGETS = {
    "a800-80gb": _gpu(1, 85026144256, 312e12, 2039e9, _AMPERE),
    "a800-80gb-x8": _gpu(8, 85026144256, 312e12, 2039e9, _AMPERE, link=200e9),
    "a100-40gb": _gpu(1, 42505273344, 312e12, 1555e9, _AMPERE),
    "h100-80gb": _gpu(1, 85520809984, 989e12, 3352e9, _HOPPER),
    "h200": _gpu(1, 150754820096, 989e12, 4800e9, _HOPPER),
    "rtx4090": _gpu(1, 25757220864, 165e12, 1008e9, _ADA, clips=1, storage="int8"),
    "v5e-8": Target("tpu", "v5e:2x4", 8, 16 * GIB, 197e12, 819e9, 200e9, 8),
    "v5p-8": Target("tpu", "v5p:2x2x1", 4, 95 * GIB, 459e12, 2765e9, 600e9, 8),  # eight cores in four chips
    "v6e-4": Target("tpu", "v6e:2x2", 4, 32 * GIB, 918e12, 1640e9, 448e9, 8),
}

# Part of the name by which a device calls itself -> its target. The first that fits counts.
DEVICES = {
    "A800": "a800-80gb",
    "A100-SXM4-80GB": "a800-80gb",
    "A100": "a100-40gb",
    "H100": "h100-80gb",
    "H200": "h200",
    "RTX 4090": "rtx4090",
    "TPU v5 lite": "v5e-8",
    "TPU v5": "v5p-8",
    "TPU v6": "v6e-4",
}

# XLA's GpuTargetConfig. The literal fields are the same for all of these GPUs.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {core_memory} shared_memory_per_block_optin: {block_memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} fpus_per_core: 64 clock_rate_ghz: 1.41 l2_cache_size: {l2}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""


def find(name: str) -> Target:
    """Returns the target of a name; raises UserError for an unknown one."""
    if name not in TARGETS:
        raise UserError(f"--target={name} is unknown: choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


def of_device(kind: str) -> Target | None:
    """Returns the target of a device that calls itself `kind`, whose rates are those of one device; None if unknown."""
    return next((TARGETS[name] for part, name in DEVICES.items() if part in kind), None)


@functools.cache
def devices(name: str) -> list[jax.Device]:
    """Returns the devices of a target, which can only compile.

    Raises:
        UserError: the compiler for the platform is not installed.
    """
    target, options = find(name), {}
    if target.platform == "tpu":  # keeps the compiler from asking the network about this machine
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault(
            "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
        )  # a plan occupies no chip, so several may run in parallel
    if target.platform == "cuda":
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver is installed
        chip = dict(target.chip, bandwidth=int(target.bandwidth), memory=target.memory, name=name)
        options = {"topology": target.topology, "target_config": _DESCRIPTION.format(**chip)}
    try:
        described = topologies.get_topology_desc(platform=target.platform, topology_name=target.topology, **options)
    except Exception as error:  # jax raises many kinds of errors for a plugin that is missing or does not load
        raise UserError(
            f"--target={name} needs the compiler for {target.platform} ({one_line(error)}): "
            "run this in .venv-aot, which `make plan` creates"
        ) from None
    return list(described.devices)
