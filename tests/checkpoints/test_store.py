import json
import logging
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from favchat_jax.checkpoints.initial import new_state
from favchat_jax.checkpoints.store import Checkpoints, TrainState
from favchat_jax.checkpoints.weights_folder import load_weights, save_weights
from favchat_jax.checkpoints.workdir import load_config
from favchat_jax.convert.folder import replacing
from favchat_jax.errors import UserError
from tests.conftest import damage, fill

ITERATOR = {
    "layout": {"workers": 1},
    "counts": {"seen": 7, "bad_ids": {"clip": "cut short"}},
    "examples": [1, {"a": 2}],
}


def state(step: int, size: int = 2000) -> TrainState:
    rng = np.random.default_rng(step)
    weights = {
        "umt/blocks/kernel": jnp.array(rng.normal(size=(size, 2)), jnp.float32),
        "adapter/bias": jnp.array(rng.normal(size=3), jnp.float32),
        "llm/half": jnp.array(rng.normal(size=(4, 4)), jnp.bfloat16),
    }
    fresh = new_state(weights, optax.adamw(1e-3), seed=step)
    moments = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), fresh.moments)
    return TrainState(jnp.int32(step), weights, moments, fresh.key)


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same bits."""
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other))


@pytest.fixture
def saved(tmp_path):
    """A workdir with checkpoints of steps 2, 4 and 6."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (2, 4, 6):
        checkpoints.save(state(step), {**ITERATOR, "step": step})
    checkpoints.close()
    return tmp_path


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "favchat_jax")
    return caplog


def restore(workdir):
    checkpoints = Checkpoints(workdir, keep=3)
    try:
        return checkpoints.restore(jax.eval_shape(lambda: state(0)))
    finally:
        checkpoints.close()


def load(workdir):
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.load_trainable()[1]
    finally:
        checkpoints.close()


def test_what_is_restored_is_exactly_what_was_saved(saved):
    restored, iterator = restore(saved)
    assert same(restored, state(6))
    assert iterator == {**ITERATOR, "step": 6}
    assert same(load(saved), state(6).trainable)


def test_a_new_workdir_has_nothing_to_restore_and_cannot_answer(tmp_path):
    assert restore(tmp_path) is None
    with pytest.raises(UserError, match="holds no checkpoint: train it first"):
        load(tmp_path)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(state(step), ITERATOR)
    checkpoints.close()
    assert checkpoints.steps() == [4, 5] and checkpoints.latest() == 5


def cut(item):
    """Cuts the largest data file in half."""
    file = damage(item)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(item):
    damage(item).write_bytes(b"")


def delete(item):
    damage(item).unlink()


def delete_all(item):
    shutil.rmtree(item)


