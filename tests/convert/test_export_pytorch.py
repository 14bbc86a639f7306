"""The folder for PyTorch users is complete, loads without this package, and has the trained weights bit for bit."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer, MistralForCausalLM, pipeline

import favchat_jax
from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.run import load_run
from favchat_jax.checkpoints.table import Table, read
from favchat_jax.checkpoints.tensors import INDEX, open_tensors
from favchat_jax.convert import exported, face_code, favchat, lora
from favchat_jax.convert.exported import base_name
from favchat_jax.convert.mistral import write_copy
from favchat_jax.convert.pytorch.modeling_favchat import FaVChatForConditionalGeneration
from favchat_jax.convert.pytorch.processing_favchat import FaVChatProcessor
from favchat_jax.data.faces.detectors import centerface_file
from favchat_jax.data.sources import open_dataset
from favchat_jax.errors import UserError
from favchat_jax.generation.sampler import Sampling
from tests.conftest import DATA, ROOT, check_refusals, fill, same_weights
from tests.data.face_videos import beside, rendered, video
from tests.data.tokenizers_for_tests import TEXT, bert, byte_pairs
from tools import export_orbax
from tools.export_pytorch import export

QUESTION = "What is the person doing?"
# A script that blocks imports of JAX and of this package.
ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "favchat_jax"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

folder, clip, question = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
answer = model.answer(clip, question, max_new_tokens=12)
written = model.generate(**processor(videos=clip, text=question), max_new_tokens=12, do_sample=False)
assert processor.text(written[0]) == tokenizer.decode(written[0], skip_special_tokens=True).strip() == answer
print(answer)
"""


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """An export of stage 3; no test may change it."""
    out = tmp_path_factory.mktemp("exports") / "stage3"
    export(trained.folder / "stage3", out)
    return out


@pytest.fixture(scope="module")
def model(folder) -> FaVChatForConditionalGeneration:
    return FaVChatForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def clips(small_world) -> list:
    source = open_dataset(DATA, small_world.packed, "heldout")
    return [source[i] for i in range(4)]


@pytest.fixture(scope="module")
def run(trained) -> favchat_jax.Model:
    return favchat_jax.load(trained.folder / "stage3")


def ours(run, clip, folder, question=QUESTION, tokens=12) -> str:
    """Returns the run's own answer about a clip."""
    (folder / "clip.mp4").write_bytes(clip)
    return run.answer(folder / "clip.mp4", question, max_new_tokens=tokens)


def alone(folder: Path, place: Path) -> str:
    """Returns the answer about `place`/clip.mp4 of a process in `place` without JAX."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), str(place / "clip.mp4"), QUESTION],
        cwd=place,
        stdin=subprocess.DEVNULL,
        env={**environment, "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.removesuffix("\n")


def read_back(table: Table, file: Path, weights: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Reads `weights` back from a file with published names."""
    shapes = {path: leaf.shape for path, leaf in weights.items()}
    return read(table, open_tensors(file).items(), shapes, file, jnp.dtype(dtype))


def test_a_process_without_jax_loads_the_moved_folder_and_answers_like_the_run(folder, run, clips, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    expected = ours(run, clips[0].clip, tmp_path)
    assert alone(moved, tmp_path) == expected


@pytest.fixture(scope="module")
def looking(trained, tmp_path_factory) -> Path:
    """A workdir whose facial encoder reads faces, and beside it a clip of one."""
    workdir = shutil.copytree(trained.folder, tmp_path_factory.mktemp("looking") / "run") / "stage3"
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["face_crop"] = True
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir.parent / "clip.mp4").write_bytes(video(beside(rendered(16, 1), rendered(16, 4))))
    return workdir


