"""Measures the error of a language model's narrow storage: python -m tools.quantization_error --llm=FOLDER [--json=F]

Reads summaries of held-out rendered clips with a Mistral in float32, and with its kernels in bfloat16, int8 and int4.
Prints the error of the scores over the vocabulary relative to float32, and the loss of the next token. With
--width=4096, a small model is first widened to Mistral's width, where it computes the same.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from favchat_jax import command_line
from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.data.conversation import load_tokenizer
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.errors import UserError
from favchat_jax.files import replace_file
from favchat_jax.models.kernels.quantized import store
from favchat_jax.models.mistral import Mistral, MistralConfig

CLIPS = 32  # whose summaries are read
LENGTH = 96  # tokens of each
STORED = {"bfloat16": "full", "int8": "int8", "int4": "int4"}


def errors(folder: str, width: int = 0) -> list[dict[str, Any]]:
    """Returns a row for each storage: bytes of the kernels, relative error of the scores, loss of the next token.

    Args:
        folder: of the language model.
        width: to which it is widened first; 0 for its own.
    """
    tokenizer = load_tokenizer(folder)
    texts = [rendered_faces.render(0, "heldout", i).summary for i in range(CLIPS)]
    tokens = np.full((CLIPS, LENGTH), tokenizer.eos_token_id, np.int32)
    counted = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=True)[:LENGTH]
        tokens[row, : len(ids)], counted[row, : len(ids)] = ids, True
    config, flat = mistral.read_config(folder), flatten_dict(mistral.read_weights(folder), sep="/")
    if width:
        config, flat = widened(config, flat, width)
    weights = {f"llm/{path}": jnp.asarray(x) for path, x in flat.items()}

    @functools.partial(jax.jit, static_argnums=1)
    def read(weights, storage):
        params = {"params": unflatten_dict(weights, sep="/")["llm"]}
        scores = Mistral(config, storage=storage).apply(params, tokens, method="read")[:, :-1]
        log_shares = jax.nn.log_softmax(scores)
        next_token = jnp.take_along_axis(log_shares, tokens[:, 1:, None], axis=-1)[..., 0]
        return scores, -jnp.sum(next_token * counted[:, 1:]) / jnp.sum(counted[:, 1:])

    exact, loss = read(weights, "full")
    first = {"storage": "float32", "bytes": _kernel_bytes(weights), "error": 0.0, "same_token": 1.0}
    rows, likeliest = [{**first, "as_bfloat16": 1.0, "loss": float(loss)}], {}
    for name, storage in STORED.items():
        narrow = {p: x.astype(jnp.bfloat16) if p.endswith("kernel") else x for p, x in weights.items()}
        stored = narrow if storage == "full" else store(dict(weights), storage)
        scores, loss = read(stored, storage)
        off = jnp.linalg.norm(scores - exact) / jnp.linalg.norm(exact)
        likeliest[name] = jnp.argmax(scores, -1)
        references = {"same_token": jnp.argmax(exact, -1), "as_bfloat16": likeliest["bfloat16"]}
        same = {of: float(jnp.mean(likeliest[name] == it, where=counted[:, 1:])) for of, it in references.items()}
        row = {"storage": name, "bytes": _kernel_bytes(stored), "error": float(off)}
        rows.append({**row, **same, "loss": float(loss)})
    rows[0]["as_bfloat16"] = rows[1]["same_token"]
    return rows


def widened(
    config: MistralConfig, weights: Mapping[str, np.ndarray], width: int
) -> tuple[MistralConfig, dict[str, np.ndarray]]:
    """Returns a wider language model that computes the same: each unit and each head exists several times.

    The weights from one unit's copies add up to the original weight. Each is random and as large as the weights of a
    network of that width, so that the copies are rounded differently.

    Args:
        config: sizes.
        weights: in float32, by path.
        width: multiple of `config.hidden_size`.
    """
    if width % config.hidden_size:
        raise UserError(f"--width={width} is not a multiple of the model's width {config.hidden_size}")
    copies, rng = width // config.hidden_size, np.random.default_rng(0)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    wide = dataclasses.replace(config, **{name: copies * getattr(config, name) for name in sizes})

    def outputs(leaf: np.ndarray, path: str) -> np.ndarray:
        """Copies the last axis: unit by unit, or head by head where it is of heads."""
        if path.startswith("lm_head"):
            return leaf
        unit = config.head_dim if path.split("/")[-2] in ("q_proj", "k_proj", "v_proj") else 1
        grouped = leaf.reshape(*leaf.shape[:-1], -1, unit)
        return np.repeat(grouped, copies, axis=-2).reshape(*leaf.shape[:-1], -1)

    def shared_out(kernel: np.ndarray, path: str) -> np.ndarray:
        """Copies the axis of the inputs; the weights of one input's copies add up to the original."""
        unit = config.head_dim if "o_proj" in path else 1
        kernel = kernel.reshape(*kernel.shape[:-2], -1, 1, unit, kernel.shape[-1])
        noise = rng.standard_normal((*kernel.shape[:-3], copies, *kernel.shape[-2:]), np.float32)
        noise -= noise.mean(axis=-3, keepdims=True)
        return (kernel / copies + noise * kernel.std() * copies**-0.5).reshape(*kernel.shape[:-4], -1, kernel.shape[-1])

    kernels = {path: leaf for path, leaf in weights.items() if path.endswith("kernel")}
    others = {path: outputs(leaf, path) for path, leaf in weights.items() if path not in kernels}
    return wide, {**others, **{path: shared_out(outputs(leaf, path), path) for path, leaf in kernels.items()}}


def _kernel_bytes(weights: dict[str, jax.Array]) -> int:
    """Returns the bytes of the kernels in packed form, with two int4 values per byte."""
    kernels = [leaf for path, leaf in weights.items() if path.endswith(("kernel", "kernel_scale"))]
    return sum(leaf.size // 2 if leaf.dtype == jnp.int4 else leaf.nbytes for leaf in kernels)


def main() -> None:
    """Measures the folder that the flags name."""
    if not _LLM.value:
        raise UserError("needed: --llm=FOLDER, a Hugging Face folder of Mistral")
    rows = errors(_LLM.value, _WIDTH.value)
    for row in rows:
        print(
            f"{row['storage']:9} {row['bytes'] / 2**20:9.2f} MiB of kernels, error {row['error']:.2%}, "
            f"same token {row['same_token']:.2%} (as bfloat16 {row['as_bfloat16']:.2%}), loss {row['loss']:.4f}"
        )
    if _JSON.value:
        replace_file(_JSON.value, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    _LLM = flags.DEFINE_string("llm", None, "Hugging Face folder of Mistral")
    _WIDTH = flags.DEFINE_integer(
        "width", 0, "Width to which a small model is widened first; 0: its own width", lower_bound=0
    )
    _JSON = flags.DEFINE_string("json", None, "File for the rows")
    command_line.start(main)