@pytest.mark.parametrize("harm", [damage, cut, empty, delete, delete_all])
@pytest.mark.parametrize("item", ["weights", "optimizer"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(item, harm, saved, warnings):
    harm(saved / "checkpoints" / "6" / item)
    restored, iterator = restore(saved)
    assert same(restored, state(4)) and iterator["step"] == 4
    assert (
        f"checkpoint 6 of {saved} is damaged" in warnings.text and "the one before it is read instead" in warnings.text
    )
    assert Checkpoints(saved).steps() == [2, 4], "so that step 6 can be saved anew"
    assert (saved / "damaged" / "6").is_dir(), "nothing is thrown away"


@pytest.mark.parametrize("harm", [damage, cut, empty, delete, delete_all])
def test_answering_takes_the_checkpoint_before_a_damaged_one_and_moves_nothing(harm, saved, warnings):
    harm(saved / "checkpoints" / "6" / "weights")
    assert same(load(saved), state(4).trainable)
    assert "checkpoint 6" in warnings.text
    assert Checkpoints(saved).steps() == [2, 4, 6]


def test_reading_leaves_a_checkpoint_that_another_process_is_writing(saved):
    unfinished = saved / "checkpoints" / "9.orbax-checkpoint-tmp"
    (unfinished / "weights").mkdir(parents=True)
    before = sorted(saved.rglob("*"))
    with Checkpoints(saved) as checkpoints:
        checkpoints.load_trainable()
    assert sorted(saved.rglob("*")) == before


@pytest.mark.parametrize("name", ["leaves", "data"])
def test_a_checkpoint_whose_record_is_damaged_is_passed_over(name, saved, warnings):
    (saved / "checkpoints" / "6" / name / "metadata").write_bytes(b"\xff\x00{")
    restored, _ = restore(saved)
    assert same(restored, state(4)) and "checkpoint 6" in warnings.text


def test_single_flipped_bits_are_noticed_wherever_they_are(saved):
    """Orbax itself restores many of them without an error."""
    item = saved / "checkpoints" / "6" / "weights"
    file = damage(item)
    damage(item)  # the same bytes again: as it was
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(len(whole), size=12):
        harmed = bytearray(whole)
        harmed[place] ^= 1 << rng.integers(8)
        file.write_bytes(harmed)
        weights = load(saved)
        right = 6 if np.array_equal(weights["adapter/bias"], state(6).trainable["adapter/bias"]) else 4
        # A flip in bytes that hold no value may go unnoticed; a wrong value may not.
        assert same(weights, state(right).trainable)


def test_with_every_checkpoint_damaged_the_way_out_is_named(saved):
    for step in (2, 4, 6):
        damage(saved / "checkpoints" / str(step) / "weights")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        load(saved)
    for _ in range(2):  # nothing is moved, so that the next command does not start again from nothing
        with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
            restore(saved)
    assert Checkpoints(saved).steps() == [2, 4, 6] and not (saved / "damaged").exists()


def test_checkpoints_of_another_model_are_refused_and_stay(saved):
    like = jax.eval_shape(lambda: state(0))
    like.trainable["adapter/bias"] = jax.ShapeDtypeStruct((99,), jnp.float32)
    with pytest.raises(UserError, match=r"checkpoint 6 .* is of another model: adapter/bias has shape .* \[99\]"):
        Checkpoints(saved).restore(like)
    assert Checkpoints(saved).steps() == [2, 4, 6]


def test_a_device_without_memory_does_not_make_a_checkpoint_damaged(saved, monkeypatch):
    def out_of_memory(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", out_of_memory)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        restore(saved)
    assert Checkpoints(saved).steps() == [2, 4, 6]


def test_a_damaged_checkpoint_without_one_before_promises_none(tmp_path, warnings):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(2), ITERATOR)
    checkpoints.close()
    damage(tmp_path / "checkpoints" / "2" / "weights")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        load(tmp_path)
    assert "checkpoint 2" in warnings.text and "the one before" not in warnings.text


def test_a_step_can_be_saved_again_after_its_damaged_checkpoint_was_passed_over(saved):
    damage(saved / "checkpoints" / "6" / "weights")
    checkpoints = Checkpoints(saved, keep=3)
    checkpoints.restore(jax.eval_shape(lambda: state(0)))
    checkpoints.save(state(6), ITERATOR)
    checkpoints.close()
    assert same(restore(saved)[0], state(6))


def test_a_full_disk_leaves_the_last_good_checkpoint_and_saving_works_again_once_there_is_room(small_disk):
    checkpoints = Checkpoints(small_disk, keep=2)
    checkpoints.save(state(1), ITERATOR)
    checkpoints.wait()
    ballast = fill(small_disk)
    with pytest.raises(UserError, match=f"could not write {small_disk}/checkpoints .*: free disk space"):
        checkpoints.save(state(2), ITERATOR)
        checkpoints.wait()
    try:
        checkpoints.close()
    except UserError as error:
        assert "free disk space" in str(error)
    assert same(restore(small_disk)[0], state(1))
    ballast.unlink()
    checkpoints = Checkpoints(small_disk, keep=2)
    checkpoints.save(state(2), ITERATOR)
    checkpoints.close()
    assert same(restore(small_disk)[0], state(2))


def test_a_weights_folder_gives_back_what_was_written_and_its_config(tmp_path):
    weights = state(3).trainable
    save_weights(tmp_path / "umt", weights, {"kind": "umt"})
    loaded = load_weights(tmp_path / "umt")
    assert all(
        loaded[path].dtype == leaf.dtype and np.array_equal(loaded[path], leaf) for path, leaf in weights.items()
    )
    assert load_config(tmp_path / "umt") == {"kind": "umt"}


def test_writing_a_weights_folder_again_replaces_it_whole(tmp_path):
    for step in (1, 2):
        save_weights(tmp_path / "frozen", {"a/kernel": jnp.full(3, step)}, {})
    assert load_weights(tmp_path / "frozen")["a/kernel"].tolist() == [2, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["frozen"]


def test_writing_a_weights_folder_leaves_a_persons_draft_alone_and_clears_away_that_of_a_killed_run(tmp_path):
    (tmp_path / "frozen.draft").mkdir()
    (tmp_path / ".frozen.draft-favchat" / "weights").mkdir(parents=True)
    save_weights(tmp_path / "frozen", {"a/kernel": jnp.ones(3)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frozen", "frozen.draft"]


def test_a_place_where_nothing_can_be_written_is_told_from_a_full_disk(tmp_path):
    (tmp_path / "file").touch()
    for place, mend in (
        (tmp_path / "file" / "out", "a file is in the way"),
        ("/proc/x", "its folder is missing or takes no files"),
    ):
        with pytest.raises(UserError, match=f"could not write {place} .*: {mend}"):
            save_weights(place, {"a/kernel": jnp.ones(3)}, {})
        with pytest.raises(UserError, match=f"could not write {place} .*: {mend}"), replacing(place, lambda _: False):
            pass


@pytest.mark.parametrize("harm", [damage, cut, empty, delete, delete_all])
def test_a_damaged_weights_folder_is_a_users_error_that_names_it(harm, tmp_path):
    save_weights(tmp_path / "frozen", state(3).trainable, {})
    harm(tmp_path / "frozen" / "weights")
    with pytest.raises(UserError, match=f"{tmp_path}/frozen is damaged"):
        load_weights(tmp_path / "frozen")


def test_a_folder_without_weights_is_a_users_error_that_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match="is not a weights folder: make it with tools.convert_weights"):
        load_weights(tmp_path)


def test_a_weights_folder_on_a_full_disk_leaves_the_one_before(small_disk):
    save_weights(small_disk / "frozen", {"a/kernel": jnp.ones(3)}, {})
    fill(small_disk)
    with pytest.raises(UserError, match=f"could not write {small_disk}/frozen"):
        save_weights(small_disk / "frozen", state(1).trainable, {})
    assert load_weights(small_disk / "frozen")["a/kernel"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[]"])
def test_a_damaged_config_is_a_users_error(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is damaged"):
        load_config(tmp_path)


def test_a_folder_without_a_config_is_no_workdir(tmp_path):
    with pytest.raises(UserError, match="is not a workdir or a weights folder.*; name one that training or an export"):
        load_config(tmp_path / "missing")
    (tmp_path / "stage3" / "checkpoints").mkdir(parents=True)
    (tmp_path / "stage3" / "config.json").write_text("{}")
    for near in ("", "stage3/checkpoints", "stage3/config.json"):
        with pytest.raises(UserError, match=f"did you mean {tmp_path}/stage3"):
            load_config(tmp_path / near)


def test_every_leaf_of_a_checkpoint_has_its_checksum_written_beside_it(saved):
    leaves = json.loads((saved / "checkpoints" / "6" / "leaves" / "metadata").read_text())
    assert {path[2:-2] for path in leaves["weights"]} == state(6).trainable.keys()
    assert len(leaves["optimizer"]) == len(jax.tree.leaves(state(6).moments)) + 2  # step and key
