"""Stochastic depth of the Q-Formers: an option of the stages that train them, off in answers, exact after a restart."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.checkpoints.run import assemble
from favchat_jax.config import Config
from favchat_jax.models.qformer import QFormer
from favchat_jax.stages import STAGES, TRAINS
from tests.conftest import newest, same_weights, train_alone

RATE = 0.5


def test_without_a_rate_training_and_answering_read_the_same(small_world):
    assert small_world.config("stage1").model.qformer.drop_path == 0.0
    fields = small_world.config("stage1").to_json()
    del fields["model"]["qformer"]["drop_path"]  # a workdir of a version that had no such field
    assert Config.from_json(fields) == small_world.config("stage1")


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("stage", STAGES)
def test_only_stages_that_train_the_qformers_leave_out_branches(stage, variant, small_world):
    config = small_world.config(stage, f"variant={variant}", model__qformer__drop_path=RATE)
    model = assemble(config).model
    expected = RATE if "qformers" in TRAINS[variant][stage] else 0.0
    assert model.general_qformer.drop_path == model.facial_qformer.drop_path == expected


def test_the_rate_rises_from_none_in_the_first_layer_and_only_while_training():
    model = QFormer(width=8, depth=2, heads=2, mlp=12, queries=3, extra_queries=0, prompt=False, dropout=0.0)
    visual = jax.random.normal(jax.random.key(0), (1, 5, 6))
    weights = model.init(jax.random.key(1), visual)
    repeated, often = jnp.repeat(visual, 64, axis=0), jax.random.key(2, impl="rbg")

    def outputs(**fields):
        run = jax.jit(
            lambda key: model.clone(**fields).apply(weights, repeated, deterministic=False, rngs={"dropout": key})
        )
        return np.asarray(run(often))

    whole = np.asarray(model.apply(weights, visual))
    np.testing.assert_allclose(outputs(), np.repeat(whole, 64, axis=0), atol=1e-5)  # rate 0: the same as in answers
    np.testing.assert_allclose(model.clone(drop_path=0.9).apply(weights, visual), whole, atol=1e-6)
    # The second layer, without cross-attention, has two branches, so clips differ in at most four ways.
    found = {tuple(np.round(clip.ravel(), 3)) for clip in outputs(drop_path=RATE)}
    assert 1 < len(found) <= 4


@pytest.mark.slow
def test_a_run_with_stochastic_depth_goes_on_to_the_same_bits(small_world, tmp_path):
    changes = {"model__qformer__drop_path": RATE, "model__qformer__depth": 2, "checkpoint_every": 2}
    config = small_world.config("stage1", **changes).updated({"steps": 4})
    train_alone(config, tmp_path / "whole")
    resumed = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "4")
    assert train_alone(config, resumed).resumed_at == 2
    assert same_weights(newest(resumed), newest(tmp_path / "whole"))
    train_alone(config.updated({"model.qformer.drop_path": 0.0}), tmp_path / "without")
    assert not same_weights(newest(tmp_path / "without"), newest(tmp_path / "whole"))
