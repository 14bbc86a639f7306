"""Measures the error of a language model's narrow storage: python -m tools.quantization_error --llm=FOLDER [--json=F]

Reads summaries of held-out rendered clips with a Mistral in float32, and with its kernels in bfloat16, int8 and int4.
Prints the error of the scores over the vocabulary relative to float32, and the loss of the next token.
"""

import functools
import json
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
from favchat_jax.models.mistral import Mistral

CLIPS = 32  # whose summaries are read
LENGTH = 96  # tokens of each
STORED = {"bfloat16": "full", "int8": "int8", "int4": "int4"}


def errors(folder: str) -> list[dict[str, Any]]:
    """Returns a row for each storage: bytes of the kernels, relative error of the scores, loss of the next token."""
    tokenizer = load_tokenizer(folder)
    texts = [rendered_faces.render(0, "heldout", i).summary for i in range(CLIPS)]
    tokens = np.full((CLIPS, LENGTH), tokenizer.eos_token_id, np.int32)
    counted = np.zeros(tokens.shape, bool)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=True)[:LENGTH]
        tokens[row, : len(ids)], counted[row, : len(ids)] = ids, True
    config = mistral.read_config(folder)
    weights = {f"llm/{path}": jnp.asarray(x) for path, x in flatten_dict(mistral.read_weights(folder), sep="/").items()}

    @functools.partial(jax.jit, static_argnums=1)
    def read(weights, storage):
        params = {"params": unflatten_dict(weights, sep="/")["llm"]}
        scores = Mistral(config, storage=storage).apply(params, tokens, method="read")[:, :-1]
        log_shares = jax.nn.log_softmax(scores)
        next_token = jnp.take_along_axis(log_shares, tokens[:, 1:, None], axis=-1)[..., 0]
        return scores, -jnp.sum(next_token * counted[:, 1:]) / jnp.sum(counted[:, 1:])

    exact, loss = read(weights, "full")
    rows = [
        {"storage": "float32", "bytes": _kernel_bytes(weights), "error": 0.0, "same_token": 1.0, "loss": float(loss)}
    ]
    for name, storage in STORED.items():
        narrow = {p: x.astype(jnp.bfloat16) if p.endswith("kernel") else x for p, x in weights.items()}
        stored = narrow if storage == "full" else store(dict(weights), storage)
        scores, loss = read(stored, storage)
        off = jnp.linalg.norm(scores - exact) / jnp.linalg.norm(exact)
        same = jnp.mean(jnp.argmax(scores, -1) == jnp.argmax(exact, -1), where=counted[:, 1:])
        row = {"storage": name, "bytes": _kernel_bytes(stored), "error": float(off)}
        rows.append({**row, "same_token": float(same), "loss": float(loss)})
    return rows


def _kernel_bytes(weights: dict[str, jax.Array]) -> int:
    """Returns the bytes of the kernels in packed form, with two int4 values per byte."""
    kernels = [leaf for path, leaf in weights.items() if path.endswith(("kernel", "kernel_scale"))]
    return sum(leaf.size // 2 if leaf.dtype == jnp.int4 else leaf.nbytes for leaf in kernels)


def main() -> None:
    """Measures the folder that the flags name."""
    if not _LLM.value:
        raise UserError("needed: --llm=FOLDER, a Hugging Face folder of Mistral")
    rows = errors(_LLM.value)
    for row in rows:
        print(
            f"{row['storage']:9} {row['bytes'] / 2**20:9.2f} MiB of kernels, error {row['error']:.2%}, "
            f"same token {row['same_token']:.2%}, loss {row['loss']:.4f}"
        )
    if _JSON.value:
        replace_file(_JSON.value, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    _LLM = flags.DEFINE_string("llm", None, "Hugging Face folder of Mistral")
    _JSON = flags.DEFINE_string("json", None, "File for the rows")
    command_line.start(main)
