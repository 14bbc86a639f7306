import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from favchat_jax import stages
from favchat_jax.checkpoints import initial as initial_room
from favchat_jax.checkpoints import mistral_folder, store
from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.initial import initial_weights
from favchat_jax.checkpoints.run import load_frozen, load_trained
from favchat_jax.checkpoints.weights_folder import save_weights
from favchat_jax.errors import UserError
from tests.conftest import damage, newest, same_weights
from tools import export_orbax, export_pytorch


@pytest.fixture(scope="module")
def start(small_world):
    """The weights that stage 1 starts from, all drawn afresh but the language model's."""
    config = small_world.config("stage1")
    return initial_weights(assembly.assemble(config))


@pytest.fixture(scope="module")
def runs(trained):
    """All weights of each finished stage, as answering loads them."""
    return {stage: assembly.load_run(trained.folder / stage).weights for stage in trained.outcomes}


def initial(config):
    return initial_weights(assembly.assemble(config))


def part(weights: dict, prefix: str) -> dict:
    return {path: leaf for path, leaf in weights.items() if path.startswith(prefix)}


@pytest.mark.parametrize(("stage", "before"), [("stage1", None), ("stage2", "stage1"), ("stage3", "stage2")])
def test_a_stage_changes_every_group_that_it_trains_and_not_a_bit_of_the_others(stage, before, runs, start):
    old, new = (start if before is None else runs[before]), runs[stage]
    trains = stages.TRAINS["v1"][stage]
    shared = {path for path in new if path in old}
    assert set(new) - shared == {p for p in new if stages.group_of(p) == "lora" and stage == "stage2"}
    changed = {path for path in shared if not np.array_equal(old[path], new[path])}
    assert {stages.group_of(path) for path in changed} == set(trains) - ({"lora"} if stage == "stage2" else set())
    # What the last layer of a Q-Former makes of the question is read by nothing; its biases have no gradient.
    still = {path for path in shared - changed if stages.group_of(path) in trains and "qformer/layer_0/mlp" not in path}
    assert not still


def test_stage_2_moves_the_adapters_that_it_starts(runs):
    adapters = {p: leaf for p, leaf in runs["stage2"].items() if p.endswith("lora_b")}
    assert len(adapters) == 8 and all(np.any(leaf) for leaf in adapters.values()), "B starts as zeros"


def test_a_workdir_is_whole_without_the_one_it_started_from(trained, runs, tmp_path):
    copy = trained.copy("stage3", tmp_path)
    assert "encoders" in {stages.group_of(path) for path in load_frozen(copy)}
    assert same_weights(assembly.load_run(copy).weights, runs["stage3"])


@pytest.mark.parametrize("lost", ["frozen", "frozen/leaves.json"])
def test_a_workdir_that_was_half_copied_neither_answers_nor_is_exported(lost, trained, tmp_path):
    copy = trained.copy("stage3", tmp_path)
    shutil.rmtree(copy / lost) if lost == "frozen" else (copy / lost).unlink()
    says = {
        "frozen": "stage3 lacks .* and .* more weights, because frozen/ is missing: copy the complete workdir again",
        "frozen/leaves.json": "frozen/leaves.json is missing: copy the complete workdir again",
    }[lost]
    for use in (
        assembly.load_run,
        lambda run: export_pytorch.export(run, tmp_path / "out"),
        lambda run: export_orbax.export(run, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=says):
            use(copy)
    assert [entry.name for entry in tmp_path.iterdir()] == ["stage3"]


def test_a_stage_does_not_draw_afresh_what_the_stage_before_has_lost(small_world, trained, monkeypatch):
    whole = load_trained(trained.folder / "stage2")
    lost = next(path for path in whole if path.startswith("umt/"))
    kept = {path: leaf for path, leaf in whole.items() if path != lost}
    monkeypatch.setattr(assembly, "load_frozen", lambda workdir: kept)
    monkeypatch.setattr(store.Checkpoints, "load_trainable", lambda self: (1, {}))
    with pytest.raises(UserError, match=f"stage2 lacks {lost}.*: copy the complete workdir again"):
        initial(small_world.config("stage3", init__from_run=str(trained.folder / "stage2")))


def test_a_run_whose_config_is_of_another_size_is_a_users_error(trained, tmp_path):
    copy = trained.copy("stage1", tmp_path)
    settings = json.loads((copy / "config.json").read_text())
    settings["model"]["adapter"]["hidden"] = 24
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="stage1: adapter/.* has shape .*, its config.json says"):
        assembly.load_run(copy)


