import re

import pytest

from favchat_jax.errors import UserError
from favchat_jax.training import loop
from favchat_jax.training.checks import claim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "v9"}, "variant=v9 is unknown: choose one of v1"),
        ({"ablation": "no_hair"}, "ablation=no_hair is unknown: choose one of none, no_face"),
        ({"stage": "stage9"}, "stage=stage9 is unknown: choose one of stage1, stage2, stage3"),
        ({"batch": 0}, "batch=0 is too small"),
        ({"model__frames": 0}, "model.frames=0 is too small: give at least 1"),
        ({"model__image_size": 0}, "model.image_size=0 is too small"),
        ({"data__prompt_length": 0}, "data.prompt_length=0 is too small"),
        ({"seed": -1}, "seed=-1 is too small: give at least 0"),
        ({"steps": -3}, "steps=-3 is too small"),
        ({"data__workers": -1}, "data.workers=-1 is too small"),
        ({"model__dtype": "float15"}, "model.dtype=float15 is unknown: choose one of float32, bfloat16"),
        ({"model__remat": "all"}, "model.remat=all is unknown: choose one of nothing, block, products"),
        ({"data__sampling": "all"}, "data.sampling=all is unknown: choose one of rand, middle"),
        ({"data__buckets": ()}, "data.buckets=(): give whole numbers"),
        ({"data__buckets": (128, 48)}, "data.buckets=(128, 48): give whole numbers"),
        ({"data__buckets": (0.5, 48)}, "data.buckets=(0.5, 48): give whole numbers"),
        ({"steps": 0, "epochs": float("inf")}, "steps=0 and epochs=inf"),
        ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate=0.0: give a number above 0"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
        ({"data__questions": -1}, "data.questions=-1 is too small"),
        ({"log_every": 0}, "log_every=0 is too small"),
        ({"steps": 0, "epochs": 0.0}, "steps=0 and epochs=0.0: one of them must be a number above 0"),
        ({"accumulate": 3}, "batch=4 does not divide over mesh.data=1 x mesh.fsdp=1 devices x accumulate=3 parts"),
    ],
)
def test_a_value_that_suits_no_run_is_a_users_error_that_names_it(changes, message, small_world, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        loop.train(small_world.config("stage1", **changes), tmp_path)


def test_a_workdir_goes_on_with_other_fields_that_say_where_and_how_alone(small_world, tmp_path):
    (tmp_path / "config.json").write_text(small_world.config("stage1").to_json())
    claim(tmp_path, small_world.config("stage1", batch=8))  # nothing was saved yet
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    changes = {"mesh__data": 2, "mesh__fsdp": 4, "model__remat": "products", "accumulate": 2, "loss_chunk": 16}
    claim(tmp_path, small_world.config("stage1", **changes))
    with pytest.raises(UserError, match=re.escape("these fields differ: batch (4 there, 8 here). ")):
        claim(tmp_path, small_world.config("stage1", batch=8, **changes))
