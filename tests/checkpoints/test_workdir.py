import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from favchat_jax.checkpoints.mistral_folder import fingerprint
from favchat_jax.checkpoints.run import open_run
from favchat_jax.checkpoints.weights_folder import save_weights
from favchat_jax.checkpoints.workdir import check_stage_before, claim, occupied, stored_config
from favchat_jax.errors import UserError


@pytest.fixture
def started(small_world, tmp_path):
    """A workdir of stage 1 with a saved step."""
    claim(tmp_path, small_world.config("stage1"), "a model")
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    return tmp_path


def test_a_workdir_without_a_saved_step_takes_another_config(small_world, tmp_path):
    claim(tmp_path, small_world.config("stage1"), "a model")
    claim(tmp_path, small_world.config("stage1", batch=8), "a model")


def test_a_run_goes_on_with_other_fields_only_if_they_leave_its_result_alone(small_world, started):
    changes = {"mesh__data": 2, "mesh__fsdp": 4, "model__remat": "products", "accumulate": 2, "loss_chunk": 16}
    claim(started, small_world.config("stage1", **changes), "a model")
    with pytest.raises(UserError, match=re.escape("these fields differ: batch (4 there, 8 here). ")):
        claim(started, small_world.config("stage1", batch=8, **changes), "a model")


def test_a_workdir_of_an_older_version_goes_on_with_the_defaults_of_the_fields_it_lacks(small_world, started):
    written = json.loads((started / "config.json").read_text())
    del written["llm"]["storage"], written["data"]["keep_features"]
    (started / "config.json").write_text(json.dumps({**written, "of_yore": 1}))
    claim(started, small_world.config("stage1"), "a model")
    with pytest.raises(UserError, match=re.escape("llm.storage (full there, int8 here)")):
        claim(started, small_world.config("stage1", llm__storage="int8"), "a model")


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("batch", "many"), ("model", 3)])
def test_a_config_that_no_run_can_have_made_is_damaged(field, value, started):
    written = json.loads((started / "config.json").read_text())
    (started / "config.json").write_text(json.dumps({**written, field: value}))
    with pytest.raises(UserError, match=f"config.json is damaged \\({field}={value!r}|{field}={value}.*copy the whole"):
        stored_config(started)


@pytest.fixture
def project(small_world, tmp_path, monkeypatch):
    """A folder with a language model and a run that names it by a relative path, as seen from that folder."""
    folder = tmp_path / "project"
    shutil.copytree(small_world.llm, folder / "parts" / "mistral")
    monkeypatch.chdir(folder)
    start(small_world, Path("runs/one"), "parts/mistral")
    return folder


def start(small_world, workdir: Path, llm: str) -> None:
    claim(workdir, config_with(small_world, llm), fingerprint(llm))
    (workdir / "checkpoints" / "2").mkdir(parents=True)


def config_with(small_world, llm: str):
    return small_world.config("stage1", llm__path=llm, prompt_tokenizer=llm)


def named(workdir: Path) -> set[str]:
    config = stored_config(workdir)
    return {config.llm.path, config.prompt_tokenizer}


def test_a_run_with_relative_paths_is_opened_from_any_working_directory(project, small_world, tmp_path, monkeypatch):
    assert named(project / "runs" / "one") == {"parts/mistral"}
    start(small_world, tmp_path / "scratch", "parts/mistral")  # not beside its parts
    monkeypatch.chdir("/")
    for workdir in (project / "runs" / "one", tmp_path / "scratch"):
        assert named(workdir) == {str(project / "parts" / "mistral")}
        assert open_run(workdir).fingerprint == fingerprint(small_world.llm)


@pytest.mark.parametrize("llm", ["parts/mistral", "{}/parts/mistral"], ids=["relative", "absolute"])
def test_a_run_that_moved_together_with_its_parts_is_opened(llm, project, small_world, tmp_path, monkeypatch):
    start(small_world, Path("runs/two"), llm.format(project))
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert named(moved / "runs" / "two") == {str(moved / "parts" / "mistral")}
    (moved / "parts" / "mistral").rename(moved / "mistral")  # now by the end of the path alone
    assert named(moved / "runs" / "two") == {str(moved / "mistral")}