def test_an_export_with_face_crops_finds_the_same_face_without_this_package(looking, tmp_path):
    export(looking, tmp_path / "export")
    assert (tmp_path / "export/centerface.onnx").read_bytes() == centerface_file().read_bytes()
    shutil.copyfile(looking.parent / "clip.mp4", tmp_path / "clip.mp4")
    run = favchat_jax.load(looking)
    assert alone(tmp_path / "export", tmp_path) == run.answer(tmp_path / "clip.mp4", QUESTION, max_new_tokens=12)
    processor = FaVChatProcessor.from_pretrained(tmp_path / "export")
    for how in ({}, {"face": 2}, {"face_crop": False}):
        frames = processor(videos=str(tmp_path / "clip.mp4"), text=QUESTION, **how)["frames"][0]
        np.testing.assert_array_equal(frames, run.encode(tmp_path / "clip.mp4", **how).frames)
    for line in ("CenterFace", "face=2"):
        assert line in (tmp_path / "export/README.md").read_text()


def test_an_export_without_face_crops_carries_no_detector_and_takes_one(folder, clips):
    assert not (folder / "centerface.onnx").exists()
    processor = FaVChatProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="no face detector: name one as `detector_model`"):
        processor(videos=clips[0].clip, text=QUESTION, face_crop=True)
    processor = FaVChatProcessor.from_pretrained(folder, detector_model=str(centerface_file()))
    assert processor(videos=clips[0].clip, text=QUESTION, face_crop=True)["frames"].shape[-1] == 6


def test_the_code_of_faces_is_the_packages_own_without_its_names():
    written = face_code.source()
    assert "favchat_jax" not in written and "jaxtyping" not in written
    names = [node.name for node in ast.parse(written).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names)) and {"CenterFace", "search", "link", "squares", "cut"} <= set(names)


def test_the_exported_model_answers_every_question_like_the_run(model, run, clips, tmp_path):
    pairs = [(clip, question.question) for clip in clips for question in clip.questions]
    assert len(pairs) > 8
    for clip, question in pairs:
        assert model.answer(clip.clip, question, max_new_tokens=12) == ours(run, clip.clip, tmp_path, question)


def test_an_earlier_turn_is_part_of_the_conversation(model, run, clips):
    frames = torch.randint(0, 256, (model.config.frames, 32, 32, 3), dtype=torch.uint8)
    turns = [("What color is the hair?", "black")]
    expected = run.sampler.answer(
        run.sampler.encode(frames[None].numpy()), [[[*turns, (QUESTION, None)]]], Sampling(12)
    )
    assert model.answer(frames, QUESTION, turns, max_new_tokens=12) == expected[0][0]
    with pytest.raises(ValueError, match="the question is empty"):
        model.answer(frames, " ")


def test_the_models_weights_are_exactly_those_of_the_two_files(folder):
    _, loading = FaVChatForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    names = {*open_tensors(folder / "llm"), *open_tensors(folder / "visual.safetensors")}
    assert json.loads((folder / INDEX).read_text())["weight_map"].keys() == names
    assert FaVChatForConditionalGeneration.from_pretrained(folder).state_dict().keys() == names


def test_the_moved_adapter_finds_its_base_and_gives_the_logits_of_the_merged_language_model(
    folder, small_world, tmp_path, monkeypatch
):
    tokens = torch.arange(40)[None]
    moved = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        alone = MistralForCausalLM.from_pretrained(small_world.llm)(tokens).logits
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(moved)(tokens).logits
        merged = MistralForCausalLM.from_pretrained(folder / "llm")(tokens).logits
    assert (adapted - merged).abs().max() <= 1e-5 * merged.abs().max()
    assert (adapted - alone).abs().max() > 1e-4 * merged.abs().max(), "stage 3 has moved the adapter"


