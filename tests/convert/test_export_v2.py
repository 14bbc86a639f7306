"""Exports of v2 load without this package and have the run's weights bit for bit; incomplete ones are refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import favchat_jax
from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.run import assemble, load_run
from favchat_jax.checkpoints.tensors import open_tensors
from favchat_jax.checkpoints.weights_folder import save_weights
from favchat_jax.convert import favchat
from favchat_jax.convert.pytorch.modeling_favchat import FaVChatForConditionalGeneration
from favchat_jax.data.sources import open_dataset
from favchat_jax.embedded.prepare import prepare
from favchat_jax.errors import UserError
from favchat_jax.stages import group_of
from tests.conftest import DATA, same_weights
from tests.convert.test_export_pytorch import QUESTION, alone, read_back
from tests.models.tiny_parts import drawn_flat
from tools.compare_export import compare
from tools.export_pytorch import export


@dataclasses.dataclass(frozen=True)
class Exported:
    """A run of v2, its export and the clips of its data; no test may change the folders."""

    run: Path
    folder: Path
    clips: list[bytes]


@pytest.fixture(scope="module")
def exported(small_world, tmp_path_factory) -> Exported:
    """A self-contained run with random weights, so that parts initialised to zero also affect its answers."""
    place = tmp_path_factory.mktemp("v2")
    config = small_world.config("stage3", "variant=v2")
    shapes = assemble(config).shapes
    weights = drawn_flat({path: leaf for path, leaf in shapes.items() if group_of(path) != "llm"}, 0.3)
    save_weights(place / "run", weights, config.updated({"llm.path": "llm"}).to_json())
    shutil.copytree(small_world.llm, place / "run" / "llm")
    fingerprint = {"fingerprint": mistral.fingerprint(small_world.llm)}
    (place / "run" / "llm.json").write_text(json.dumps(fingerprint))
    export(place / "run", place / "out")
    source = open_dataset(DATA, small_world.packed, "heldout")
    return Exported(place / "run", place / "out", [source[i].clip for i in range(3)])


def changed(folder: Path, into: Path, **fields) -> Path:
    """Copies a folder and changes fields of its config.json."""
    copy = Path(shutil.copytree(folder, into / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **fields}))
    return copy


def test_processes_with_and_without_jax_answer_like_the_run(exported, tmp_path):
    moved = shutil.copytree(exported.folder, tmp_path / "elsewhere")
    run, model = favchat_jax.load(exported.run), FaVChatForConditionalGeneration.from_pretrained(moved)
    answers = {}
    for clip in exported.clips:
        (tmp_path / "clip.mp4").write_bytes(clip)
        for question in (QUESTION, "Which color is the hair of the person?"):
            answers[clip, question] = run.answer(clip, question, max_new_tokens=12)
            assert model.answer(clip, question, max_new_tokens=12) == answers[clip, question]
    asked = {question: [answers[clip, question] for clip in exported.clips] for _, question in answers}
    assert any(len(set(said)) > 1 for said in asked.values()), "the clip shows in the answer"
    assert len({tuple(said) for said in asked.values()}) > 1, "the question shows in the answer"
    assert alone(moved, tmp_path) == answers[exported.clips[-1], QUESTION]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_back_bit_for_bit_in_either_dtype(dtype, exported, tmp_path):
    export(exported.run, tmp_path / "out", dtype)
    weights = {path: np.asarray(leaf.astype(dtype)) for path, leaf in load_run(exported.run).weights.items()}
    visual = {path: leaf for path, leaf in weights.items() if not path.startswith("llm/")}
    assert same_weights(read_back(favchat.TABLE, tmp_path / "out" / "visual.safetensors", visual, dtype), visual)
    loaded = FaVChatForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    files = [open_tensors(tmp_path / "out" / name) for name in ("llm", "visual.safetensors")]
    assert loaded.keys() == {name for file in files for name in file}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"variant": "v1"}, r"says variant=v1, ablation=none, but its files lack adapter\.facial_in\.bias and \d+ "),
        ({"ablation": "no_moe"}, r"says variant=v2, ablation=no_moe, but its files lack adapter\.weights: export it"),
        ({"variant": "v3"}, "variant=v3 is unknown: choose v1 or v2"),
        ({"qformer": {"prompt": False}}, "prompt=False leaves v2 without the question that guides it"),
    ],
)
def test_an_export_whose_config_names_another_model_is_refused_in_one_line(fields, says, exported, tmp_path):
    with pytest.raises(ValueError, match=says) as refused:
        FaVChatForConditionalGeneration.from_pretrained(changed(exported.folder, tmp_path, **fields))
    assert "\n" not in str(refused.value)


def test_weights_that_do_not_belong_to_the_model_are_refused(exported, tmp_path):
    umt = json.loads((exported.folder / "config.json").read_text())["umt"]
    copy = changed(exported.folder, tmp_path, umt={**umt, "layers_run": 1})
    with pytest.raises(ValueError, match=r"but its files also hold vision_encoder\.encoder\.blocks\.1\.attn\.proj"):
        FaVChatForConditionalGeneration.from_pretrained(copy)


def test_a_run_whose_config_names_the_other_variant_is_not_exported(exported, trained, tmp_path):
    v2_as_v1 = changed(exported.run, tmp_path / "one", variant="v1")
    v1_as_v2 = changed(trained.folder / "stage3", tmp_path / "two", variant="v2")
    for run in (v2_as_v1, v1_as_v2):
        with pytest.raises(UserError, match="copy lacks adapter/.* and .* more weights"):
            export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_not_compared_with_a_run_of_the_other_variant(exported, trained):
    with pytest.raises(UserError, match="has variant=v2, --checkpoint=.*/stage3 has v1: export that checkpoint with"):
        compare(trained.folder / "stage3", exported.folder, limit=1)


def test_an_export_cannot_be_the_run_that_a_stage_starts_from(exported, small_world):
    config = small_world.config("stage3", "variant=v2", init__from_run=str(exported.folder))
    with pytest.raises(UserError, match="is an export for PyTorch, not a run"):
        prepare(config)
