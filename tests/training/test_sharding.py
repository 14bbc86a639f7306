import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from configs import stage2
from favchat_jax import sharding
from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.initial import new_state
from favchat_jax.config import ABLATIONS, VARIANTS, Config, MeshConfig
from favchat_jax.errors import UserError
from favchat_jax.models import favchat
from favchat_jax.models.mistral import MistralConfig
from favchat_jax.training.batches import open_batches
from favchat_jax.training.optimizer import make_optimizer
from tests.conftest import on_devices
from tests.models.tiny_parts import MISTRAL, MISTRAL_7B

PUBLISHED = MistralConfig.from_json(MISTRAL_7B)
STEPS = 5
# Name -> (sizes of the mesh, processes that share its devices).
MESHES = {
    "one device": ((1, 1, 1), 1),
    "8x1x1": ((8, 1, 1), 1),
    "2x4x1": ((2, 4, 1), 1),
    "2x2x2": ((2, 2, 2), 1),
    "two processes": ((2, 4, 1), 2),
}


def abstract_mesh(*sizes: int) -> AbstractMesh:
    """A mesh of devices that are not here."""
    return AbstractMesh(sizes, sharding.AXES)


# What an ablation changes is the same in all presets.
@pytest.mark.parametrize(
    ("preset", "variant", "ablation"),
    [("tiny", variant, ablation) for variant in VARIANTS for ablation in ABLATIONS]
    + [(preset, variant, "none") for preset in ("base", "paper") for variant in VARIANTS],
)
def test_every_weight_of_every_model_has_one_row_in_the_table(preset, variant, ablation):
    config = Config.from_ml_collections(stage2.get_config(f"preset={preset},variant={variant},ablation={ablation}"))
    # One block stands for the many of the same kind, whose paths differ by a number.
    config = config.updated({"model.facexformer.depths": (1, 1, 2, 1), "model.qformer.depth": 2})
    llm = PUBLISHED if preset == "paper" else MISTRAL
    model = favchat.build(config.model, llm, variant=variant, ablation=ablation, lora_rank=2)
    shapes = assembly.weight_shapes(model, config.model)
    mesh = abstract_mesh(1, 8, 1)
    specs = {path: shards.spec for path, shards in sharding.partitions(shapes, mesh).items()}
    if preset == "paper":
        whole = [path for path, spec in specs.items() if set(spec) <= {None}]
        assert sum(shapes[path].size for path in whole) < 0.001 * sum(leaf.size for leaf in shapes.values())


def test_a_weight_that_no_row_or_more_than_one_matches_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="umt/secret has 0 rows"):
        sharding.partition("umt/secret", (4, 4), abstract_mesh(1, 8, 1))
    monkeypatch.setattr(sharding, "TABLE", (*sharding.TABLE, (r"umt/.*", P())))
    with pytest.raises(ValueError, match="umt/patch_embed/proj/kernel has 2 rows"):
        sharding.partition("umt/patch_embed/proj/kernel", (4, 4), abstract_mesh(1, 8, 1))


def test_the_language_models_products_are_cut_along_both_axes_and_what_does_not_divide_stays_whole():
    mesh = abstract_mesh(1, 2, 4)
    assert sharding.partition("llm/layers/mlp/up_proj/kernel", (32, 8, 16), mesh).spec == P(None, "fsdp", "tensor")
    assert sharding.partition("llm/layers/mlp/down_proj/kernel", (32, 16, 8), mesh).spec == P(None, "tensor", "fsdp")
    assert sharding.partition("llm/layers/mlp/up_proj/kernel", (32, 8, 18), mesh).spec == P(None, "fsdp")
    assert sharding.partition("umt/blocks/mlp/fc1/kernel", (23, 16, 4), mesh).spec == P(None, ("fsdp", "tensor"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_as_the_weights_that_they_are_of(name):
    config = Config.from_ml_collections(stage2.get_config("preset=tiny")).updated({"optimizer.name": name})
    optimizer = make_optimizer(config.optimizer, 10)
    weights = {
        "umt/blocks/attn/qkv/kernel": jax.ShapeDtypeStruct((2, 16, 48), np.float32),
        "llm/layers/mlp/up_proj/lora_b": jax.ShapeDtypeStruct((2, 2, 8), np.float32),
        "adapter/gate_in/kernel": jax.ShapeDtypeStruct((16, 8), np.float32),
    }
    state = jax.eval_shape(lambda weights: new_state(weights, optimizer, 0), weights)
    mesh = abstract_mesh(1, 4, 2)
    leaves = jax.tree_util.tree_leaves_with_path(sharding.state_partitions(state, mesh))
    moments = [(str(path), shards.spec) for path, shards in leaves if "kernel" in str(path) or "lora" in str(path)]
    assert len(moments) > 2 * len(weights) - 1
    expected = {path: sharding.partition(path, leaf.shape, mesh).spec for path, leaf in weights.items()}
    expected["stacked/16x8/kernel"] = P(None, *expected["adapter/gate_in/kernel"])  # Muon's, of all of that shape
    for path, spec in moments:
        assert [spec] == [of for weight, of in expected.items() if weight in path], path


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((1, 4, 1), "mesh.data=1, mesh.fsdp=4, mesh.tensor=1 needs 4 devices, but this run has 1: choose a"),
        ((1, -1, -1), "give -1 only once"),
        ((0, 1, 1), "data=0: give a number above 0"),
        ((64, -1, 1), "mesh.data=64, mesh.fsdp=-1, mesh.tensor=1 needs 64 devices, but this run has 1"),
    ],
)
def test_a_mesh_that_the_devices_cannot_be_is_refused(sizes, says):
    with pytest.raises(UserError, match=says):
        sharding.make_mesh(MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))))