def test_the_base_of_the_adapters_has_a_name_that_holds_from_any_place(small_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_name("runs/mistral") == str(tmp_path / "runs" / "mistral")
    cached = "hub/models--mistralai--Mistral-7B-Instruct-v0.2/snapshots/3ad372f/"
    assert base_name(cached) == "mistralai/Mistral-7B-Instruct-v0.2"
    write_copy(Path(small_world.llm), tmp_path / "copy")
    assert base_name("copy") == str(Path(small_world.llm).resolve())  # transformers reads no copy


def test_whoever_may_read_a_new_file_may_read_every_file(folder):
    (folder.parent / "new").touch()
    mode = (folder.parent / "new").stat().st_mode
    assert {path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_mode != mode} == set()


@pytest.mark.parametrize("tokenizer", [byte_pairs("v0.2"), byte_pairs("v0.3"), bert("hair", "is")])
def test_an_exported_tokenizer_reads_as_its_source_whatever_class_the_source_names(tokenizer, tmp_path):
    tokenizer.chat_template = "another conversation"
    tokenizer.save_pretrained(tmp_path / "source")
    fields = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    fields["tokenizer_class"] = "BertTokenizer" if tokenizer.cls_token else "LlamaTokenizer"
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(fields))
    exported.write_tokenizer(tmp_path / "out", str(tmp_path / "source"))
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert auto.get_vocab() == tokenizer.get_vocab() and auto.chat_template is None
    for text in (*TEXT, "<s>[INST] café"):
        assert auto(text).input_ids == tokenizer(text).input_ids


def test_the_needed_packages_are_those_of_the_project(folder):
    needed = (folder / "requirements.txt").read_text().splitlines()
    project = (ROOT / "requirements.txt").read_text()
    assert [line for line in needed if line.startswith("av>=18,")]
    assert all(line in project for line in needed if not line.startswith(("torch", "transformers")))


def test_the_cards_pipeline_answers_about_a_picture(folder, model):
    tag = re.search("^pipeline_tag: (.*)$", (folder / "README.md").read_text(), re.MULTILINE)[1]
    processor = FaVChatProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    ask = pipeline(tag, model=model, processor=processor)
    (said,) = ask(images=Image.fromarray(pixels), text=QUESTION, max_new_tokens=12, return_full_text=False)
    frames = np.stack([pixels] * model.config.frames)
    assert said["generated_text"] == model.answer(frames, QUESTION, max_new_tokens=12)


def test_the_processor_prepares_several_questions_at_once(folder, model, clips):
    processor, files = FaVChatProcessor.from_pretrained(folder), [clip.clip for clip in clips[:3]]
    questions = [QUESTION, "Which color is the hair of the person in this video?", "Is there a hat?"]
    written = model.generate(**processor(videos=files, text=questions), max_new_tokens=12, do_sample=False)
    expected = [model.answer(*pair, max_new_tokens=12) for pair in zip(files, questions, strict=True)]
    assert [processor.text(row) for row in written] == expected
    for bad, says in (((files, QUESTION), "3 videos and 1 questions"), ((files[0], " "), "the question is empty")):
        with pytest.raises(ValueError, match=says):
            processor(videos=bad[0], text=bad[1])