def test_a_folder_that_is_no_run_is_named_for_what_it_is(small_world, tmp_path):
    save_weights(tmp_path / "umt", {"a": np.ones(3, np.float32)}, {"kind": "umt"})
    (tmp_path / "pytorch").mkdir()
    (tmp_path / "pytorch" / "config.json").write_text('{"model_type": "favchat"}')
    folders = {
        tmp_path / "umt": r"a weights folder \(umt\)",
        tmp_path / "pytorch": "an export for PyTorch",
        small_world.llm: "a language model's folder",
    }
    for folder, what in folders.items():
        with pytest.raises(UserError, match=f"{folder} is {what}, not a run: name a stage's workdir"):
            assembly.load_run(folder)


def test_flipped_bits_in_the_frozen_weights_are_a_users_error(trained, tmp_path):
    copy = trained.copy("stage3", tmp_path)
    damage(copy / "frozen" / "weights")
    with pytest.raises(UserError, match="stage3/frozen is damaged"):
        assembly.load_run(copy)


def test_encoders_and_qformers_come_from_their_folders(small_world, runs, start, tmp_path):
    source = runs["stage1"]
    visual = {**part(source, "umt/"), **part(source, "vision_layernorm/")}
    save_weights(tmp_path / "umt", visual, {"kind": "umt"})
    save_weights(tmp_path / "facexformer", part(source, "facexformer/"), {"kind": "facexformer"})
    one = {path.removeprefix("facial_qformer/"): leaf for path, leaf in part(source, "facial_qformer/").items()}
    save_weights(tmp_path / "qformer", one, {"kind": "qformer"})
    folders = {f"init__{name}": str(tmp_path / name) for name in ("umt", "facexformer", "qformer")}
    weights = initial(small_world.config("stage1", **folders))
    assert all(np.array_equal(weights[path], leaf) for path, leaf in visual.items())
    assert same_weights(part(weights, "facexformer/"), part(source, "facexformer/"))
    for stream in ("general_qformer/", "facial_qformer/"):
        assert all(np.array_equal(weights[stream + path], leaf) for path, leaf in one.items())
    for fresh in ("fusion/", "adapter/", "general_proj/"):
        assert same_weights(part(weights, fresh), part(start, fresh))


def test_v2_can_start_from_the_q_formers_of_a_run_of_v1_with_their_linear_layers(small_world, trained, runs):
    weights = initial(small_world.config("stage1", "variant=v2", init__qformer=str(trained.folder / "stage1")))
    for taken in ("general_qformer/", "facial_qformer/", "general_proj/", "facial_proj/"):
        assert same_weights(part(weights, taken), part(runs["stage1"], taken))
    assert not same_weights(part(weights, "umt/"), part(runs["stage1"], "umt/")), "encoders have sources of their own"


def test_without_a_face_stream_its_weights_in_a_folder_are_left_out(small_world, runs, tmp_path):
    save_weights(tmp_path / "facexformer", part(runs["stage1"], "facexformer/"), {})
    config = small_world.config("stage1", "ablation=no_face", init__facexformer=str(tmp_path / "facexformer"))
    assert not part(initial(config), "facexformer/")


def test_a_folder_with_weights_that_the_model_has_not_is_a_users_error(small_world, tmp_path):
    save_weights(tmp_path / "umt", {"umt/extra/kernel": np.ones(3, np.float32)}, {})
    with pytest.raises(UserError, match="umt holds umt/extra/kernel, which this model lacks"):
        initial(small_world.config("stage1", init__umt=str(tmp_path / "umt")))


def test_a_folder_with_weights_of_another_size_is_a_users_error_that_names_the_first(small_world, runs):
    other = small_world.config("stage1", model__umt__width=24, init__umt="")
    shapes = assembly.assemble(other).shapes
    path = next(path for path in shapes if shapes[path].shape != runs["stage1"][path].shape)
    with pytest.raises(UserError, match=f"{path} has shape .*, expected "), pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial_room, "load_weights", lambda _: {path: runs["stage1"][path]})
        initial(other.updated({"init.umt": "folder"}))


def test_a_folder_that_is_missing_is_a_users_error(small_world, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/umt is not a weights folder"):
        initial(small_world.config("stage1", init__umt=str(tmp_path / "umt")))


def test_answering_refuses_a_language_model_that_has_changed_since(trained, small_world, tmp_path):
    copy = trained.copy("stage2", tmp_path)
    other = shutil.copytree(small_world.llm, tmp_path / "mistral")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, "llm": {"path": str(other)}}))
    assembly.load_run(copy)  # the same model at another place is fine
    weights = mistral_folder.read_weights(other)
    mistral_folder.write_weights(other, jax.tree.map(lambda leaf: leaf + 1, weights))
    with pytest.raises(UserError, match="mistral is not the language model that .*stage2 was trained on"):
        assembly.load_run(copy)


