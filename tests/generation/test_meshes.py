"""Answers on any mesh are those of one device, and each device holds its share of the weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from favchat_jax.config import MeshConfig
from favchat_jax.errors import UserError
from favchat_jax.sharding import answering_mesh
from tests.conftest import on_devices

ONE, DATA, ALL, TENSOR, FSDP = (1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 8, 1)


def done_by(jobs: list, folder: Path) -> list[dict]:
    """What `many_meshes.py` prints of some jobs, on eight devices."""
    return json.loads(
        on_devices("tests/generation/many_meshes.py", lambda _: [str(folder), json.dumps(jobs)]).splitlines()[-1]
    )


def check_same(found: dict, expected: dict) -> None:
    assert found["tokens"] == expected["tokens"]
    assert len({tuple(row) for row in expected["tokens"][0]}) > 1
    np.testing.assert_allclose(found["log_p"], expected["log_p"], atol=1e-5, rtol=1e-6)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("meshes", [[ALL], pytest.param([DATA, TENSOR], marks=pytest.mark.slow)])
def test_a_mesh_answers_token_for_token_as_one_device_and_cuts_the_language_model(meshes, tmp_path):
    expected, *others = done_by([(mesh, 8, "full") for mesh in (ONE, *meshes)], tmp_path)
    for mesh, found in zip(meshes, others, strict=True):
        check_same(found, expected)
        for name in ("layers_1/qkv_proj", "layers_1/o_proj", "layers_1/gate_up_proj", "layers_1/down_proj"):
            assert found["shares"][f"llm/{name}/transposed"] == 1 / (mesh[1] * mesh[2]), (mesh, name)
        assert found["shares"]["llm/norm/scale"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_so_do_single_clips_narrow_kernels_and_weights_that_are_gathered(tmp_path):
    for clips, storage, mesh in (
        (1, "full", TENSOR),
        (1, "full", ALL),
        (8, "int8", ALL),
        (8, "int4", TENSOR),
        (8, "full", FSDP),
    ):
        expected, found = done_by([(ONE, clips, storage), (mesh, clips, storage)], tmp_path)
        check_same(found, expected)


class Card:
    """A device with this many bytes of memory; answering asks it for nothing else."""

    def __init__(self, number, memory=None):
        self.id, self._memory = number, memory

    def memory_stats(self):
        return self._memory and {"bytes_limit": self._memory}


@pytest.mark.parametrize(
    ("count", "heads", "batch", "weights", "expected"),
    [
        (1, 8, 1, 10, (1, 1, 1)),
        (8, 8, 1, 10, (1, 1, 8)),  # one clip: all devices answer together
        (8, 8, 8, 10, (8, 1, 1)),  # a clip a device
        (8, 8, 4, 10, (4, 1, 2)),
        (8, 8, 8, 150, (4, 1, 2)),  # the weights need two devices
        (8, 8, 8, 10_000, (1, 1, 8)),  # they do not fit: the most shares
        (8, 2, 1, 10, (1, 1, 2)),  # more devices than heads: six stay idle
        (6, 8, 3, 10, (3, 1, 2)),
    ],
)
def test_by_default_the_mesh_suits_the_batch_and_the_memory(count, heads, batch, weights, expected, monkeypatch):
    made = {}

    def make_mesh(shape, axes, axis_types, devices):
        made.update(shape=shape, devices=len(devices))

    monkeypatch.setattr(jax, "make_mesh", make_mesh)
    cards = [Card(number, 100) for number in range(count)]
    answering_mesh(None, heads=heads, batch=batch, weights=weights, devices=cards)
    assert made == {"shape": expected, "devices": np.prod(expected)}


def test_a_mesh_that_does_not_suit_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, **options: SimpleNamespace(shape={"tensor": shape[2]}))
    eight = [Card(number) for number in range(8)]
    with pytest.raises(UserError, match="mesh.tensor=4 does not divide the language model's 2 key/value heads"):
        answering_mesh(MeshConfig(data=1, fsdp=1, tensor=4), heads=2, devices=eight)
    with pytest.raises(UserError, match="mesh.tensor=16 needs 16 devices, but this run has 8"):
        answering_mesh(MeshConfig(data=1, fsdp=1, tensor=16), heads=16, devices=eight)
