"""Language models of Mistral's width with random weights, and the memory of processes that read them."""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.table import slots
from favchat_jax.checkpoints.tensors import INDEX
from tests.models.tiny_parts import MISTRAL_7B

SHARD_BYTES = 10**9  # the test itself holds one shard in memory


def make_folder(folder: Path, config: Mapping[str, Any] = MISTRAL_7B) -> None:
    """Writes config.json and random bfloat16 weights in shards, by default like the published Mistral-7B."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = mistral.weight_shapes(mistral.read_config(folder))
    rng, where, shard, size = np.random.default_rng(0), {}, {}, 0
    noise = (0.02 * rng.standard_normal(2**24, np.float32)).astype(ml_dtypes.bfloat16)

    def flush() -> None:
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        where.update(dict.fromkeys(shard, name))

    for name, slot in slots(mistral.TABLE, shapes).items():
        if size + 2 * np.prod(slot.shape) > SHARD_BYTES:
            flush()
            shard, size = {}, 0
        shard[name] = np.resize(np.roll(noise, int(rng.integers(2**24))), slot.shape)
        size += shard[name].nbytes
    flush()
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def peak_memory(process: subprocess.Popen) -> float:
    """Waits for a process to end, and returns its peak resident memory in GiB."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = int(found[1]) if found else peak
        time.sleep(0.1)
    return peak / 2**20