def test_a_mesh_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(UserError, match="mesh.data=3, mesh.fsdp=-1, mesh.tensor=1 does not divide the 4 devices"):
        sharding.make_mesh(MeshConfig(data=3, fsdp=-1, tensor=1), devices=[None] * 4)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    sharding.check_batch(16, 2, abstract_mesh(2, 4, 2), "batch=16")
    with pytest.raises(UserError, match="batch=12 does not divide .* choose a multiple of 8, or another mesh"):
        sharding.check_batch(12, 1, abstract_mesh(2, 4, 2), "batch=12")
    with pytest.raises(UserError, match="clips=12 does not divide"):
        sharding.check_batch(12, 1, abstract_mesh(2, 4, 2), "clips=12")
    with pytest.raises(UserError, match="choose a multiple of 16"):
        sharding.check_batch(8, 2, abstract_mesh(2, 4, 2), "batch=8")


@pytest.fixture(scope="module")
def spec(small_world, tmp_path_factory):
    """What `many_devices.py` is told but for its runs: stage 2, in which most weights train."""
    changes = {**small_world.changes, "batch": 8, "data.buckets": (160,)}
    config = small_world.config("stage2", batch=8)
    with contextlib.closing(open_batches(assembly.assemble(config))) as stream:
        batches = [{k: v for k, v in next(stream).arrays.items() if k != "length"} for _ in range(STEPS + 1)]
    file = tmp_path_factory.mktemp("batches") / "batches.npz"
    np.savez(file, **{name: np.stack([batch[name] for batch in batches]) for name in batches[0]})
    return {"stage": "stage2", "changes": changes, "batches": str(file)}


def in_processes(spec: dict, runs: list, processes: int) -> list[dict]:
    """Does runs on eight devices, in new processes that share them; what the first process prints."""

    def arguments(place: str) -> list[str]:
        return [json.dumps({**spec, "runs": runs, "processes": place})]

    return json.loads(on_devices("tests/training/many_devices.py", arguments, processes).splitlines()[-1])


@pytest.fixture(scope="module")
def on_meshes(spec, tmp_path_factory):
    """What each mesh's runs return: five steps of its own, then a sixth from a copy of another mesh's checkpoint."""
    folder = tmp_path_factory.mktemp("meshes")
    names = list(MESHES)

    def own(name: str) -> tuple[str, int]:
        return str(folder / name), STEPS

    alone = [name for name in names if MESHES[name][1] == 1]
    first = in_processes(spec, [(MESHES[name][0], [own(name)]) for name in alone], 1)
    results = dict(zip(alone, first, strict=True))
    # A ring through all meshes, so that each reads what another wrote.
    for before, name in zip([names[-1], *names[:-1]], names, strict=True):
        if MESHES[name][1] > 1:
            shutil.copytree(folder / before, folder / f"to {name}")
            sizes, processes = MESHES[name]
            (results[name],) = in_processes(spec, [(sizes, [own(name), (str(folder / f"to {name}"), 1)])], processes)
    for before, name in zip([names[-1], *names[:-1]], names, strict=True):
        if MESHES[name][1] == 1:
            shutil.copytree(folder / before, folder / f"to {name}")
    second = in_processes(spec, [(MESHES[name][0], [(str(folder / f"to {name}"), 1)]) for name in alone], 1)
    moved = {name: run["losses"][0] for name, run in zip(alone, second, strict=True)}
    moved |= {name: results[name]["losses"][1] for name in names if name not in alone}
    (reference,) = in_processes(spec, [(MESHES["one device"][0], [own("one device")[:1] + (1,)])], 1)
    return results, moved, reference["losses"][0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MESHES)
def test_five_steps_on_a_mesh_have_the_losses_of_a_single_device(name, on_meshes):
    results, _, _ = on_meshes
    expected, losses = results["one device"]["losses"][0], results[name]["losses"][0]
    assert len(set(expected)) == STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert results[name]["compilations"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MESHES)
def test_a_checkpoint_of_another_mesh_goes_on(name, on_meshes):
    _, moved, expected = on_meshes
    np.testing.assert_allclose(moved[name], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_device_holds_more_than_its_share_of_a_matrix(on_meshes):
    results, _, _ = on_meshes
    for name, share in (("8x1x1", 1), ("2x4x1", 1 / 4), ("2x2x2", 1 / 4), ("two processes", 1 / 4)):
        shares = results[name]["shares"]
        assert shares["umt/blocks/attn/qkv/kernel"] == share, name
        assert shares["general_proj/kernel"] == share, name
