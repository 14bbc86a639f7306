"""Draws a preset's weights and inputs on the device, so that a check needs neither published weights nor data."""

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from favchat_jax.checkpoints.initial import new_state
from favchat_jax.checkpoints.store import TrainState
from favchat_jax.config import Config
from favchat_jax.data.conversation import VISUAL_PLACEHOLDER
from favchat_jax.data.loader import INSTRUCTIONS
from favchat_jax.embedded.language_model import write_sizes
from favchat_jax.embedded.pretrain import LanguageModelSizes
from favchat_jax.planning import plan
from favchat_jax.training.optimizer import make_optimizer
from tools.beside_pytorch.material import frames


def settings(preset: str, stage: str, folder: Path) -> Config:
    """Returns a stage's config, without dropout so that it computes what PyTorch's side does.

    Args:
        preset: name of the sizes. The paper's language model has the published ones, others have those of the config.
        stage: name of the stage.
        folder: holds the sizes of a drawn language model; written if it is missing.
    """
    config = Config.from_ml_collections(importlib.import_module(f"configs.{stage}").get_config(f"preset={preset}"))
    changes: dict[str, Any] = {"init": {}, "model.lora.dropout": 0.0, "model.qformer.dropout": 0.0}
    if preset != "paper":
        llm = folder / preset
        if not llm.exists():
            llm.mkdir(parents=True)
            write_sizes(llm, LanguageModelSizes.read(config.pretrain["llm"]), INSTRUCTIONS)
        changes["llm.path"] = str(llm)
    return config.updated(changes)


def draw(shapes: Any) -> Any:
    """Draws a tree of arrays on the device, placed as the shapes say; see `numbers`."""
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(lambda: numbers(shapes), out_shardings=places)()


def state(config: Config, arguments: plan.Arguments) -> TrainState:
    """Draws the state before the first step of a stage's training."""
    optimizer = make_optimizer(config.optimizer, plan.STEPS)
    places = jax.tree.map(lambda leaf: leaf.sharding, arguments.state)
    begin = jax.jit(lambda: new_state(numbers(arguments.state.trainable), optimizer, config.seed), out_shardings=places)
    return begin()


def numbers(shapes: Any) -> Any:
    """Returns a tree of arrays within a program: matrices with unit gain, scales of 1 and biases of 0.

    Each number is a hash of its place, which needs no memory beside the result, as a random generator's bits would.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def one(number: int, path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if len(leaf.shape) < 2 or "scale" in name or "bias" in name:
            return jnp.full(leaf.shape, 1 if "scale" in name else 0, leaf.dtype)
        place = jnp.full(leaf.shape, 7919 * number, jnp.uint32)
        for axis in range(len(leaf.shape)):
            place = (place ^ (place >> 16)) * np.uint32(2246822519)
            place = place + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = (place ^ (place >> 15)) * np.uint32(2654435761)
        place = (place ^ (place >> 13)) * np.uint32(3266489917)
        uniform = (place ^ (place >> 16)).astype(jnp.float32) * np.float32(2**-31) - 1
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return (127 * uniform).astype(leaf.dtype)
        inputs = leaf.shape[-1] if "embedding" in name else leaf.shape[-2]
        return (uniform * np.float32((3 / inputs) ** 0.5)).astype(leaf.dtype)

    return tree.unflatten([one(number, path, leaf) for number, (path, leaf) in enumerate(leaves)])


def batch(config: Config, clips: int) -> dict[str, np.ndarray]:
    """Returns a training batch in the longest bucket; the answer fills the second half of each text."""
    _, questions, length = shape = plan.batch_shapes(config, clips)["tokens"].shape
    answer = np.arange(length) >= (length + _visual_tokens(config)) // 2
    texts = _texts(config, clips, questions, length)
    return {"frames": frames(config, clips), **texts, "loss_mask": np.broadcast_to(answer, shape)}


def question(config: Config, clips: int, length: int) -> dict[str, np.ndarray]:
    """Returns one prompt of `length` tokens about each clip, as the decoder reads it."""
    return {**_texts(config, clips, 1, length), "last": np.full(clips, length - 1, np.int32)}


def _texts(config: Config, clips: int, questions: int, length: int) -> dict[str, np.ndarray]:
    """Returns random texts with visual tokens, and random questions for the Q-Formers."""
    rng = np.random.default_rng(0)
    words = min(plan.language_model(config).vocab_size, config.model.qformer.vocabulary)
    tokens = rng.integers(0, words, (clips, questions, length)).astype(np.int32)
    tokens[..., 2 : 2 + _visual_tokens(config)] = VISUAL_PLACEHOLDER
    asked = clips, questions, config.data.prompt_length
    prompt = rng.integers(0, words, asked).astype(np.int32)
    return {"tokens": tokens, "prompt": prompt, "prompt_mask": np.ones(asked, bool)}


def _visual_tokens(config: Config) -> int:
    return config.model.qformer.queries + config.model.qformer.extra_queries
