"""Commands that read a large language model need little more memory than its folder."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.checkpoints.initial import new_state
from favchat_jax.checkpoints.run import assemble
from favchat_jax.checkpoints.store import Checkpoints
from favchat_jax.checkpoints.weights_folder import save_weights
from favchat_jax.checkpoints.workdir import claim
from favchat_jax.data.sources import open_dataset
from favchat_jax.stages import group_of, split
from favchat_jax.training.optimizer import make_optimizer
from tests.conftest import DATA, start_module
from tests.full_size import make_folder, peak_memory
from tests.models.tiny_parts import MISTRAL_7B

LAYERS = 6
ROOM = 2.5  # GiB beside the folder


@pytest.fixture(scope="module")
def wide(small_world, tmp_path_factory):
    """A run whose language model has Mistral's width, six layers and random weights in bfloat16, and a clip."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(small_world.llm, folder / "mistral", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    make_folder(folder / "mistral", {**MISTRAL_7B, "num_hidden_layers": LAYERS})
    config = small_world.config("stage3", llm__path=str(folder / "mistral"), model__dtype="bfloat16")
    parts, rng = assemble(config), np.random.default_rng(0)
    shapes = {path: leaf.shape for path, leaf in parts.shapes.items() if group_of(path) != "llm"}
    weights = {path: 0.02 * rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    trainable, frozen = split(weights, config.variant, config.stage)
    claim(folder / "stage3", config, parts.fingerprint)
    save_weights(folder / "stage3" / "frozen", frozen, {"of": "frozen weights of a run"})
    trainable = {path: jnp.asarray(leaf) for path, leaf in trainable.items()}
    state = new_state(trainable, make_optimizer(config.optimizer, 10), 0)
    with Checkpoints(folder / "stage3", 1) as checkpoints:
        checkpoints.save(dataclasses.replace(state, step=jnp.int32(10)), {})
        checkpoints.wait()
    (folder / "clip.mp4").write_bytes(open_dataset(DATA, small_world.packed, "heldout")[0].clip)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", ["chat", "chat int8", "evaluate", "export_pytorch", "export_orbax"])
def test_the_peak_memory_is_that_of_the_language_models_folder_and_little_more(command, wide, small_world, tmp_path):
    model = sum(file.stat().st_size for file in (wide / "mistral").iterdir()) / 2**30
    run, out = f"--checkpoint={wide}/stage3", f"--out={tmp_path}/out"
    question = f"--video={wide}/clip.mp4", "--question=Which hair?", "--max_new_tokens=8"
    data = f"--config.data.packed={small_world.packed}", f"--config.data.name={DATA}"
    few = "--config.limit=1", "--config.batch=1", "--config.questions=1"
    process = start_module(
        *{
            "chat": ("favchat_jax.chat", run, *question),
            "chat int8": ("favchat_jax.chat", run, *question, "--storage=int8"),
            "evaluate": ("favchat_jax.evaluate", "--config=configs/eval/rendered.py", run, out, *data, *few),
            "export_pytorch": ("tools.export_pytorch", run, out),
            "export_orbax": ("tools.export_orbax", run, out),
        }[command]
    )
    peak = peak_memory(process)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    print(f"{command}: {peak:.2f} GiB; the folder has {model:.2f}")
    assert peak <= model + ROOM