def test_stage_1_has_no_adapter_and_its_language_model_is_the_base(trained, small_world, tmp_path):
    export(trained.folder / "stage1", tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()
    base, copy = open_tensors(small_world.llm), open_tensors(tmp_path / "out" / "llm")
    assert base.keys() == copy.keys()
    assert all(np.array_equal(np.asarray(base[name]), np.asarray(copy[name])) for name in base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_come_back_bit_for_bit_in_either_dtype(dtype, trained, tmp_path):
    for stage in ("stage1", "stage3"):
        export(trained.folder / stage, tmp_path / stage, dtype)
        run = load_run(trained.folder / stage)
        weights = {path: leaf.astype(dtype) for path, leaf in run.weights.items()}
        adapters = {path: leaf for path, leaf in weights.items() if "lora" in path}
        visual = {path: leaf for path, leaf in weights.items() if not path.startswith("llm/")}
        assert same_weights(read_back(favchat.TABLE, tmp_path / stage / "visual.safetensors", visual, dtype), visual)
        if adapters:
            file = tmp_path / stage / "adapter" / "adapter_model.safetensors"
            assert same_weights(read_back(lora.TABLE, file, adapters, dtype), adapters)
        else:  # without adapters, the language model is the base
            llm = dict(mistral.each_weight(run.config.llm.path, dtype))
            assert same_weights(read_back(mistral.TABLE, tmp_path / stage / "llm", llm, dtype), llm)


def test_a_bfloat16_export_loads_and_answers_in_bfloat16(trained, clips, tmp_path):
    export(trained.folder / "stage3", tmp_path / "out", "bfloat16")
    model = FaVChatForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert isinstance(model.answer(clips[0].clip, QUESTION, max_new_tokens=4), str)


def test_a_large_language_model_is_written_in_shards_that_load(trained, model, tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "SHARD_BYTES", 40_000)
    export(trained.folder / "stage3", tmp_path / "out")
    shards = sorted((tmp_path / "out" / "llm").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        with safe_open(shard, framework="numpy") as file:
            assert len(file.keys()) == 1 or shard.stat().st_size < 45_000
    loaded = FaVChatForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    alone = MistralForCausalLM.from_pretrained(tmp_path / "out" / "llm").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in alone.items())


def test_a_copy_of_the_language_model_is_exported_like_its_folder(trained, small_world, model, tmp_path):
    workdir = trained.copy("stage3", tmp_path)
    write_copy(Path(small_world.llm), tmp_path / "copy")
    settings = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**settings, "llm": {"path": str(tmp_path / "copy")}}))
    export(workdir, tmp_path / "out")
    found = FaVChatForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    export_orbax.export(workdir, tmp_path / "whole")
    shutil.rmtree(tmp_path / "copy")
    assert same_weights(load_run(tmp_path / "whole").weights, load_run(trained.folder / "stage3").weights)


def test_an_earlier_export_is_replaced_and_anything_else_is_refused(trained, folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "old").touch()
    export(trained.folder / "stage3", out)
    assert not (out / "old").exists() and {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for other in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", trained.folder / "stage3"):
        with pytest.raises(UserError, match=f"--out={other} exists and is not an earlier export"):
            export(trained.folder / "stage3", other)
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_nothing_behind(trained, small_disk):
    ballast = fill(small_disk)
    with ballast.open("rb+") as file:
        file.truncate(ballast.stat().st_size - 200_000)
    with pytest.raises(UserError, match="could not write .*/out .*: free disk space"):
        export(trained.folder / "stage3", small_disk / "out")
    assert [entry.name for entry in small_disk.iterdir()] == ["ballast"]


def test_a_language_model_with_a_missing_shard_leaves_nothing_behind(trained, small_world, tmp_path):
    workdir = trained.copy("stage3", tmp_path)
    llm = shutil.copytree(small_world.llm, tmp_path / "mistral")
    settings = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**settings, "llm": {"path": str(llm)}}))
    (llm / "model.safetensors").unlink()
    with pytest.raises(UserError, match="mistral/model.safetensors is missing"):
        export(workdir, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"stage3", "mistral"}


def test_bad_usage_and_bad_input_are_one_line_and_exit_2(trained, folder, tmp_path):
    stage3 = trained.folder / "stage3"
    (tmp_path / "file").touch()
    bad = {
        "needed: --checkpoint=WORKDIR --out=FOLDER": (f"--checkpoint={stage3}",),
        f"{tmp_path}/config.json is missing": (f"--checkpoint={tmp_path}", f"--out={tmp_path}/out"),
        f"{folder} is an export for PyTorch, not a run": (f"--checkpoint={folder}", f"--out={tmp_path}/out"),
        "exists and is not an earlier export": (f"--checkpoint={stage3}", f"--out={trained.folder}"),
        "could not write": (f"--checkpoint={stage3}", f"--out={tmp_path}/file/out"),
        "<float32|bfloat16>": (f"--checkpoint={stage3}", f"--out={tmp_path}/out", "--dtype=int4"),
    }
    check_refusals("tools.export_pytorch", bad)
    assert {entry.name for entry in tmp_path.iterdir()} == {"file"}
