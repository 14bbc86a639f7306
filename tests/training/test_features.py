import contextlib
import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from favchat_jax import sharding, stages
from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.initial import initial_weights
from favchat_jax.errors import UserError
from favchat_jax.sharding import training_mesh
from favchat_jax.training.batches import open_batches
from favchat_jax.training.features import KeptFeatures
from tests.conftest import train_alone

SAME_FRAMES = {"data__sampling": "middle", "steps": 18, "checkpoint_every": 9}  # 72 clips: each is seen twice


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def encoded(monkeypatch):
    """The clips whose features were written, in turn."""
    written, write = [], KeptFeatures._write
    monkeypatch.setattr(KeptFeatures, "_write", lambda kept, name, row: (written.append(name), write(kept, name, row)))
    return written


@pytest.mark.parametrize("variant", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_a_run_that_keeps_features_learns_what_one_does_that_encodes_each_clip_anew(
    variant, small_world, tmp_path, encoded
):
    config = small_world.config("stage3", f"variant={variant}", **SAME_FRAMES)
    train_alone(config, tmp_path / "anew")
    train_alone(config.updated({"data.keep_features": True}), tmp_path / "kept")
    np.testing.assert_allclose(losses(tmp_path / "kept"), losses(tmp_path / "anew"), rtol=1e-5)
    files = list((tmp_path / "kept" / "features").iterdir())
    assert 0 < len(set(encoded)) == len(files) < config.steps * config.batch
    seen = 0
    for start in range(0, len(encoded), config.batch):  # a batch is encoded where it has a clip that is new
        assert len(set(encoded[: start + config.batch])) > seen
        seen = len(set(encoded[: start + config.batch]))


def test_damaged_features_and_those_of_other_frames_are_made_again(small_world, tmp_path, encoded):
    config = small_world.config("stage3", **SAME_FRAMES)
    parts, mesh = assembly.assemble(config), sharding.one_device()
    _, frozen = stages.split(initial_weights(parts, mesh), "v1", "stage3")
    with contextlib.closing(open_batches(parts)) as batches:
        batch = next(batches)
    kept = KeptFeatures(tmp_path / "features", parts.model, frozen, mesh, batch.arrays["frames"].shape)
    first = kept.of(batch)
    files = {path: path.read_bytes() for path in (tmp_path / "features").iterdir()}
    victim = min(files)
    victim.write_bytes(files[victim][:100])
    again = kept.of(batch)
    assert len(encoded) == 2 * config.batch and victim.read_bytes() == files[victim]
    chex.assert_trees_all_equal(first, again, kept.of(batch))
    assert len(encoded) == 2 * config.batch, "what is whole is read"
    mended = dataclasses.replace(batch, arrays={**batch.arrays, "frames": 255 - batch.arrays["frames"]})
    assert not np.array_equal(jax.tree.leaves(kept.of(mended))[0], jax.tree.leaves(first)[0])


def test_several_processes_cannot_keep_features(small_world, monkeypatch):
    config = small_world.config("stage3", data__keep_features=True, **SAME_FRAMES)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="data.keep_features=True is for a single process"):
        training_mesh(config)
