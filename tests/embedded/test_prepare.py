"""The inputs of a stage: the embedded preset trains earlier stages first, other presets report missing sources."""

import json
import logging
import re

import pytest

from favchat_jax import train as page
from favchat_jax.embedded import prepare as room
from favchat_jax.embedded.prepare import prepare, stage_config
from favchat_jax.errors import UserError
from favchat_jax.training.progress import Outcome


@pytest.fixture
def finished(monkeypatch, tmp_path):
    """A list of workdirs that count as finished, seen from an empty folder; parts are not made."""
    monkeypatch.chdir(tmp_path)
    folders: list[str] = []
    monkeypatch.setattr(room, "is_finished", lambda workdir: str(workdir) in folders)
    monkeypatch.setattr(room, "make_missing_parts", lambda config: None)
    return folders


def needed(stage: str, argument: str = "", **changes) -> list[str]:
    config = stage_config(stage, argument).updated({k.replace("__", "."): v for k, v in changes.items()})
    return [str(earlier.default_workdir) for earlier in prepare(config)]


def test_unfinished_earlier_stages_are_trained_first_in_order(finished):
    assert needed("stage1") == []
    assert needed("coldstart") == [f"runs/tiny-v1/{stage}" for stage in ("stage1", "stage2", "stage3")]
    finished.append("runs/tiny-v1/stage2")
    assert needed("coldstart") == ["runs/tiny-v1/stage3"]
    finished.append("runs/tiny-v1/stage3")
    assert needed("coldstart") == []


def test_v2_takes_the_q_formers_that_it_freezes_from_v1s_first_stage(finished):
    stages = [f"runs/tiny-v2-no_moe/{stage}" for stage in ("stage1", "stage2", "stage3", "coldstart")]
    assert needed("grpo", "variant=v2,ablation=no_moe") == ["runs/tiny-v1/stage1", *stages]
    assert needed("stage1", "variant=v2", init__qformer="mine") == [], "the user's own file is read at the start"
    finished.append("runs/tiny-v1/stage1")
    assert needed("stage1", "variant=v2") == []


def test_earlier_stages_get_the_parts_data_and_seed_of_the_last(finished):
    ours = {"init.umt": "mine", "llm.path": "ours", "data.packed": "there", "seed": 3, "prompt_tokenizer": "words"}
    last = stage_config("stage3", "ablation=no_moe").updated({**ours, "batch": 4, "init.videochat2": "all"})
    for earlier in prepare(last):
        assert (earlier.init.umt, earlier.init.videochat2, earlier.seed) == ("mine", "all", 3)
        assert (earlier.llm, earlier.data.packed, earlier.prompt_tokenizer) == (last.llm, "there", "words")
        assert earlier.ablation == "no_moe" and earlier.batch == stage_config(earlier.stage, "").batch


def test_parts_are_made_for_every_stage_that_is_trained(finished, monkeypatch):
    made = []
    monkeypatch.setattr(room, "make_missing_parts", lambda config: made.append(config.stage))
    needed("stage3")
    assert made == ["stage3", "stage2", "stage1"]


def test_another_starting_run_that_is_unfinished_is_refused_before_any_part_is_made(finished, monkeypatch):
    monkeypatch.setattr(room, "make_missing_parts", lambda config: pytest.fail("made"))
    says = "init.from_run=mine holds no finished stage2: .*configs/stage2.py:preset=tiny,variant=v1,ablation=none"
    with pytest.raises(UserError, match=says):
        needed("stage3", init__from_run="mine")


def test_a_starting_run_of_another_stage_is_refused_before_any_part_is_made(finished, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text(json.dumps(stage_config("stage1", "").to_json()))
    monkeypatch.setattr(room, "make_missing_parts", lambda config: pytest.fail("made"))
    for is_finished in (False, True):
        finished += ["mine"] * is_finished
        with pytest.raises(UserError, match="init.from_run=mine is stage1, but stage3 starts from stage2"):
            needed("stage3", init__from_run="mine")


def test_other_presets_refuse_missing_sources_by_name(finished):
    sources = {"llm__path": "x", "data__root": "y"}
    with pytest.raises(UserError, match="llm.path is not set: .* --config.llm.path=DIR"):
        needed("stage1", "preset=base")
    with pytest.raises(UserError, match="init.facexformer is not set: .*--kind=facexformer"):
        needed("stage1", "preset=base", **sources, init__videochat2="z")
    assert needed("stage1", "preset=base,ablation=no_face", **sources, init__umt="z") == []
    with pytest.raises(UserError, match=re.escape("init.from_run=runs/base-v2/stage1 holds no finished stage1")):
        needed("stage2", "preset=base,variant=v2", **sources)
    finished.append("runs/base-v2/stage1")
    assert needed("stage2", "preset=base,variant=v2", **sources) == []


def test_training_runs_the_missing_stages_one_after_another(finished, monkeypatch, caplog):
    def train(config, workdir, *_):
        finished.append(str(workdir))
        return Outcome(step=1, steps=1, resumed_at=0)

    monkeypatch.setattr(page, "train", train)
    monkeypatch.setattr(page.de_grpo, "train", train)
    config = stage_config("grpo", "")
    caplog.set_level(logging.INFO, "favchat_jax")
    assert page.train_stage(config, config.default_workdir).finished
    stages = ("stage1", "stage2", "stage3", "coldstart", "grpo")
    assert finished == [f"runs/tiny-v1/{stage}" for stage in stages]
    assert "grpo of v1 needs runs/tiny-v1/coldstart, which is trained first" in caplog.text


def test_later_stages_do_not_start_after_a_stopped_stage(finished, monkeypatch):
    started = []

    def stop(config, workdir, *_):
        started.append(config.stage)
        return Outcome(step=1, steps=2, resumed_at=0)

    monkeypatch.setattr(page, "train", stop)
    config = stage_config("stage3", "")
    assert not page.train_stage(config, config.default_workdir).finished and started == ["stage1"]


def test_an_unknown_argument_of_a_config_is_a_user_error():
    with pytest.raises(UserError, match="preset=huge is unknown: choose one of tiny"):
        stage_config("stage3", "preset=huge")
