"""Table 6 in miniature: every arm is trained once, with equal configs; invalid flags are refused."""

import json
import re
from pathlib import Path

import pytest

from configs import ablations as ablation_configs
from configs import stage1, stage3
from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.training.progress import Outcome
from tests.conftest import SHRUNKEN, STAGES, start_module
from tools import ablate


@pytest.mark.parametrize("name", ["no_face", "no_granularity", "no_moe"])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_an_ablations_config_equals_the_stages_without_one_part(name, variant):
    ours = ablation_configs.get_config(name, f"variant={variant},stage=stage1")
    theirs = stage1.get_config(f"variant={variant}")
    assert ours.ablation == name and ours.to_dict() == {**theirs.to_dict(), "ablation": name}
    later = ablation_configs.get_config(name, f"variant={variant}")
    assert later.to_dict() == stage3.get_config(f"variant={variant},ablation={name}").to_dict()
    assert Config.from_ml_collections(later).init.from_run == f"runs/tiny-{variant}-{name}/stage2"


def test_an_ablations_config_refuses_another_ablation_and_unknown_stages():
    with pytest.raises(ValueError, match="ablation= is no_moe here"):
        ablation_configs.get_config("no_moe", "ablation=none")
    with pytest.raises(ValueError, match="stage=stage9 is unknown: choose one of stage1"):
        ablation_configs.get_config("no_moe", "stage=stage9")


def test_arms_of_a_seed_differ_only_in_the_ablation_and_start_from_their_own_stages():
    for stage in STAGES:
        full, other = (ablate.arm_config(stage, "v1", name, 2, {"batch": 8}).to_json() for name in ("none", "no_moe"))
        before, mine = full["init"].pop("from_run"), other["init"].pop("from_run")
        assert full.pop("ablation") == "none" and other.pop("ablation") == "no_moe" and full == other
        if stage != "stage1":
            assert before.startswith("runs/seed2/tiny-v1/") and mine.startswith("runs/seed2/tiny-v1-no_moe/")


def test_seed_0_uses_the_default_workdirs_and_other_seeds_their_own_folders():
    workdirs = [str(ablate.arm_workdir(ablate.arm_config("stage3", "v2", "no_face", seed, {}))) for seed in (0, 1)]
    assert workdirs == ["runs/tiny-v2-no_face/stage3", "runs/seed1/tiny-v2-no_face/stage3"]
    assert ablate.arm_config("stage1", "v2", "none", 1, {}).init.qformer == "runs/seed1/tiny-v1/stage1"


def test_an_arm_of_v2_first_trains_stage_1_of_v1_and_nothing_twice(monkeypatch):
    made = []

    def train_stage(config, workdir):
        made.append(str(workdir))
        return Outcome(step=1, steps=1, resumed_at=0)

    monkeypatch.setattr(ablate, "train_stage", train_stage)
    monkeypatch.setattr(ablate, "is_finished", lambda workdir: str(workdir) in made)
    monkeypatch.setattr(ablate, "check_config", lambda workdir, config: None)
    for _ in range(2):
        ablate.train_arm("v2", "no_moe", 0, {})
    assert made == ["runs/tiny-v1/stage1", *(f"runs/tiny-v2-no_moe/{stage}" for stage in STAGES)]


def test_a_stopped_arm_ends_the_command(monkeypatch):
    monkeypatch.setattr(ablate, "is_finished", lambda workdir: False)
    monkeypatch.setattr(ablate, "train_stage", lambda config, workdir: Outcome(step=1, steps=2, resumed_at=0))
    with pytest.raises(SystemExit) as ended:
        ablate.train_arm("v1", "none", 0, {})
    assert ended.value.code == 0


def test_changes_are_parsed_as_python_values_or_as_text():
    items = ["steps=20", "data.buckets=(160,)", "model.fusion.residual=False", "llm.path=a/b=c", "init.umt="]
    assert ablate.parse_changes(items) == {
        "steps": 20,
        "data.buckets": (160,),
        "model.fusion.residual": False,
        "llm.path": "a/b=c",
        "init.umt": "",
    }


@pytest.mark.parametrize(("item", "says"), [("stepz=2", "stepz"), ("steps=many", "steps"), ("steps", "FIELD=VALUE")])
def test_an_invalid_change_is_refused(item, says):
    with pytest.raises(UserError, match=f"--set.*{says}"):
        ablate.arm_config("stage1", "v1", "none", 0, ablate.parse_changes([item]))


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ({"preset": "paper"}, "configs/ablations/NAME.py:preset=paper"),
        ({"ablations": ["none", "no_hair"]}, "--ablations=none,no_hair: choose from none, no_face"),
        ({"ablations": []}, "--ablations=: choose from"),
        ({"seeds": ["one"]}, "--seeds=one: give whole numbers"),
        ({"seeds": ["-1"]}, "--seeds=-1: give whole numbers"),
    ],
)
def test_arms_that_do_not_exist_are_refused(mistake, says):
    with pytest.raises(UserError, match=re.escape(says)):
        ablate.arms(**{"preset": "tiny", "ablations": ["none"], "seeds": ["0"], **mistake})


def test_each_ablation_is_trained_with_every_seed():
    assert ablate.arms("tiny", ["none", "no_moe"], ["0", "2"]) == [
        ("none", 0),
        ("none", 2),
        ("no_moe", 0),
        ("no_moe", 2),
    ]


def small(small_world, **more):
    """Returns changes that make an arm small, without those that decide its workdir."""
    values = {**SHRUNKEN, "steps": 2, "data.packed": small_world.packed, "llm.path": small_world.llm, **more}
    return {field: value for field, value in values.items() if field not in ("init.from_run", "init.qformer")}


@pytest.mark.slow
def test_an_arm_is_trained_and_evaluated_once_and_refused_with_another_config(small_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = small(small_world)
    workdir = ablate.train_arm("v1", "no_moe", 1, changes)
    assert sorted(map(str, Path("runs").glob("**/checkpoints/2"))) == [
        f"runs/seed1/tiny-v1-no_moe/{stage}/checkpoints/2" for stage in STAGES
    ]
    result = ablate.evaluate_arm(workdir)
    assert result["benchmark"] == "rendered" and result["provenance"]["checkpoint"]["ablation"] == "no_moe"
    monkeypatch.setattr(ablate, "train_stage", None)
    monkeypatch.setattr(ablate, "evaluate", None)
    assert ablate.train_arm("v1", "no_moe", 1, changes) == workdir and ablate.evaluate_arm(workdir) == result
    with pytest.raises(UserError, match="batch .4 there, 2 here."):
        ablate.train_arm("v1", "no_moe", 1, {**changes, "batch": 2})


@pytest.mark.slow
def test_two_arms_of_two_seeds_are_trained_and_compared_and_not_trained_again(small_world, tmp_path):
    command = ["--seeds=0,1", "--ablations=none,no_moe", "--json=table.json"]
    command += [f"--set={field}={value}" for field, value in small(small_world).items()]

    def run():
        process = start_module("tools.ablate", *command, cwd=tmp_path)
        stdout, stderr = process.communicate(timeout=280)
        assert process.returncode == 0, stderr
        return stdout, stderr

    first, said = run()
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["ablation"] for row in table["rows"]] == ["none", "no_moe"]
    assert table["steps"] == {stage: 2 for stage in STAGES} and table["seeds"] == [0, 1]
    assert all(len(row["figures"]["all"]["seeds"]) == 2 for row in table["rows"])
    assert "order in the paper: FaVChat > w/o MoE" in first and said.count("finished at step 2") == 12
    second, said = run()
    assert second == first and "finished at step" not in said and "answering" not in said
