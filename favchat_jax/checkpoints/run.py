"""From a config to a model, its tokenizers and its weights: fresh, converted, or of an earlier run."""

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict
from transformers import PreTrainedTokenizerBase

from favchat_jax import sharding
from favchat_jax.checkpoints import mistral_folder
from favchat_jax.checkpoints.store import Checkpoints, load_config
from favchat_jax.checkpoints.weights_folder import load_weights
from favchat_jax.data.conversation import load_tokenizer
from favchat_jax.errors import UserError
from favchat_jax.models import favchat
from favchat_jax.stages import STAGES, group_of

log = logging.getLogger("favchat_jax")

Weights = dict[str, jax.Array]

RESTORE = "copy the whole workdir again, or train again"
FIELDS = ("variant", "ablation", "stage", "model", "data", "prompt_tokenizer", "llm")  # of config.json, to answer


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A model and the tokenizers that its inputs need: the language model's, and the Q-Formers' for the prompt."""

    model: favchat.FaVChat
    tokenizer: PreTrainedTokenizerBase
    prompt_tokenizer: PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or running stage, ready to answer: what `--checkpoint=` names."""

    config: ml_collections.ConfigDict
    weights: Weights
    tokenizer: PreTrainedTokenizerBase
    prompt_tokenizer: PreTrainedTokenizerBase


