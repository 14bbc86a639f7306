"""Reinforcement on any mesh, and in several processes, draws, judges and learns what it does on one device."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from favchat_jax.config import MeshConfig
from favchat_jax.errors import UserError
from favchat_jax.rl import de_grpo
from favchat_jax.rl.curves import read_lines
from favchat_jax.sharding import AXES, training_mesh
from tests.conftest import newest, on_devices

STEPS = 5
SETTINGS = {
    "steps": STEPS,
    "batch": 2,
    "checkpoint_every": STEPS,
    "rl__group": 4,
    "rl__max_new_tokens": 6,
    "rl__samples": 8,
    "rl__heldout_samples": 2,
    "rl__measure_every": STEPS,
    "rl__merged_rollouts": False,
    "rl__rewards__form__path": "tests.rl.test_de_grpo:favour_short_words",
    "optimizer__learning_rate": 1e-3,
}
MESHES = {"data": (8, 1, 1), "all": (2, 2, 2), "tensor": (1, 1, 8)}


def job(small_world, sizes, workdir, **changes):
    mesh = {f"mesh__{axis}": size for axis, size in zip(AXES, sizes, strict=True)}
    return small_world.config("grpo", **{**SETTINGS, **mesh, **changes}).to_json(), str(workdir)


def run(jobs, processes=1):
    on_devices("tests/rl/many_devices.py", lambda place: [place, json.dumps(jobs)], processes)


@pytest.fixture(scope="module")
def alone(small_world, tmp_path_factory):
    """The workdir of a run on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "grpo"
    run([job(small_world, (1, 1, 1), workdir)])
    return workdir


def state(workdir: Path, step: int = STEPS) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


def check_same(workdir: Path, expected: Path) -> None:
    """The same rewards, and within 1e-5 the same losses, judgements and weights."""
    lines, others = (read_lines(folder / "metrics.jsonl") for folder in (workdir, expected))
    assert len(lines) == len(others) == STEPS
    for one, other in zip(lines, others, strict=True):
        assert {name: one[name] for name in one if name.startswith("reward")} == {
            name: other[name] for name in other if name.startswith("reward")
        }
        np.testing.assert_allclose([one[n] for n in ("loss", "kl")], [other[n] for n in ("loss", "kl")], atol=1e-5)
    assert len({line["loss"] for line in lines}) == STEPS and len({line["reward"] for line in lines}) > 1
    ours, theirs = state(workdir), state(expected)
    assert (ours["visits"], ours["discarded"], ours["rng"]) == (theirs["visits"], theirs["discarded"], theirs["rng"])
    np.testing.assert_allclose(ours["score"], theirs["score"], atol=1e-5)
    heldout = [read_lines(folder / "heldout.jsonl") for folder in (workdir, expected)]
    assert heldout[0] == heldout[1] and len(heldout[0]) == 2
    weights, expected_weights = newest(workdir), newest(expected)
    for path, leaf in weights.items():
        np.testing.assert_allclose(leaf, expected_weights[path], atol=1e-5, err_msg=path)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [pytest.param("data", marks=pytest.mark.slow), "all", pytest.param("tensor", marks=pytest.mark.slow)]
)
def test_five_iterations_on_a_mesh_are_those_of_one_device(name, small_world, alone, tmp_path):
    run([job(small_world, MESHES[name], tmp_path / name)])
    check_same(tmp_path / name, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_so_are_those_of_two_processes_and_another_mesh_goes_on_from_their_checkpoint(small_world, alone, tmp_path):
    run([job(small_world, (2, 2, 2), tmp_path / "two")], processes=2)
    check_same(tmp_path / "two", alone)
    for folder in (tmp_path / "two", alone):
        shutil.copytree(folder, tmp_path / f"on from {folder.name}")
    for folder in ("on from two", f"on from {alone.name}"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        config["steps"] = STEPS + 1
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    jobs = [job(small_world, (1, 1, 1), tmp_path / f"on from {name}", steps=STEPS + 1) for name in ("two", alone.name)]
    run(jobs)
    ours, theirs = (read_lines(tmp_path / f"on from {name}" / "metrics.jsonl") for name in ("two", alone.name))
    assert len(ours) == len(theirs) == STEPS + 1 and ours[-1]["reward"] == theirs[-1]["reward"]
    np.testing.assert_allclose(ours[-1]["loss"], theirs[-1]["loss"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_merged_rollouts_on_a_mesh_are_those_of_one_device(small_world, tmp_path):
    jobs = {"one": (1, 1, 1), **MESHES}
    run([job(small_world, sizes, tmp_path / name, rl__merged_rollouts=True) for name, sizes in jobs.items()])
    for name in MESHES:
        check_same(tmp_path / name, tmp_path / "one")


@pytest.mark.timeout(900)
def test_a_narrow_base_is_reinforced(small_world, tmp_path):
    config = small_world.config("grpo", **{**SETTINGS, "llm__storage": "int8"})
    assert de_grpo.train(config, tmp_path / "grpo", training_mesh(config)).finished
    assert len(read_lines(tmp_path / "grpo" / "metrics.jsonl")) == STEPS


def test_merged_rollouts_need_full_kernels(small_world):
    with pytest.raises(UserError, match="llm.storage=int8 has no full kernels .*--config.rl.merged_rollouts=False"):
        small_world.config("grpo", llm__storage="int8", rl__merged_rollouts=True)


def test_a_mesh_that_does_not_divide_the_responses_is_refused(small_world, monkeypatch):
    monkeypatch.setattr("favchat_jax.sharding.make_mesh", lambda _: MeshOf(3))
    config = small_world.config("grpo", **SETTINGS)
    with pytest.raises(UserError, match="batch=2 x rl.group=4 responses, together does not divide over mesh.data=3"):
        training_mesh(config)


class MeshOf:
    """A mesh of devices that are not here."""

    def __init__(self, data: int):
        self.shape = {**vars(MeshConfig(data=1, fsdp=1, tensor=1)), "data": data}
