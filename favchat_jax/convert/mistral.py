"""Mistral's Hugging Face folder <-> this project's weights, tensor by tensor.

The folder (`config.json`, `*.safetensors` with or without an index, `tokenizer.json`) is the language model's only
home: training reads it directly, and what the embedded run pretrains is written as the same kind of folder.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from favchat_jax.errors import UserError
from favchat_jax.models.mistral import Mistral, MistralConfig

# (published name, path in the Flax tree, transposed). "{i}" is a layer; layers are stacked along a first axis.
TABLE = (
    ("model.embed_tokens.weight", "embed_tokens/embedding", False),
    ("model.layers.{i}.input_layernorm.weight", "layers/input_layernorm/scale", False),
    ("model.layers.{i}.self_attn.q_proj.weight", "layers/self_attn/q_proj/kernel", True),
    ("model.layers.{i}.self_attn.k_proj.weight", "layers/self_attn/k_proj/kernel", True),
    ("model.layers.{i}.self_attn.v_proj.weight", "layers/self_attn/v_proj/kernel", True),
    ("model.layers.{i}.self_attn.o_proj.weight", "layers/self_attn/o_proj/kernel", True),
    ("model.layers.{i}.post_attention_layernorm.weight", "layers/post_attention_layernorm/scale", False),
    ("model.layers.{i}.mlp.gate_proj.weight", "layers/mlp/gate_proj/kernel", True),
    ("model.layers.{i}.mlp.up_proj.weight", "layers/mlp/up_proj/kernel", True),
    ("model.layers.{i}.mlp.down_proj.weight", "layers/mlp/down_proj/kernel", True),
    ("model.norm.weight", "norm/scale", False),
    ("lm_head.weight", "lm_head/kernel", True),
)
# Buffers that older exports carry; they are computed here.
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def read_config(folder: str | Path) -> MistralConfig:
    """The sizes in `folder/config.json`; raises UserError where it is missing or not Mistral's."""
    path = Path(folder) / "config.json"
    fields = _read_json(path)
    try:
        config = MistralConfig.from_json(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: it is not Mistral's configuration") from None
    except TypeError as error:
        raise UserError(f"{path} has a field of the wrong kind ({error}): fetch the folder again") from None
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and not (isinstance(value, int) and value > 0):
            raise UserError(f"{path}: {field.name} is {value!r}, not a positive whole number: fetch the folder again")
    return config


def read_weights(folder: str | Path, dtype=np.float32) -> dict:
    """All weights of the folder as `Mistral`'s tree with stacked layers, read one tensor at a time.

    Args:
        folder: the Hugging Face folder.
        dtype: dtype of the result, whatever the file's.

    Raises:
        UserError: a shard is missing or damaged, a key is missing or unknown, or a shape contradicts config.json.
    """
    shapes = weight_shapes(read_config(folder))
    tree = {path: np.empty(shape, dtype) for path, shape in shapes.items()}
    missing = {(name, layer) for name, path, _ in TABLE for layer in _layers(name, shapes[path])}
    for name, tensor in _tensors(Path(folder)):
        row, layer = _row_of(name, folder)
        if row is None:
            continue
        published, path, transposed = row
        target = tree[path] if layer is None else tree[path][layer : layer + 1][0] if layer < len(tree[path]) else None
        value = tensor.T if transposed else tensor
        if target is None or value.shape != target.shape:
            expected = "no such layer" if target is None else f"expected {target.shape}"
            raise UserError(
                f"{folder}: {name} has shape {value.shape}, {expected}: config.json contradicts the weights"
            )
        target[...] = value
        missing.discard((published, layer))
    if missing:
        name, layer = min(missing, key=str)
        others = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks {name.format(i=layer)}{others}: fetch the folder again")
    return unflatten_dict(tree, sep="/")


def write_weights(folder: str | Path, tree: Mapping) -> None:
    """Writes `Mistral`'s tree (stacked layers, no adapters) as `folder/model.safetensors` under published names."""
    flat = flatten_dict(tree, sep="/")
    tensors = {}
    for name, path, transposed in TABLE:
        value = np.asarray(flat[path])
        for layer in _layers(name, value.shape):
            tensor = value if layer is None else value[layer]
            tensors[name.format(i=layer)] = np.ascontiguousarray(tensor.T if transposed else tensor)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def weight_shapes(config: MistralConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every weight, layers stacked."""
    model = Mistral(config)

    def initialise(key, x):
        return model.init(key, x, method=lambda m, x: m.logits(m(m.embed(x))[0]))

    shapes = jax.eval_shape(initialise, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), np.int32))
    return {path: leaf.shape for path, leaf in flatten_dict(shapes["params"], sep="/").items()}


def fingerprint(folder: str | Path) -> str:
    """A short hash that changes with the folder's weights: of config.json and of each shard's size, header and tail.

    Hashing 14 GB whole would delay every start; a shard's header holds each tensor's dtype, shape and place.
    """
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for shard in _shards(Path(folder)):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}".encode())
        with shard.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _layers(name: str, shape: tuple[int, ...]):
    return range(shape[0]) if "{i}" in name else (None,)


def _row_of(name: str, folder) -> tuple[tuple[str, str, bool] | None, int | None]:
    """The table's row for a published name and its layer; (None, None) where the name is to be ignored."""
    for row in TABLE:
        match = re.fullmatch(re.escape(row[0]).replace(r"\{i\}", r"(\d+)"), name)
        if match:
            return row, int(match[1]) if match.groups() else None
    if any(re.fullmatch(pattern, name) for pattern in IGNORED):
        return None, None
    raise UserError(f"{folder}: {name} is not a weight of Mistral")


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    shards = [folder / "model.safetensors"]
    if index.exists():
        try:
            shards = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
        except (KeyError, AttributeError, TypeError):
            raise UserError(f"{index} does not map weights to files: fetch the folder again") from None
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard} is missing: llm.path must name a whole Hugging Face folder")
    return shards


def _tensors(folder: Path):
    for shard in _shards(folder):
        try:
            with safe_open(shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard} is damaged ({error}): fetch it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: llm.path must name a Hugging Face folder of Mistral") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check llm.path") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): fetch the folder again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: fetch the folder again")
    return value
