"""Reads and writes Mistral's Hugging Face folder, tensor by tensor.

The folder (`config.json`, `*.safetensors` with or without an index, `tokenizer.json`) is the only place of the language
model: training reads it directly, and the embedded preset writes its small language model as such a folder. On many
hosts, a copy that reads faster can replace it:

    DIR/config.json and tokenizer files   DIR/parts/*/ (a weights folder a layer)   DIR/copy.json (of which folder)

The copy holds the published tensors, unchanged and under their names, in Orbax's format.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from favchat_jax.checkpoints.table import (
    Row,
    Shape,
    Table,
    account,
    check,
    each,
    linear,
    prefixed,
    write,
)
from favchat_jax.checkpoints.tensors import Tensor, open_tensors, read_json, save_tensors, shards
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
    """Reads the sizes in `folder/config.json`; raises UserError if it is missing or not Mistral's."""
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
    """Raises UserError for numbers that no Mistral can have."""
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


def check_tokenizer(folder: str | Path, tokenizer: PreTrainedTokenizerBase, config: MistralConfig) -> None:
    """Raises UserError if the folder's tokenizer has a token that its embedding lacks, which would be read as NaN."""
    tokens = token_count(tokenizer)
    if tokens > config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokens} tokens but vocab_size in its config.json is {config.vocab_size}: "
            "remove the added tokens, or name a model whose embedding was resized for them"
        )


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of rows that an embedding needs: 1 more than the largest id, since ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def each_weight(
    folder: str | Path, dtype: DTypeLike = np.float32, prefix: str = "", shapes: Mapping[str, Shape] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields path and array of each weight of `Mistral`'s tree with stacked layers, read tensor by tensor.

    Args:
        folder: the Hugging Face folder, or a copy of one.
        dtype: dtype of the result, independent of the file's.
        prefix: added before each path; `llm/` gives the paths within FaVChat.
        shapes: path -> shape of the weights, without the prefix; computed from config.json by default.

    Raises:
        UserError: a shard is missing or damaged, a key is missing or unknown, or a shape contradicts config.json.
    """
    shapes = shapes or weight_shapes(read_config(folder))
    weights = each(TABLE, open_tensors(folder).items(), shapes, folder, jnp.dtype(dtype))
    return ((prefix + path, weight) for path, weight in weights)


def open_weights(folder: str | Path, shapes: Mapping[str, Shape]) -> dict[tuple[str | int, ...], tuple[str, Tensor]]:
    """Returns each of the folder's tensors in its published layout, by the path here and the place in stacked layers.

    A kernel is [out, in], as in `("layers/mlp/up_proj/kernel", 3)`. Its published name stands beside each tensor.
    Nothing is read yet.

    Args:
        folder: the Hugging Face folder, or a copy of one.
        shapes: as of `each_weight`.

    Raises:
        UserError: as of `each_weight`.
    """
    tensors = open_tensors(folder)
    found = account(TABLE, tensors, shapes)
    check(TABLE, found, folder)
    return {(slot.path, *slot.place): (name, tensors[name]) for name, slot in found.used.items()}


def read_weights(folder: str | Path, dtype=np.float32) -> dict:
    """Reads all weights of the folder as `Mistral`'s tree. Arguments and errors are those of `each_weight`."""
    return unflatten_dict(dict(each_weight(folder, dtype)), sep="/")


def write_weights(folder: str | Path, tree: Mapping) -> None:
    """Writes `Mistral`'s tree (stacked layers, no adapters) as `folder/model.safetensors` under published names."""
    save_tensors(dict(write(TABLE, flatten_dict(tree, sep="/"))), Path(folder) / "model.safetensors")


def is_copy(folder: str | Path) -> bool:
    """Returns whether `convert.mistral.write_copy` made a folder."""
    return (Path(folder) / "copy.json").is_file()


def weight_shapes(config: MistralConfig, lora: LoRA | None = None) -> dict[str, Shape]:
    """Computes path -> shape of every weight, with layers stacked, and of the adapters that `lora` defines."""
    model = Mistral(config, lora or LoRA())
    words = jax.ShapeDtypeStruct((1, 1), np.int32)
    shapes = jax.eval_shape(lambda key, words: model.init(key, words, method="read"), jax.random.key(0), words)
    return {path: leaf.shape for path, leaf in flatten_dict(shapes["params"], sep="/").items()}


def fingerprint(folder: str | Path) -> str:
    """Computes a short hash that changes with the folder's weights, of config.json and each shard's size and ends.

    Hashing all 14 GB would delay every start; a shard begins with each tensor's dtype, shape and place. A copy has the
    fingerprint of the folder that it was made from.
    """
    if is_copy(folder):  # its parts have their own checksums
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
