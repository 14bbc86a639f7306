"""Copying a full-size Mistral-7B takes at most 4 GiB of memory and 1.5 times as long as copying its files."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.table import slots
from favchat_jax.checkpoints.tensors import INDEX, open_tensors
from tests.conftest import start_module
from tests.data.tokenizers_for_tests import words
from tests.models.tiny_parts import MISTRAL_7B

SHARD_BYTES = 10**9  # the test itself holds one shard in memory


def make_folder(folder: Path) -> None:
    """Writes a Hugging Face folder of random bfloat16 weights in shards, like the published Mistral-7B."""
    folder.mkdir()
    words("hair").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B))
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


def copied_in(folder: Path, into: Path) -> tuple[float, float]:
    """Returns the wall-clock and CPU seconds of copying a folder's files to the disk."""
    started, used = time.perf_counter(), time.process_time()
    shutil.copytree(folder, into)
    os.sync()
    seconds = time.perf_counter() - started, time.process_time() - used
    shutil.rmtree(into)
    return seconds


def peak_memory(process: subprocess.Popen) -> float:
    """Waits for a process to end, and returns its peak resident memory in GiB."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = int(found[1]) if found else peak
        time.sleep(0.1)
    return peak / 2**20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_full_size_mistral_is_copied_with_4_gib_and_in_one_and_a_half_times_the_copy_of_its_files(tmp_path):
    if shutil.disk_usage(tmp_path).free < 40 * 2**30:
        pytest.skip("needs 40 GiB of disk")
    folder, out = tmp_path / "mistral", tmp_path / "copy"
    try:
        make_folder(folder)
        plain, plain_used = copied_in(folder, tmp_path / "files")
        started, before = time.perf_counter(), os.times()
        process = start_module("tools.convert_weights", "--kind=mistral", f"--src={folder}", f"--out={out}", "--check")
        peak = peak_memory(process)
        stdout, stderr = process.communicate()
        os.sync()
        seconds = time.perf_counter() - started
        used = sum(os.times()[2:4]) - sum(before[2:4])
        print(f"{stdout}\nfiles copied in {plain:.1f} s (CPU: {plain_used:.1f} s)")
        print(f"converted in {seconds:.1f} s (CPU: {used:.1f} s), peak {peak:.2f} GiB")
        assert process.returncode == 0, stderr
        assert "291 keys: 291 used, 0 ignored, 0 unknown" in stdout
        copied, source = open_tensors(out), open_tensors(folder)
        assert copied.keys() == source.keys()
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.31.mlp.down_proj.weight"):
            assert np.array_equal(np.asarray(copied[name]).view(np.uint16), np.asarray(source[name]).view(np.uint16))
        assert peak <= 4 and seconds <= 1.5 * plain
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