def assemble(config: ml_collections.ConfigDict) -> Assembly:
    """The model and tokenizers of a config; the language model's folder is read for its sizes and its tokenizer."""
    llm = mistral_folder.read_config(config.llm.path)
    model = favchat.build(
        config.model,
        llm,
        variant=config.variant,
        ablation=config.ablation,
        lora_rank=config.model.lora.rank if STAGES[config.stage].lora else 0,
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


def weight_shapes(model: favchat.FaVChat, config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every weight of the model, computed without making any."""
    return flatten_dict(jax.eval_shape(lambda: _initialise(model, config.model, 0)), sep="/")


def initial_weights(
    config: ml_collections.ConfigDict, model: favchat.FaVChat, mesh: jax.sharding.Mesh | None = None
) -> Weights:
    """Every weight that a stage starts from, each on its shards from the first; by default on the first device.

    The language model's base comes from its folder; the rest from the stage before (`init.from_run`) or, where none is
    named, from the folders of `init.umt`, `init.facexformer` and `init.qformer`. What none of them has comes from
    `init.videochat2` (its LoRA enters in stage 2, which follows a stage without), and the rest is drawn afresh.

    Raises:
        UserError: a source is missing, damaged, or holds a weight of another shape.
    """
    mesh = mesh or sharding.one_device()
    shapes = weight_shapes(model, config)
    weights: Weights = {}

    def take(source: str, loaded: Iterable[tuple[str, Any]], dtype: Any = jnp.float32) -> None:
        for path, leaf in loaded:
            if path not in shapes:
                raise UserError(f"{source} holds {path}, which this model has not: check variant, ablation and preset")
            if leaf.shape != shapes[path].shape:
                raise UserError(f"{source}: {path} has shape {leaf.shape}, expected {shapes[path].shape}")
            weights[path] = sharding.place(path, leaf, mesh, dtype)

    take(config.llm.path, load_llm(config.llm.path, config.model.dtype), config.model.dtype)
    for part in ("videochat2", "umt", "facexformer", "qformer"):
        source = config.init[part]
        if source and (part == "videochat2" or not config.init.from_run):
            loaded = _converted(part, source).items()
            take(source, [(place, leaf) for path, leaf in loaded for place in _places(path, config)])
    if config.init.from_run:
        take(config.init.from_run, _previous_stage(config, shapes).items())
    missing = sorted(set(shapes) - set(weights))
    if missing:
        log.info("%d of %d weight arrays start afresh", len(missing), len(shapes))

        def fresh() -> Weights:
            drawn = flatten_dict(_initialise(model, config.model, config.seed), sep="/")
            return {path: drawn[path] for path in missing}

        shards = sharding.partitions({path: shapes[path] for path in missing}, mesh)
        weights |= jax.jit(fresh, out_shardings=shards)()
    return weights


def _converted(part: str, source: str) -> Weights:
    """Weights of a converted folder; of a run that `init.qformer` names, both its Q-Formers and their linear layers."""
    if part != "qformer":
        return load_weights(source)
    if (Path(source) / "llm.json").exists():
        weights = visual_and_lora(source)
        return {path: leaf for path, leaf in weights.items() if group_of(path) in ("qformers", "linears")}
    return {f"qformer/{path}": leaf for path, leaf in load_weights(source).items()}


def _places(path: str, config: ml_collections.ConfigDict) -> list[str]:
    """Where a converted weight goes: a Q-Former and its projection to both streams, others to their own path, and
    those of parts that the stage or the ablation has not to none."""
    if path.startswith(("qformer/", "proj/")):
        return [f"{stream}_{path}" for stream in ("general", "facial")]
    absent = {
        "facexformer/": config.ablation == "no_face",
        "linear_fuse/": config.ablation != "no_granularity",
        "llm/": not STAGES[config.stage].lora,
    }
    return [] if any(path.startswith(part) and lacks for part, lacks in absent.items()) else [path]


def load_llm(folder: str, dtype: Any = jnp.float32) -> Iterator[tuple[str, np.ndarray]]:
    """The language model's base weights under their paths in the whole model, one after another."""
    return ((f"llm/{path}", leaf) for path, leaf in mistral_folder.each_weight(folder, jnp.dtype(dtype)))


def load_run(workdir: str | Path) -> Run:
    """The newest checkpoint of a workdir, or an exported folder, with everything that answering needs.

    Raises:
        UserError: not a workdir, no whole checkpoint, weights are missing, or the language model's folder has changed
            since.
    """
    config = run_config(workdir)
    parts = assemble(config)
    weights = {**dict(load_llm(config.llm.path)), **whole_visual_and_lora(workdir, config, parts.model)}
    weights = {path: jnp.asarray(leaf) for path, leaf in weights.items()}
    return Run(config, weights, parts.tokenizer, parts.prompt_tokenizer)


def run_config(workdir: str | Path) -> ml_collections.ConfigDict:
    """The config of a run whose language model is there and unchanged; raises UserError where it is not.

    Paths in an exported folder (tools.export_orbax) are its own parts.
    """
    workdir = Path(workdir)
    fields = load_config(workdir)
    _refuse_other_folders(workdir, fields)
    lacking = [name for name in FIELDS if name not in fields]
    if lacking or not isinstance(fields["llm"], dict) or "path" not in fields["llm"]:
        raise UserError(f"{workdir}/config.json is damaged (it lacks {(lacking or ['llm.path'])[0]}): {RESTORE}")
    config = ml_collections.ConfigDict(fields)
    if is_self_contained(workdir):
        config.llm.path = str(workdir / config.llm.path)
        config.prompt_tokenizer = config.prompt_tokenizer and str(workdir / config.prompt_tokenizer)
    check_llm(workdir, config)
    return config


def _refuse_other_folders(folder: Path, fields: dict[str, Any]) -> None:
    """Raises UserError for folders with a config.json that are no run, saying what they are."""
    kinds = {"favchat": "an export for PyTorch", "mistral": "a language model's folder"}
    what = kinds.get(str(fields.get("model_type")))
    if is_self_contained(folder) and "stage" not in fields and fields:
        what = f"a weights folder ({fields.get('kind') or fields.get('of') or 'of one part'})"
    if what:
        raise UserError(f"{folder} is {what}, not a run: name a stage's workdir, or what tools.export_orbax wrote")


def is_self_contained(workdir: str | Path) -> bool:
    """Whether a run's weights lie in one weights folder, as tools.export_orbax writes it, and not in checkpoints."""
    return (Path(workdir) / "leaves.json").exists()


def check_llm(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Raises UserError where the language model's folder is not the one that the run started with."""
    try:
        expected = json.loads((workdir / "llm.json").read_text())["fingerprint"]
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no checkpoint: train it first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{workdir}/llm.json is damaged: delete the workdir and train again") from None
    mistral_folder.read_config(config.llm.path)
    if mistral_folder.fingerprint(config.llm.path) != expected:
        raise UserError(
            f"{config.llm.path} is not the language model that {workdir} was trained on: restore that folder"
        )


def visual_and_lora(workdir: str | Path) -> Weights:
    """All weights of a run but the language model's base: the frozen ones, and the trained ones of its newest step."""
    if is_self_contained(workdir):
        return load_weights(workdir)
    checkpoints = Checkpoints(workdir)
    try:
        return {**frozen_weights(Path(workdir)), **checkpoints.load_trainable()}
    finally:
        checkpoints.close()


def whole_visual_and_lora(workdir: str | Path, config: ml_collections.ConfigDict, model: favchat.FaVChat) -> Weights:
    """`visual_and_lora` of a run, all that the model of its config needs; raises UserError where some are missing."""
    weights, shapes = visual_and_lora(workdir), weight_shapes(model, config)
    for path, leaf in weights.items():
        if path not in shapes:
            raise UserError(f"{workdir} holds {path}, which the model of its config.json has not: {RESTORE}")
        if leaf.shape != shapes[path].shape:
            expected = shapes[path].shape
            raise UserError(f"{workdir}: {path} has shape {leaf.shape}, its config.json says {expected}: {RESTORE}")
    _check_none_missing(workdir, weights, shapes)
    return weights


def _check_none_missing(workdir: str | Path, weights: Weights, shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises UserError where a run's weights are not all of `shapes`, the language model's base aside."""
    missing = sorted(path for path in shapes if path not in weights and group_of(path) != "llm")
    if missing:
        gone = not is_self_contained(workdir) and not (Path(workdir) / "frozen").exists()
        where = ", for it has no frozen/" if gone else ""
        count = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise UserError(f"{workdir} lacks {missing[0]}{count}{where}: {RESTORE}")


def frozen_weights(workdir: Path) -> Weights:
    """The weights that a run saved at its start since they never change; stage 1 has none but the language model's."""
    folder = workdir / "frozen"
    if folder.exists() and not (folder / "leaves.json").exists():
        raise UserError(f"{folder}/leaves.json is missing: {RESTORE}")
    return load_weights(folder) if folder.exists() else {}


def _previous_stage(config: ml_collections.ConfigDict, shapes: dict[str, jax.ShapeDtypeStruct]) -> Weights:
    source = config.init.from_run
    before = load_config(source)
    _refuse_other_folders(Path(source), before)
    for field in ("preset", "variant", "ablation"):
        if before.get(field) != config[field]:
            raise UserError(
                f"init.from_run={source} is of {field}={before.get(field)}, this run of {field}={config[field]}"
            )
    stage, expected = before.get("stage"), STAGES[config.stage].before
    if stage != expected:
        raise UserError(f"init.from_run={source} is {stage}, but {config.stage} starts from {expected}")
    weights = visual_and_lora(source)
    adapters = STAGES[stage].lora
    _check_none_missing(source, weights, {p: s for p, s in shapes.items() if adapters or group_of(p) != "lora"})
    return weights


def _initialise(model: favchat.FaVChat, section: ml_collections.ConfigDict, seed: int) -> dict:
    frames = jnp.zeros((1, section.frames, section.image_size, section.image_size, 3), jnp.uint8)
    ids = jnp.zeros((1, 1, 4), jnp.int32)
    # With `rbg`, drawing some hundred arrays compiles a fifth faster than with the default generator. It draws the same
    # numbers however arrays are cut over devices, since each device draws a whole one and keeps its part.
    return model.init(jax.random.key(seed, impl="rbg"), frames, ids, ids, ids == 0)["params"]
