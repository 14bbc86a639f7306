import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import stage3
from favchat_jax import sharding
from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.planning import plan, targets


def test_an_unknown_target_is_refused_with_the_list_of_targets():
    with pytest.raises(UserError, match="--target=a900 is unknown: choose one of a800-80gb, a800-80gb-x8"):
        targets.find("a900")


def test_the_error_about_a_missing_compiler_says_how_to_install_it():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed")
    with pytest.raises(UserError, match="needs the compiler for tpu .* `make plan` creates"):
        targets.devices("v6e-4")


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu, which compiles for TPUs, is not installed")
def test_the_tiny_preset_compiles_for_a_tpu_slice_and_fits(small_world):
    made = plan.make_plan(small_world.config("stage2", batch=8), "v5e-8")
    assert made.devices == made.clips == 8
    assert made.fits and made.headroom_bytes == targets.find("v5e-8").usable - made.peak_bytes_per_device
    held = made.frozen_bytes + made.trained_bytes + made.optimizer_bytes
    assert held <= made.argument_bytes <= made.peak_bytes_per_device
    assert made.executed_flops >= made.flops_per_step > 0
    assert 0 < made.mfu_ceiling <= 1


def test_the_reinforcement_stage_has_no_training_step_to_plan(small_world):
    with pytest.raises(UserError, match="stage=grpo draws its own responses"):
        plan.lay_out(small_world.config("grpo"), sharding.one_device(), 4)


def test_a_quantised_base_is_planned_with_its_stored_dtype(small_world):
    laid_out = plan.lay_out(small_world.config("stage3", llm__storage="int8"), sharding.one_device(), 4)
    kernel = laid_out.frozen["llm/layers/mlp/up_proj/kernel"]
    scale = laid_out.frozen["llm/layers/mlp/up_proj/kernel_scale"]
    assert kernel.dtype == jnp.int8 and scale.shape == (*kernel.shape[:-2], 1, kernel.shape[-1])
    assert scale.sharding.spec == P()


def test_a_saved_step_gives_the_results_of_the_step(small_world):
    config = small_world.config("stage3", batch=2)
    laid_out = plan.lay_out(config, sharding.one_device(), 2)
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(np.abs(rng.normal(0, 0.05, leaf.shape)), leaf.dtype)
        return jnp.asarray(rng.integers(0, 2, leaf.shape), leaf.dtype)

    arguments = jax.tree.map(draw, (laid_out.state, laid_out.frozen, laid_out.batch))
    loaded = plan.load(plan.export_step(laid_out, "cpu"))
    again = loaded.call(*jax.tree.leaves(arguments))
    expected = jax.tree.leaves(laid_out.step(*arguments))
    assert len(again) == len(expected)
    for one, other in zip(again, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_bytes_that_are_not_a_saved_step_are_refused():
    with pytest.raises(UserError, match="this is not a saved step"):
        plan.load(b"\x80\x04K\x01.")


@pytest.mark.parametrize(
    ("share", "lacking", "frozen", "says"),
    [
        (8, 5, 0, "accumulate=2"),
        (8, 7, 0, "accumulate=4"),
        (1, 5, 20, "llm.storage=int8"),
        (4, 25, 20, "accumulate=4 on two or more devices"),
        (1, 15, 20, "two or more devices"),
        (1, 5, 0, "more devices: 0.0 GiB are lacking on each"),
    ],
)
def test_a_plan_suggests_a_change_that_makes_the_step_fit(share, lacking, frozen, says):
    config = Config.from_ml_collections(stage3.get_config("preset=paper"))
    assert plan._advice(config, share, lacking, temp=10, frozen=frozen) == says
    config = config.updated({"model.remat": ""})
    assert plan._advice(config, share, lacking, temp=10, frozen=frozen) == "model.remat=block"
    assert dataclasses.replace(targets.find("a100-40gb"), memory=10).usable == 9


def test_the_suggested_number_of_parts_exceeds_the_configured_one():
    config = Config.from_ml_collections(stage3.get_config("preset=paper")).updated({"accumulate": 2})
    assert plan._advice(config, share=4, lacking=7, temp=10, frozen=0) == "accumulate=8"
    assert plan._advice(config, share=4, lacking=25, temp=10, frozen=20) == "accumulate=8 on two or more devices"


def test_a_mesh_may_use_some_devices_of_a_target_and_its_size_sets_the_clips(small_world, monkeypatch):
    monkeypatch.setattr(plan, "devices", lambda name: jax.devices() * 8)
    config = small_world.config("stage3", batch=4, mesh__fsdp=1)
    mesh, clips = plan._mesh_and_clips(config, "a800-80gb-x8", None)
    assert (mesh.size, clips) == (1, 4)
    assert plan._mesh_and_clips(config, "a800-80gb-x8", 2)[1] == 2
