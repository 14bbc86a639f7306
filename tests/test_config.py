import json
import re

import pytest

from configs import common, grpo, stage1, stage3
from favchat_jax.config import Config, MeshConfig, OptimizerConfig
from favchat_jax.errors import UserError

PAPER = ("preset=paper", "preset=paper,variant=v2", "preset=base", "", "variant=v2,ablation=no_moe")


def config_of(module, argument: str = "", **changes) -> Config:
    """The config of a file; `changes` by path, dots written as double underscores."""
    config = Config.from_ml_collections(module.get_config(argument))
    return config.updated({path.replace("__", "."): value for path, value in changes.items()})


@pytest.mark.parametrize("argument", PAPER)
@pytest.mark.parametrize("module", [stage1, stage3, grpo])
def test_every_config_file_gives_a_config_that_its_json_gives_again(module, argument):
    config = config_of(module, argument)
    written = json.loads(json.dumps(config.to_json()))
    assert Config.from_json(written) == config and Config.from_json(written).to_json() == written
    assert hash(config) == hash(Config.from_json(written))


def test_the_json_has_the_fields_of_the_file_and_no_section_of_other_stages():
    written, file = config_of(stage3).to_json(), json.loads(stage3.get_config().to_json())
    file["init"]["from_run"] = "runs/tiny-v1/stage2"
    assert written == file and "rl" not in written
    assert "pretrain" not in config_of(stage3, "preset=paper").to_json()


def test_the_json_of_another_version_loads_with_defaults_and_without_its_own_fields():
    written = config_of(stage3).to_json()
    del written["llm"]["storage"], written["data"]["keep_features"], written["mesh"]
    read = Config.from_json({**written, "shoes": 1, "model": {**written["model"], "hats": 2}})
    assert read == config_of(stage3)
    del written["model"]["qformer"]["width"]
    with pytest.raises(UserError, match="^model.qformer.width is missing in the config"):
        Config.from_json(written)


def test_a_field_that_nothing_reads_is_refused_in_a_config_file():
    file = stage3.get_config()
    file.model.qformer.witdh = 3
    with pytest.raises(UserError, match="^model.qformer.witdh is not a field of the config"):
        Config.from_ml_collections(file)


def test_a_file_of_an_unknown_stage_is_refused():
    file = stage3.get_config()
    file.stage = "stage9"
    with pytest.raises(UserError, match="^stage=stage9 is unknown: choose one of stage1, stage2"):
        Config.from_ml_collections(file)