def test_a_run_of_an_older_version_finds_its_parts_beside_the_workdir(project, monkeypatch):
    llm = project / "runs" / "one" / "llm.json"
    llm.write_text(json.dumps({"path": "parts/mistral", "fingerprint": json.loads(llm.read_text())["fingerprint"]}))
    monkeypatch.chdir("/")
    assert named(project / "runs" / "one") == {str(project / "parts" / "mistral")}


def test_of_several_language_models_the_one_of_the_run_is_taken(project, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    changed = project / "parts" / "mistral" / "config.json"
    changed.write_text(changed.read_text() + "\n")
    monkeypatch.chdir("/")
    assert stored_config(copy / "runs" / "one").llm.path == str(copy / "parts" / "mistral")
    shutil.rmtree(copy / "parts")
    with pytest.raises(UserError, match=f"{project}/parts/mistral is not the language model that .*/one was trained"):
        open_run(copy / "runs" / "one")


def test_a_run_without_its_parts_says_what_it_needs(project):
    shutil.rmtree(project / "parts")
    with pytest.raises(UserError, match="^runs/one needs parts/mistral, which is neither there nor beside it: put"):
        open_run("runs/one")


def test_a_run_goes_on_from_another_folder_with_another_name_of_the_same_place(project, small_world, monkeypatch):
    monkeypatch.chdir("/")
    workdir, llm = project / "runs" / "one", str(project / "parts" / "mistral")
    claim(workdir, config_with(small_world, llm), fingerprint(llm))
    with pytest.raises(UserError, match=r"fields differ: llm.path \(parts/mistral there, /.* here\), prompt_token"):
        claim(workdir, config_with(small_world, small_world.llm), fingerprint(llm))


def test_a_second_process_is_kept_out_of_a_workdir_before_it_writes_anything(tmp_path):
    workdir = tmp_path / "run"
    with occupied(workdir):
        with pytest.raises(UserError, match="another process is training in .*run: wait for it"), occupied(workdir):
            pytest.fail("both are in")
        assert workdir.is_dir() and not list(workdir.iterdir())
    with occupied(workdir):
        pass


def test_a_refused_run_leaves_no_folder_behind_and_one_with_steps_stays(tmp_path):
    for steps in ("", "{}\n"):
        with pytest.raises(UserError, match="no"), occupied(tmp_path / "runs" / "new" / "stage1"):
            (tmp_path / "runs" / "new" / "stage1" / "metrics.jsonl").write_text(steps)
            raise UserError("no")
        assert (tmp_path / "runs").exists() == bool(steps)


@pytest.mark.parametrize(("field", "other"), [("variant", "v2"), ("preset", "paper"), ("ablation", "no_moe")])
def test_a_stage_before_of_another_variant_preset_or_ablation_is_a_users_error(
    field, other, small_world, trained, tmp_path
):
    copy = trained.copy("stage1", tmp_path)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, field: other}))
    with pytest.raises(UserError, match=f"init.from_run=.* is of {field}={other}, this run of {field}="):
        check_stage_before(small_world.config("stage2", init__from_run=str(copy)))


def test_a_stage_out_of_order_is_a_users_error(small_world, trained):
    with pytest.raises(UserError, match="is stage1, but stage3 starts from stage2"):
        check_stage_before(small_world.config("stage3", init__from_run=str(trained.folder / "stage1")))


def test_a_weights_folder_is_no_stage_before(small_world, tmp_path):
    save_weights(tmp_path / "umt", {"a": np.ones(3, np.float32)}, {"kind": "umt"})
    with pytest.raises(UserError, match=r"is a weights folder \(umt\), not a run"):
        check_stage_before(small_world.config("stage2", init__from_run=str(tmp_path / "umt")))