@pytest.mark.parametrize("content", [b"{\xff", b"{}", b"[]"])
@pytest.mark.parametrize("name", ["config.json", "llm.json"])
def test_a_workdir_with_a_damaged_file_is_a_users_error_that_names_it(name, content, trained, tmp_path):
    copy = trained.copy("stage1", tmp_path)
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        assembly.load_run(copy)


def test_a_prompt_tokenizer_with_more_words_than_the_qformer_is_a_users_error(small_world):
    with pytest.raises(UserError, match="prompt_tokenizer has 512 tokens but model.qformer.vocabulary is 100"):
        assembly.assemble(small_world.config("stage1", model__qformer__vocabulary=100))


def test_a_language_models_tokenizer_with_an_id_beyond_its_embedding_is_a_users_error(small_world, trained, tmp_path):
    folder = Path(shutil.copytree(small_world.llm, tmp_path / "mistral"))
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": size, "content": " hair", **added})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    says = f"the tokenizer in {folder} has 513 tokens but vocab_size in its config.json is 512: "
    config = small_world.config("stage1", llm__path=str(folder), prompt_tokenizer=small_world.llm)
    with pytest.raises(UserError, match=says):
        assembly.assemble(config)
    with pytest.raises(UserError, match="prompt_tokenizer has 513 tokens but model.qformer.vocabulary is 512"):
        assembly.assemble(small_world.config("stage1", prompt_tokenizer=str(folder)))
    workdir = trained.copy("stage3", tmp_path)  # refused at answering too
    fields = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**fields, "llm": {"path": str(folder)}}))
    with pytest.raises(UserError, match=says):
        assembly.load_run(workdir)


def test_a_run_answers_with_the_newest_weights(trained, runs):
    for path, leaf in newest(trained.folder / "stage2").items():
        assert np.array_equal(runs["stage2"][path], leaf)


def test_stages_start_from_a_converted_videochat2_with_its_lora_from_stage_2_on(small_world, trained, runs, tmp_path):
    stage1, stage2 = runs["stage1"], runs["stage2"]
    converted = {**part(stage1, "umt/"), **part(stage1, "vision_layernorm/")}
    for name in ("qformer", "proj"):
        streamed = part(stage1, f"general_{name}/")
        converted |= {path.removeprefix("general_"): leaf for path, leaf in streamed.items()}
    adapters = {path: leaf for path, leaf in stage2.items() if path.endswith(("lora_a", "lora_b"))}
    converted = {path: np.asarray(leaf) + 1 for path, leaf in {**converted, **adapters}.items()}
    save_weights(tmp_path / "videochat2", converted, {})

    first = initial(small_world.config("stage1", init__videochat2=str(tmp_path / "videochat2")))
    assert same_weights(part(first, "umt/"), part(converted, "umt/"))
    for stream in ("general_", "facial_"):
        for name in ("qformer/", "proj/"):
            placed = {stream + path: leaf for path, leaf in part(converted, name).items()}
            assert placed and same_weights(part(first, stream + name), placed)
    assert not [path for path in first if "lora" in path]

    sources = {"init__videochat2": str(tmp_path / "videochat2"), "init__from_run": str(trained.folder / "stage1")}
    second = initial(small_world.config("stage2", **sources))
    assert adapters and all(np.array_equal(second[path], converted[path]) for path in adapters)
    assert all(np.array_equal(second[path], leaf) for path, leaf in stage1.items())


def test_facexformers_own_fusion_is_taken_where_it_stands_in_for_ours_and_left_out_elsewhere(small_world, tmp_path):
    config = small_world.config("stage1", "ablation=no_granularity")
    fuse = part(initial(config), "linear_fuse/")
    save_weights(tmp_path / "facexformer", {path: leaf + 1 for path, leaf in fuse.items()}, {})
    folder = str(tmp_path / "facexformer")
    taken = initial(small_world.config("stage1", "ablation=no_granularity", init__facexformer=folder))
    assert fuse and all(np.array_equal(taken[path], leaf + 1) for path, leaf in fuse.items())
    assert not part(initial(small_world.config("stage1", init__facexformer=folder)), "linear_fuse/")
