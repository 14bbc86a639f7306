import json
import re

import pytest

from favchat_jax.checkpoints.workdir import claim, stored_config
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
