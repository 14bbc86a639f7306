"""Opens a run: from a config or a workdir to a model, the encoders of its text inputs, and its trained weights."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from transformers import PreTrainedTokenizerBase

from favchat_jax import stages
from favchat_jax.checkpoints import mistral_folder
from favchat_jax.checkpoints.store import Checkpoints
from favchat_jax.checkpoints.weights_folder import RESTORE, is_weights_folder, load_weights
from favchat_jax.checkpoints.workdir import check_llm, stored_config
from favchat_jax.config import Config, ModelConfig
from favchat_jax.data.conversation import Conversation, PromptEncoder, load_tokenizer
from favchat_jax.errors import UserError
from favchat_jax.models import favchat
from favchat_jax.models.mistral import MistralConfig
from favchat_jax.programs import Traces

Weights = dict[str, Any]
Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The model of a config, without weights, and what turns text into its inputs.

    Attributes:
        config: of the stage.
        llm: sizes of the language model.
        model: in its training form.
        tokenizer: the language model's.
        conversation: turns questions and answers into the language model's sequences.
        prompt: turns a question into the Q-Formers' input.
        cache: folder that keeps what later processes need not trace again, if any.
    """

    config: Config
    llm: MistralConfig
    model: favchat.FaVChat
    tokenizer: PreTrainedTokenizerBase
    conversation: Conversation
    prompt: PromptEncoder
    cache: Path | None = None

    @functools.cached_property
    def shapes(self) -> Shapes:
        """Path -> shape of every weight."""
        kept = self.traces and self.traces.read("shapes")
        if kept:
            return {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in json.loads(kept).items()}
        shapes = weight_shapes(self.model, self.config.model)
        if self.traces:
            content = {path: (leaf.shape, leaf.dtype.name) for path, leaf in shapes.items()}
            self.traces.write("shapes", json.dumps(content).encode())
        return shapes

    @property
    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """Path in the language model -> shape of each of its weights, without adapters."""
        base = {path: leaf for path, leaf in self.shapes.items() if stages.group_of(path) == "llm"}
        return {path.removeprefix("llm/"): leaf.shape for path, leaf in base.items()}

    @functools.cached_property
    def traces(self) -> Traces | None:
        """Traces of this model in `cache`."""
        config, end = self.config, self.conversation.eos
        model = (config.model, config.variant, config.ablation, config.lora_rank, config.llm.storage, self.llm, end)
        return Traces(self.cache, repr(model)) if self.cache else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash that changes with the language model's folder."""
        return mistral_folder.fingerprint(self.config.llm.path)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or running stage that can answer: what `--checkpoint=` names.

    Attributes:
        parts: its model.
        weights: all weights in host memory, flat, but those of the language model's base, which are in its folder.
        step: of the checkpoint that they come from; None for an exported folder.
    """

    parts: Assembly
    weights: Weights
    step: int | None = None

    @property
    def config(self) -> Config:
        """The config that it was trained with."""
        return self.parts.config


def assemble(config: Config, cache: Path | None = None) -> Assembly:
    """Builds the model of a config and loads its tokenizers from the folders that the config names.

    Args:
        config: of a stage.
        cache: folder for traces; see `Assembly`.

    Raises:
        UserError: a folder is missing or damaged, or a tokenizer has more tokens than the embedding that it is for.
    """
    llm, tokenizer = mistral_folder.read_config(config.llm.path), load_tokenizer(config.llm.path)
    mistral_folder.check_tokenizer(config.llm.path, tokenizer, llm)
    prompt_tokenizer = load_tokenizer(config.prompt_tokenizer) if config.prompt_tokenizer else tokenizer
    qformer, tokens = config.model.qformer, mistral_folder.token_count(prompt_tokenizer)
    if tokens > qformer.vocabulary:
        raise UserError(
            f"prompt_tokenizer has {tokens} tokens but model.qformer.vocabulary is "
            f"{qformer.vocabulary}: name the tokenizer that the Q-Former was trained with"
        )
    conversation = Conversation(tokenizer, qformer.queries + qformer.extra_queries)
    prompt = PromptEncoder(prompt_tokenizer, config.data.prompt_length)
    trains_qformers = "qformers" in stages.TRAINS[config.variant][config.stage]
    model = favchat.build(
        config.model if trains_qformers else config.model.updated({"qformer.drop_path": 0.0}),
        llm,
        variant=config.variant,
        ablation=config.ablation,
        lora_rank=config.lora_rank,
        storage=config.llm.storage,
    )
    return Assembly(config, llm, model, tokenizer, conversation, prompt, cache)


def weight_shapes(model: favchat.FaVChat, sizes: ModelConfig) -> Shapes:
    """Computes path -> shape of every weight of the model without making any."""
    return flatten_dict(jax.eval_shape(lambda: initialise(model, sizes, 0)), sep="/")


def initialise(model: favchat.FaVChat, sizes: ModelConfig, seed: int) -> dict:
    """Draws all weights afresh, as a nested tree."""
    frames = jnp.zeros((1, sizes.frames, sizes.image_size, sizes.image_size, 3), jnp.uint8)
    ids = jnp.zeros((1, 1, 4), jnp.int32)
    # With `rbg`, drawing some hundred arrays compiles a fifth faster than with the default generator. It draws the same
    # numbers however arrays are cut over devices, since each device draws a whole one and keeps its part.
    return model.init(jax.random.key(seed, impl="rbg"), frames, ids, ids, ids == 0)["params"]


def open_run(workdir: str | Path, cache: Path | None = None) -> Assembly:
    """Assembles the model of a workdir or of an exported folder; arguments as of `assemble`.

    Raises:
        UserError: it is another kind of folder, or the language model's folder is missing or has changed since.
    """
    workdir, config = Path(workdir), stored_config(workdir)
    for needed in filter(None, (config.llm.path, config.prompt_tokenizer)):
        if not Path(needed).exists() and not is_weights_folder(workdir):
            raise UserError(f"{workdir} needs {needed}, which is neither there nor beside it: put that folder back")
    parts = assemble(config, cache)
    check_llm(workdir, config.llm.path, parts.fingerprint)
    return parts


def load_run(workdir: str | Path, cache: Path | None = None) -> Run:
    """Loads the newest checkpoint of a workdir, or an exported folder; `generation.weights.from_run` loads the rest.

    Args:
        workdir: the folder.
        cache: folder for traces; see `Assembly`.

    Raises:
        UserError: as of `open_run`, or no checkpoint is intact, or weights are missing.
    """
    parts = open_run(workdir, cache)
    step, weights = _load(Path(workdir), parts.shapes)
    return Run(parts, weights, step)


def load_trained(workdir: str | Path, shapes: Mapping[str, Any] | None = None) -> Weights:
    """Loads all weights of a run but the language model's base: frozen ones, and the newest of those that train.

    Args:
        workdir: of the run, or an exported folder.
        shapes: path -> shape of the weights that its model has; checked if given.

    Raises:
        UserError: no checkpoint is intact, or the weights are not those of `shapes`.
    """
    return _load(Path(workdir), shapes)[1]


def _load(workdir: Path, shapes: Mapping[str, Any] | None) -> tuple[int | None, Weights]:
    step, weights = None, load_frozen(workdir)
    if not is_weights_folder(workdir):
        with Checkpoints(workdir) as checkpoints:
            step, trainable = checkpoints.load_trainable()
        weights |= trainable
    if shapes is not None:
        _check(workdir, weights, shapes)
    return step, weights


def _check(workdir: Path, weights: Weights, shapes: Mapping[str, Any]) -> None:
    """Raises UserError unless these are the weights of `shapes`, without those of the language model's base."""
    missing = sorted(path for path in shapes if path not in weights and stages.group_of(path) != "llm")
    if missing:
        where = "" if is_weights_folder(workdir) or (workdir / "frozen").exists() else ", because frozen/ is missing"
        count = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise UserError(f"{workdir} lacks {missing[0]}{count}{where}: {RESTORE}")
    for path, leaf in weights.items():
        if path not in shapes:
            raise UserError(f"{workdir} holds {path}, but the model of its config.json has no such weight: {RESTORE}")
        if leaf.shape != shapes[path].shape:
            expected = shapes[path].shape
            raise UserError(f"{workdir}: {path} has shape {leaf.shape}, its config.json says {expected}: {RESTORE}")


def load_frozen(workdir: Path) -> Weights:
    """Loads the weights that a run saved at its start because they never change; of an exported folder, all.

    Stage 1 of v1 has none but the language model's, which are in its own folder.
    """
    folder = workdir if is_weights_folder(workdir) else workdir / "frozen"
    if folder.exists() and not is_weights_folder(folder):
        raise UserError(f"{folder}/leaves.json is missing: {RESTORE}")
    return dict(load_weights(folder)) if folder.exists() else {}