def test_a_stage_starts_from_the_one_before_at_its_default_place_unless_another_is_named():
    assert config_of(stage1).init.from_run == ""
    assert config_of(stage3, "variant=v2,ablation=no_moe").init.from_run == "runs/tiny-v2-no_moe/stage2"
    file = stage3.get_config()
    file.init.from_run = "mine"
    assert Config.from_ml_collections(file).init.from_run == "mine"
    file.init.from_run = ""
    assert Config.from_ml_collections(file).init.from_run == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "v9"}, "variant=v9 is unknown: choose one of v1, v2"),
        ({"ablation": "no_hair"}, "ablation=no_hair is unknown: choose one of none, no_face"),
        ({"stage": "stage9"}, "stage=stage9 is unknown: choose one of stage1, stage2, stage3"),
        ({"batch": 0}, "batch=0 is too small: give at least 1"),
        ({"batch": True}, "batch=True is not a whole number"),
        ({"batch": 1.5}, "batch=1.5 is not a whole number"),
        ({"accumulate": 0}, "accumulate=0 is too small"),
        ({"model__frames": 0}, "model.frames=0 is too small: give at least 1"),
        ({"model__image_size": 0}, "model.image_size=0 is too small"),
        ({"model__umt__width": 0}, "model.umt.width=0 is too small"),
        ({"model__umt": 3}, "model.umt=3 is not a section of fields"),
        ({"pretrain": 5}, "pretrain=5 is not a section of fields"),
        ({"model__umt__heads": 7}, "model.umt.heads=7 does not divide umt.width="),
        ({"model__qformer__heads": 7}, "model.qformer.heads=7 does not divide qformer.width="),
        ({"model__fusion__heads": 7}, "model.fusion.heads=7 does not divide umt.width="),
        ({"model__facexformer__heads": (1,)}, "give one for each stage"),
        ({"model__facexformer__heads": (1, 2, 4, 7)}, "7 does not divide"),
        ({"ablation": "no_face", "model__no_face_taps": (1, 99)}, "model.no_face_taps=(1, 99): give blocks from 1 to"),
        ({"model__lora__targets": (1,)}, "model.lora.targets=(1,): give text"),
        ({"data__prompt_length": 0}, "data.prompt_length=0 is too small"),
        ({"data__flip": "perhaps"}, "data.flip='perhaps' is not True or False"),
        ({"llm__path": None}, "llm.path=None is not text"),
        ({"seed": -1}, "seed=-1 is too small: give at least 0"),
        ({"steps": -3}, "steps=-3 is too small"),
        ({"data__workers": -1}, "data.workers=-1 is too small"),
        ({"model__dtype": "float15"}, "model.dtype=float15 is unknown: choose one of float32, bfloat16"),
        ({"model__remat": "all"}, "model.remat=all is unknown: choose one of nothing, block, products"),
        ({"model__qformer__dropout": 1.0}, "model.qformer.dropout=1.0 is a share: give 0 to less than 1"),
        ({"llm__storage": "int3"}, "llm.storage=int3 is unknown: choose one of full, int8, int4"),
        ({"data__sampling": "all"}, "data.sampling=all is unknown: choose one of rand, middle"),
        ({"data__buckets": ()}, "data.buckets=(): give whole numbers above 0"),
        ({"data__buckets": (128, 48)}, "data.buckets=(128, 48): give whole numbers above 0 in ascending order"),
        ({"data__buckets": (0.5, 48)}, "data.buckets=(0.5, 48): give whole numbers"),
        ({"steps": 0, "epochs": float("inf")}, "steps=0 and epochs=inf"),
        ({"steps": 0, "epochs": 0.0}, "steps=0 and epochs=0.0: one of them must be a number above 0"),
        ({"optimizer__name": "sgd"}, "optimizer.name=sgd is unknown: choose one of adamw, muon"),
        ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate=0.0: give a number above 0"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
        ({"optimizer__weight_decay": -1.0}, "optimizer.weight_decay=-1.0: give a number of at least 0"),
        ({"optimizer__warmup": 1.5}, "optimizer.warmup=1.5 is a share: give a number from 0 to 1"),
        ({"data__questions": -1}, "data.questions=-1 is too small"),
        ({"log_every": 0}, "log_every=0 is too small"),
        ({"mesh__data": 0}, "mesh.data=0: give a number above 0, or -1"),
        ({"mesh__data": -1}, "mesh.data=-1, mesh.fsdp=-1, mesh.tensor=1: give -1 only once"),
        ({"variant": "v2", "model__qformer__prompt": False}, "model.qformer.prompt=False leaves v2 without"),
        ({"data__keep_features": True}, "data.keep_features=True needs the same frames of a clip in every epoch"),
        ({"data__keep_features": True, "data__sampling": "middle", "data__flip": True}, "data.flip=False"),
        ({"data__keep_features": True, "data__sampling": "middle"}, "is for stage3 and coldstart, not for stage1"),
        ({"init__from_run": "mine"}, "init.from_run=mine: stage1 is the first stage, so leave it out"),
        ({"stage": "grpo"}, "stage=grpo needs the section rl"),
        ({"hair": 3}, "unknown config option: hair"),
        ({"model__umt__hair": 3}, "unknown config option: model.umt.hair"),
    ],
)
def test_a_value_that_suits_no_run_is_refused_with_its_field(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_of(stage1, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl__group": 1}, "rl.group=1 is too small: a group of one has nothing to compare"),
        ({"rl__temperature": 0.0}, "rl.temperature=0.0 draws equal responses: give a number above 0"),
        ({"rl__top_p": 0.0}, "rl.top_p=0.0 is a probability"),
        ({"rl__utility": "best"}, "rl.utility=best is unknown: choose one of scale_free, published"),
        ({"rl__updates": 0}, "rl.updates=0 is too small: give at least 1"),
        ({"rl__measure_every": 0}, "rl.measure_every=0 is too small: give at least 1"),
        ({"rl__max_new_tokens": 0}, "rl.max_new_tokens=0 is too small: give at least 1"),
        ({"rl__pool__smoothing": 7.0}, "rl.pool.smoothing=7.0 is a share"),
        ({"rl__rewards": {}}, "rl.rewards is empty: give at least one"),
        ({"rl__rewards__form__weight": float("nan")}, "rl.rewards.form.weight=nan is not a weight"),
        ({"rl__rewards": {"step": {"path": "x:y", "weight": 1.0}}}, "rl.rewards.step: .* rename"),
        ({"llm__storage": "int8"}, "llm.storage=int8 has no full kernels"),
        ({"steps": 0}, "steps=0: stage=grpo has no epochs; give at least 1"),
        ({"data__keep_features": True, "data__sampling": "middle"}, "not for grpo"),
    ],
)
def test_a_value_that_suits_no_reinforcement_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config_of(grpo, **changes)


def test_a_section_that_is_made_alone_is_checked_too():
    with pytest.raises(UserError, match="^data=0: give"):
        MeshConfig(data=0)
    with pytest.raises(UserError, match="^learning_rate=-1.0: give"):
        OptimizerConfig.read({**stage1.get_config().optimizer.to_dict(), "learning_rate": -1.0})


def test_an_updated_config_is_another_one():
    config = config_of(stage1)
    assert config.updated({"data.flip": True}).data.flip and not config.data.flip
    with pytest.raises(AttributeError):
        config.batch = 3


@pytest.mark.parametrize("preset", common.PRESETS)
def test_the_rank_of_the_adapters_is_0_before_they_start(preset):
    assert config_of(stage1, f"preset={preset}").lora_rank == 0
    assert config_of(stage3, f"preset={preset}").lora_rank == config_of(stage3, f"preset={preset}").model.lora.rank > 0


def test_the_default_workdir_names_preset_variant_ablation_and_stage():
    assert str(config_of(stage3).default_workdir) == "runs/tiny-v1/stage3"
    assert str(config_of(grpo, "preset=paper,variant=v2,ablation=no_face").default_workdir) == (
        "runs/paper-v2-no_face/grpo"
    )


def test_the_tilde_of_a_path_is_the_home_of_the_user_who_set_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    file = stage3.get_config("preset=paper")
    file.llm.path, file.data.root, file.init.from_run = "~/mistral", "~", "runs/~/x"
    config = Config.from_ml_collections(file).updated({"prompt_tokenizer": "~/bert"})
    monkeypatch.setenv("HOME", "/home/bob")
    config = Config.from_json(config.to_json())
    assert config.places() == {
        "llm.path": "/home/ada/mistral",
        "prompt_tokenizer": "/home/ada/bert",
        "data.root": "/home/ada",
        "data.packed": "runs/data",
        "init.from_run": "runs/~/x",
    }
    with pytest.raises(UserError, match="^llm.path=.*: a path has no zero character"):
        config.updated({"llm.path": "a\0b"})
