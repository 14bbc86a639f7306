"""Exports a run as a folder for PyTorch, with published names.

    DIR/config.json, generation_config.json     FaVChat's config, for `AutoModelForCausalLM.from_pretrained(DIR, ...)`
    DIR/processor_config.json                   the processor's, for `AutoProcessor`
    DIR/tokenizer.json, tokenizer_config.json   the language model's tokenizer, for `AutoTokenizer`
    DIR/centerface.onnx                         the face detector's weights, if the run crops faces with them
    DIR/*_favchat.py, requirements.txt          the model's code, for `trust_remote_code=True`, and what it needs
    DIR/model.safetensors.index.json            the file of each weight, below `llm/` or `visual.safetensors`
    DIR/llm/                                    the language model with its adapters merged, a Hugging Face folder
    DIR/visual.safetensors                      all other weights under the names of `convert/favchat.py`
    DIR/adapter/                                the same adapters for PEFT, on the original language model
    DIR/README.md                               the model card
    DIR/prompt_tokenizer/                       the tokenizer of the Q-Formers

Weights pass through this package's tables tensor by tensor. Memory holds one shard of the language model at a time.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.table import Slot, account, check, finite, slots, write
from favchat_jax.checkpoints.tensors import INDEX, open_tensors, read_json, save_tensors
from favchat_jax.config import Config
from favchat_jax.convert import card, face_code, favchat, lora
from favchat_jax.convert.folder import copy_tokenizer
from favchat_jax.data.conversation import load_tokenizer
from favchat_jax.data.faces.detectors import CENTERFACE, centerface_file
from favchat_jax.errors import UserError
from favchat_jax.models.lora import merged
from favchat_jax.models.mistral import LoRA

Weights = Mapping[str, Any]

SHARD_BYTES = 5 * 10**9
MODEL_FILES = Path(__file__).parent / "pytorch"
VISUAL = "visual.safetensors"
PROCESSOR = {"AutoProcessor": "processing_favchat.FaVChatProcessor"}


def write_folder(folder: Path, config: Config, weights: Weights, tokenizer: Any, dtype: str) -> None:
    """Writes a run's export into an empty folder.

    Args:
        folder: the empty folder.
        config: the run's config; it names the folders of the language model's base and of the tokenizers.
        weights: all weights but the language model's base, by path.
        tokenizer: the language model's tokenizer.
        dtype: dtype of all written weights, float32 or bfloat16.

    Raises:
        UserError: the language model's folder is incomplete.
    """
    adapters = {path: leaf for path, leaf in weights.items() if path.endswith(("lora_a", "lora_b"))}
    visual = {path: leaf for path, leaf in weights.items() if path not in adapters}
    where = {name: f"llm/{file}" for name, file in _write_llm(folder / "llm", config, adapters, dtype).items()}

    tensors = dict(write(favchat.TABLE, _cast(visual, dtype)))
    save_tensors(tensors, folder / VISUAL)
    where |= {name: VISUAL for name in tensors}
    if adapters:
        _write_adapter(folder / "adapter", config, _cast(adapters, dtype))

    copy_tokenizer(config.llm.path, folder / "llm")
    write_tokenizer(folder, config.llm.path)
    write_tokenizer(folder / "prompt_tokenizer", config.prompt_tokenizer or config.llm.path)
    for file in MODEL_FILES.glob("*_favchat.py"):
        shutil.copyfile(file, folder / file.name)
    (folder / "faces_favchat.py").write_text(face_code.source())
    if config.data.face_crop and config.data.detector == "centerface":
        shutil.copyfile(centerface_file(config.data.detector_model), folder / CENTERFACE)
    (folder / "README.md").write_text(card.model_card(config, bool(adapters)))
    (folder / "requirements.txt").write_text(card.REQUIREMENTS)
    _write_json(folder / "processor_config.json", _processor_config(config))
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for place in (folder, folder / "llm"):
        _write_json(place / "generation_config.json", generation)
    _write_json(folder / INDEX, {"metadata": {}, "weight_map": where})
    # Written last, since it marks the folder as an export.
    _write_json(folder / "config.json", favchat_config(config, _llm_config(config.llm.path), dtype))


def is_exported(folder: Path) -> bool:
    """Returns whether `write_folder` made this folder."""
    try:
        return read_json(folder / "config.json").get("model_type") == "favchat" and (folder / VISUAL).is_file()
    except UserError:
        return False


def _write_llm(folder: Path, config: Config, adapters: Weights, dtype: str) -> dict[str, str]:
    """Writes the language model with its adapters merged; returns tensor name -> file name."""
    folder.mkdir()
    source, shapes = config.llm.path, mistral.weight_shapes(mistral.read_config(config.llm.path))
    tensors = open_tensors(source)
    # Sorted by layer, since a copy of a folder is read layer by layer.
    wanted = dict(sorted(slots(mistral.TABLE, shapes).items(), key=lambda item: item[1].place))
    check(mistral.TABLE, account(mistral.TABLE, tensors, shapes), source)
    shards = _shards(wanted, jnp.dtype(dtype).itemsize)
    where = {}
    with tqdm(total=len(wanted), desc="language model", unit="tensor", mininterval=1) as bar:
        for file, names in shards:
            shard = {}
            for name in names:
                slot = wanted[name]
                tensor = finite(tensors[name], name, source)
                weight = _merged(slot.transform.ours(tensor), slot, adapters, config.model.lora.alpha)
                shard[name] = np.ascontiguousarray(slot.transform.published(weight).astype(jnp.dtype(dtype)))
                bar.update()
            save_tensors(shard, folder / file)
            where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {}, "weight_map": where})
    _write_json(folder / "config.json", {**_llm_config(source), "dtype": dtype})
    return where


def _shards(wanted: Mapping[str, Slot], itemsize: int) -> list[tuple[str, list[str]]]:
    """Splits the tensors into shards of at most `SHARD_BYTES`; returns each shard's file and tensor names."""
    shards, room = [], 0
    for name, slot in wanted.items():
        size = itemsize * int(np.prod(slot.shape))
        if size > room or not shards:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    return [(f"model-{i:05}-of-{len(shards):05}.safetensors", names) for i, names in enumerate(shards, start=1)]


