"""From a config or a workdir to a model, its tokenizers and its trained weights."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from transformers import PreTrainedTokenizerBase

from favchat_jax.checkpoints import mistral_folder
from favchat_jax.checkpoints.store import load_run_weights
from favchat_jax.checkpoints.weights_folder import RESTORE, is_weights_folder
from favchat_jax.checkpoints.workdir import check_llm, stored_config
from favchat_jax.config import Config, ModelConfig
from favchat_jax.data.conversation import load_tokenizer
from favchat_jax.errors import UserError
from favchat_jax.models import favchat

Weights = dict[str, Any]
Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A model and the tokenizers that its inputs need: the language model's, and the Q-Formers' for the prompt."""

    model: favchat.FaVChat
    tokenizer: PreTrainedTokenizerBase
    prompt_tokenizer: PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or running stage, ready to answer: what `--checkpoint=` names."""

    config: Config
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    prompt_tokenizer: PreTrainedTokenizerBase


def assemble(config: Config) -> Assembly:
    """The model and tokenizers of a config; the language model's folder has its sizes and its tokenizer."""
    llm = mistral_folder.read_config(config.llm.path)
    model = favchat.build(
        config.model,
        llm,
        variant=config.variant,
        ablation=config.ablation,
        lora_rank=config.lora_rank,
        storage=config.llm.storage,
    )
    tokenizer = load_tokenizer(config.llm.path)
    prompt_tokenizer = load_tokenizer(config.prompt_tokenizer) if config.prompt_tokenizer else tokenizer
    if len(prompt_tokenizer) > config.model.qformer.vocabulary:
        raise UserError(
            f"prompt_tokenizer has {len(prompt_tokenizer)} tokens but model.qformer.vocabulary is "
            f"{config.model.qformer.vocabulary}: name the tokenizer that the Q-Former was trained with"
        )
    return Assembly(model, tokenizer, prompt_tokenizer)


def weight_shapes(model: favchat.FaVChat, config: Config) -> Shapes:
    """Path -> shape of every weight of the model, computed without making any."""
    return flatten_dict(jax.eval_shape(lambda: initialise(model, config.model, 0)), sep="/")


def initialise(model: favchat.FaVChat, sizes: ModelConfig, seed: int) -> dict:
    """Draws all weights afresh, as a nested tree."""
    frames = jnp.zeros((1, sizes.frames, sizes.image_size, sizes.image_size, 3), jnp.uint8)
    ids = jnp.zeros((1, 1, 4), jnp.int32)
    # With `rbg`, drawing some hundred arrays compiles a fifth faster than with the default generator. It draws the same
    # numbers however arrays are cut over devices, since each device draws a whole one and keeps its part.
    return model.init(jax.random.key(seed, impl="rbg"), frames, ids, ids, ids == 0)["params"]


def load_llm(folder: str, dtype: Any = jnp.float32) -> Iterator[tuple[str, np.ndarray]]:
    """The language model's base weights under their paths in the whole model, one after another."""
    return ((f"llm/{path}", leaf) for path, leaf in mistral_folder.each_weight(folder, jnp.dtype(dtype)))


def load_run(workdir: str | Path) -> Run:
    """The newest checkpoint of a workdir, or an exported folder, with everything that answering needs.

    Raises:
        UserError: not a workdir, no intact checkpoint, weights are missing, or the language model's folder has changed
            since.
    """
    config = run_config(workdir)
    parts = assemble(config)
    weights = {**dict(load_llm(config.llm.path)), **whole_visual_and_lora(workdir, config, parts.model)}
    weights = {path: jnp.asarray(leaf) for path, leaf in weights.items()}
    return Run(config, weights, parts.tokenizer, parts.prompt_tokenizer)


def run_config(workdir: str | Path) -> Config:
    """The config of a run whose language model is there and unchanged; raises UserError where it is not.

    Paths in an exported folder (tools.export_orbax) are relative to it.
    """
    workdir, config = Path(workdir), stored_config(workdir)
    if is_weights_folder(workdir):
        prompt_tokenizer = config.prompt_tokenizer and str(workdir / config.prompt_tokenizer)
        config = config.updated({"llm.path": str(workdir / config.llm.path), "prompt_tokenizer": prompt_tokenizer})
    check_llm(workdir, config)
    return config


def whole_visual_and_lora(workdir: str | Path, config: Config, model: favchat.FaVChat) -> Weights:
    """All weights of a run but the language model's base; raises UserError unless they are those of its model."""
    shapes = weight_shapes(model, config)
    weights = load_run_weights(workdir, shapes)
    for path, leaf in weights.items():
        if path not in shapes:
            raise UserError(f"{workdir} holds {path}, which the model of its config.json has not: {RESTORE}")
        if leaf.shape != shapes[path].shape:
            expected = shapes[path].shape
            raise UserError(f"{workdir}: {path} has shape {leaf.shape}, its config.json says {expected}: {RESTORE}")
    return weights
