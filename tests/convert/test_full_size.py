"""Copying a full-size Mistral-7B takes at most 4 GiB of memory and 1.5 times as long as copying its files."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from favchat_jax.checkpoints.tensors import open_tensors
from tests.conftest import start_module
from tests.data.tokenizers_for_tests import words
from tests.full_size import make_folder, peak_memory


def copied_in(folder: Path, into: Path) -> tuple[float, float]:
    """Returns the wall-clock and CPU seconds of copying a folder's files to the disk."""
    started, used = time.perf_counter(), time.process_time()
    shutil.copytree(folder, into)
    os.sync()
    seconds = time.perf_counter() - started, time.process_time() - used
    shutil.rmtree(into)
    return seconds


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_full_size_mistral_is_copied_with_4_gib_and_in_one_and_a_half_times_the_copy_of_its_files(tmp_path):
    if shutil.disk_usage(tmp_path).free < 40 * 2**30:
        pytest.skip("needs 40 GiB of disk")
    folder, out = tmp_path / "mistral", tmp_path / "copy"
    try:
        folder.mkdir()
        words("hair").save_pretrained(folder)
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