def _merged(weight: np.ndarray, slot: Slot, adapters: Weights, alpha: float) -> np.ndarray:
    """Adds the adapter, if there is one, to a weight of the language model in float32."""
    layer, _, name = slot.path.rpartition("/")
    if name != "kernel" or f"llm/{layer}/lora_a" not in adapters:
        return weight
    a, b = (np.asarray(adapters[f"llm/{layer}/{half}"])[slot.place] for half in ("lora_a", "lora_b"))
    return merged(weight.astype(np.float32), a, b, alpha)


def _write_adapter(folder: Path, config: Config, adapters: Weights) -> None:
    folder.mkdir()
    section = config.model.lora
    settings = LoRA(section.rank, section.alpha, section.dropout, section.targets)
    base = base_name(config.llm.path)
    save_tensors(dict(write(lora.TABLE, adapters)), folder / "adapter_model.safetensors")
    _write_json(folder / "adapter_config.json", lora.adapter_config(settings, base))
    (folder / "README.md").write_text(card.adapter_card(base))


def base_name(folder: str) -> str:
    """Returns the name under which transformers finds a language model's folder from any place.

    It is the repository of a folder in Hugging Face's cache, and otherwise the complete path. Of a copy, which only
    this package reads, it is that of the folder that it was made from.
    """
    if mistral.is_copy(folder):
        folder = read_json(Path(folder) / "copy.json").get("source", folder)
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", str(Path(folder).absolute()))
    return f"{cached[1]}/{cached[2]}" if cached else str(Path(folder).resolve())


def write_tokenizer(folder: Path, source: str) -> None:
    """Writes a tokenizer that transformers reads from tokenizer.json alone, without a template for conversations."""
    load_tokenizer(source).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # of another conversation than FaVChat's


def _llm_config(source: str) -> dict[str, Any]:
    """Returns the fields of the language model's config.json, except those that describe how the file was written."""
    written = ("_name_or_path", "torch_dtype", "dtype", "transformers_version")
    return {name: value for name, value in read_json(Path(source) / "config.json").items() if name not in written}


def favchat_config(config: Config, llm: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a run's exported config.json; `llm` holds the fields of its language model's config.json."""
    model, code = config.model, "modeling_favchat.FaVChatForConditionalGeneration"
    umt = {name: value for name, value in model.umt.to_json().items() if name != "depth"}  # of the published model
    qformer = {name: value for name, value in model.qformer.to_json().items() if name != "drop_path"}  # of training
    return {
        **llm,
        "architectures": ["FaVChatForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_favchat.FaVChatConfig",
            "AutoModelForCausalLM": code,
            "AutoModelForImageTextToText": code,
            **PROCESSOR,
        },
        "model_type": "favchat",
        "dtype": dtype,
        "variant": config.variant,
        "ablation": config.ablation,
        "frames": model.frames,
        "image_size": model.image_size,
        "prompt_length": config.data.prompt_length,
        "umt": umt,
        "no_face_taps": list(model.no_face_taps),
        "facexformer": model.facexformer.to_json(),
        "fusion": model.fusion.to_json(),
        "qformer": qformer,
        "adapter": model.adapter.to_json(),
    }


def _processor_config(config: Config) -> dict[str, Any]:
    """Returns a run's exported processor_config.json."""
    qformer = config.model.qformer
    return {
        "processor_class": "FaVChatProcessor",
        "auto_map": PROCESSOR,
        "frames": config.model.frames,
        "image_size": config.model.image_size,
        "visual_tokens": qformer.queries + qformer.extra_queries,
        "prompt_length": config.data.prompt_length,
        "longest": mistral.read_config(config.llm.path).max_position_embeddings,
        "face_crop": config.data.face_crop,
        **{name: getattr(config.data, name) for name in ("detector", "smallest_face", "align_faces")},
    }


def _cast(weights: Weights, dtype: str) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf).astype(jnp.dtype(dtype)) for path, leaf in weights.items()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
