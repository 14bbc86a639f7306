"""Mistral's Hugging Face folder <-> this project's weights, tensor by tensor.

The folder (`config.json`, `*.safetensors` with or without an index, `tokenizer.json`) is the language model's only
home: training reads it directly, and what the embedded run pretrains is written as the same kind of folder. For many
hosts there is a copy that reads faster, which takes its place:

    DIR/config.json and tokenizer files   DIR/parts/*/ (a weights folder a layer)   DIR/copy.json (of which folder)

It holds the published tensors as they are, under their names, in Orbax's form.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from favchat_jax.checkpoints.table import (
    Row,
    Shape,
    Table,
    each,
    linear,
    prefixed,
    write,
)
from favchat_jax.checkpoints.tensors import open_tensors, read_json, shards
from favchat_jax.errors import UserError
from favchat_jax.models.mistral import REFETCH, LoRA, Mistral, MistralConfig

PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
LAYER = (
    Row("input_layernorm.weight", "input_layernorm/scale"),
    Row("post_attention_layernorm.weight", "post_attention_layernorm/scale"),
    *(
        row
        for part, names in PROJECTIONS.items()
        for name in names
        for row in linear(f"{part}.{name}", f"{part}/{name}", bias=False)
    ),
)
TABLE = Table(
    "Mistral",
    (
        Row("model.embed_tokens.weight", "embed_tokens/embedding"),
        *prefixed(LAYER, published="model.layers.{i}.", path="layers/"),
        Row("model.norm.weight", "norm/scale"),
        *linear("lm_head", "lm_head", bias=False),
    ),
    ignored=((r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a buffer of older exports, computed here"),),
    hint="config.json contradicts the weights",
)


def read_config(folder: str | Path) -> MistralConfig:
    """The sizes in `folder/config.json`; raises UserError where it is missing or not Mistral's."""
    path = Path(folder) / "config.json"
    fields = read_json(path)
    try:
        config = MistralConfig.from_json(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: it is not Mistral's configuration") from None
    except TypeError as error:
        raise UserError(f"{path} has a field of the wrong kind ({error}): {REFETCH}") from None
    except ZeroDivisionError:
        raise UserError(f"{path}: num_attention_heads is 0, not a positive whole number: {REFETCH}") from None
    _check_fit(config, fields, path)
    return config


def _check_fit(config: MistralConfig, fields: Mapping[str, Any], path: Path) -> None:
    """Raises UserError for fields that are numbers but fit no Mistral."""
    heads, activation = config.num_attention_heads, fields.get("hidden_act", "silu")
    if not fields.get("head_dim") and config.hidden_size % heads:
        raise UserError(f"{path}: num_attention_heads is {heads}, which does not divide hidden_size: {REFETCH}")
    if heads % config.num_key_value_heads:
        groups = config.num_key_value_heads
        raise UserError(
            f"{path}: num_key_value_heads is {groups}, which does not divide num_attention_heads: {REFETCH}"
        )
    if config.head_dim % 2:
        raise UserError(f"{path}: head_dim is {config.head_dim}, an odd number that cannot be rotated: {REFETCH}")
    if activation != "silu":
        raise UserError(f"{path}: hidden_act is {activation!r}, but Mistral's is 'silu': {REFETCH}")


def each_weight(folder: str | Path, dtype=np.float32) -> Iterator[tuple[str, np.ndarray]]:
    """Path and array of each weight of `Mistral`'s tree with stacked layers, one after another, read tensor by tensor.

    Args:
        folder: the Hugging Face folder, or a copy of one.
        dtype: dtype of the result, whatever the file's.

    Raises:
        UserError: a shard is missing or damaged, a key is missing or unknown, or a shape contradicts config.json.
    """
    shapes = weight_shapes(read_config(folder))
    return each(TABLE, open_tensors(folder).items(), shapes, folder, dtype)


def read_weights(folder: str | Path, dtype=np.float32) -> dict:
    """Reads all weights of the folder as `Mistral`'s tree. Arguments and errors are those of `each_weight`."""
    return unflatten_dict(dict(each_weight(folder, dtype)), sep="/")


def write_weights(folder: str | Path, tree: Mapping) -> None:
    """Writes `Mistral`'s tree (stacked layers, no adapters) as `folder/model.safetensors` under published names."""
    tensors = dict(write(TABLE, flatten_dict(tree, sep="/")))
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def is_copy(folder: str | Path) -> bool:
    """Whether a folder is a copy that `convert.mistral.write_copy` made."""
    return (Path(folder) / "copy.json").is_file()


def weight_shapes(config: MistralConfig, lora: LoRA | None = None) -> dict[str, Shape]:
    """Path -> shape of every weight, layers stacked; those of adapters too where `lora` has some."""
    model = Mistral(config, lora or LoRA())
    words = jax.ShapeDtypeStruct((1, 1), np.int32)
    shapes = jax.eval_shape(lambda key, words: model.init(key, words, method="read"), jax.random.key(0), words)
    return {path: leaf.shape for path, leaf in flatten_dict(shapes["params"], sep="/").items()}


def fingerprint(folder: str | Path) -> str:
    """A short hash that changes with the folder's weights: of config.json and of each shard's size, header and tail.

    A copy has that of the folder that it was made of, since it is the same model.

    Hashing 14 GB whole would delay every start; a shard's header holds each tensor's dtype, shape and place.
    """
    if is_copy(folder):  # whose parts have checksums of their own
        return read_json(Path(folder) / "copy.json").get("fingerprint", "")
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for shard in shards(Path(folder)):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}".encode())
        with shard.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]
