"""The self-contained export loads from any place, without its run and the original language model."""

import json
import shutil
from pathlib import Path

import pytest

import favchat_jax
from favchat_jax.checkpoints.run import load_run
from favchat_jax.convert.pytorch.modeling_favchat import FaVChatForConditionalGeneration
from favchat_jax.data.sources import open_dataset
from favchat_jax.errors import UserError
from tests.conftest import DATA, check_refusals, damage, fill, same_weights, start_module
from tests.data.tokenizers_for_tests import bert
from tools import export_pytorch
from tools.export_orbax import export

QUESTION = "What is the person doing?"


@pytest.fixture(scope="module")
def folder(trained, small_world, tmp_path_factory) -> Path:
    """A moved export whose sources were deleted; no test may change it."""
    place = tmp_path_factory.mktemp("exports")
    workdir = trained.copy("stage3", place)
    set_paths(workdir, llm={"path": str(shutil.copytree(small_world.llm, place / "mistral"))})
    export(workdir, place / "out")
    shutil.rmtree(workdir)
    shutil.rmtree(place / "mistral")
    return (place / "out").rename(tmp_path_factory.mktemp("moved") / "favchat")


def set_paths(workdir: Path, **paths) -> None:
    settings = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**settings, **paths}))


def test_the_export_has_the_runs_config_and_its_weights_bit_for_bit(folder, trained):
    moved, run = load_run(folder), load_run(trained.folder / "stage3")
    assert same_weights(moved.weights, run.weights)
    differing = {name for name, value in vars(moved.config).items() if value != getattr(run.config, name)}
    assert differing == {"llm"} and moved.config.llm.path == str(folder / "llm")
    assert moved.parts.tokenizer.get_vocab() == run.parts.tokenizer.get_vocab()


def test_chat_gives_the_same_answer_with_the_export_as_with_the_run(folder, trained, small_world, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(open_dataset(DATA, small_world.packed, "heldout")[0].clip)
    run = favchat_jax.load(trained.folder / "stage3")
    expected = run.answer(tmp_path / "clip.mp4", QUESTION, max_new_tokens=12)
    flags = (f"--checkpoint={folder}", f"--video={tmp_path}/clip.mp4", f"--question={QUESTION}", "--max_new_tokens=12")
    chat = start_module("favchat_jax.chat", *flags, cwd=tmp_path)
    stdout, stderr = chat.communicate(timeout=200)
    assert (chat.returncode, stdout) == (0, expected + "\n"), stderr


def test_an_export_can_be_exported_again_to_both_kinds_of_folder(folder, trained, tmp_path):
    export(folder, tmp_path / "again")
    assert same_weights(load_run(tmp_path / "again").weights, load_run(folder).weights)
    export_pytorch.export(folder, tmp_path / "pytorch")
    export_pytorch.export(trained.folder / "stage3", tmp_path / "direct")
    one, other = (
        FaVChatForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("pytorch", "direct")
    )
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_the_export_contains_the_qformers_tokenizer(trained, tmp_path):
    workdir = trained.copy("stage3", tmp_path)
    bert("what", "is").save_pretrained(tmp_path / "bert")
    set_paths(workdir, prompt_tokenizer=str(tmp_path / "bert"))
    export(workdir, tmp_path / "out")
    shutil.rmtree(tmp_path / "bert")
    assert load_run(tmp_path / "out").parts.prompt.encode("hat")[0][0] == 2  # BERT's start token


def test_a_damaged_export_is_a_user_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / "weights")
    with pytest.raises(UserError, match="copy is damaged"):
        load_run(copy)
    shutil.rmtree(copy)
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "llm")
    with pytest.raises(UserError, match="copy/llm/config.json is missing"):
        load_run(copy)


def test_an_earlier_export_is_replaced_and_a_workdir_is_not(folder, trained, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "old").touch()
    (tmp_path / "out.draft").mkdir()  # the user's own folder
    export(trained.folder / "stage3", out)
    assert not (out / "old").exists() and {path.name for path in tmp_path.iterdir()} == {"out", "out.draft"}
    workdir = trained.copy("stage2", tmp_path)
    with pytest.raises(UserError, match=f"--out={workdir} exists and is not an earlier export"):
        export(trained.folder / "stage3", workdir)


def test_a_full_disk_leaves_nothing_behind(trained, small_disk):
    ballast = fill(small_disk)
    with ballast.open("rb+") as file:
        file.truncate(ballast.stat().st_size - 200_000)
    # In a separate process, since Orbax prints more lines about a full disk.
    process = start_module("tools.export_orbax", f"--checkpoint={trained.folder}/stage3", f"--out={small_disk}/out")
    stdout, stderr = process.communicate(timeout=200)
    assert (process.returncode, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert "could not write" in stderr and "free disk space" in stderr
    assert [entry.name for entry in small_disk.iterdir()] == ["ballast"]


def test_bad_usage_and_bad_input_are_one_line_and_exit_2(trained, tmp_path):
    (tmp_path / "file").touch()
    bad = {
        "needed: --checkpoint=WORKDIR --out=FOLDER": (f"--out={tmp_path}/out",),
        f"{tmp_path}/config.json is missing": (f"--checkpoint={tmp_path}", f"--out={tmp_path}/out"),
        "exists and is not an earlier export": (f"--checkpoint={trained.folder}/stage3", f"--out={trained.folder}"),
        "could not write": (f"--checkpoint={trained.folder}/stage3", f"--out={tmp_path}/file/out"),
    }
    check_refusals("tools.export_orbax", bad)
    assert {entry.name for entry in tmp_path.iterdir()} == {"file"}
