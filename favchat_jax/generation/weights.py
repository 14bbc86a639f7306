"""Lays out the weights of a model for answering: from a run, or from weights in the training form.

Weights of a run stream tensor by tensor from the language model's folder into their final form, each straight onto its
shards. Neither the host nor a device ever holds a second copy of the language model.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from favchat_jax import sharding
from favchat_jax.checkpoints.mistral_folder import open_weights
from favchat_jax.checkpoints.run import Run
from favchat_jax.checkpoints.table import finite
from favchat_jax.config import Config
from favchat_jax.models.mistral import MistralConfig
from favchat_jax.models.mistral_decoding import JOINED, decoding_form, groups_of, joined
from favchat_jax.stages import group_of

NORMS = ("input_layernorm", "post_attention_layernorm")


def from_training(
    weights: Mapping[str, Any], config: Config, llm: MistralConfig, storage: str = "full", mesh: Mesh | None = None
) -> dict[str, Array]:
    """Converts all weights of the model, flat and in the training form, to the decoding form.

    Args:
        weights: of the model.
        config: of the stage.
        llm: sizes of the language model.
        storage: width of its kernels. Adapters are merged into full ones.
        mesh: devices that hold the weights, if there are several.
    """
    tree = unflatten_dict(dict(weights), sep="/")
    form = decoding_form(tree["llm"], llm, config.model.lora.alpha, storage, jnp.dtype(config.model.dtype))
    flat = flatten_dict({**tree, "llm": form}, sep="/")
    if mesh is None or mesh.size == 1:
        return flat
    return jax.jit(lambda leaves: leaves, out_shardings=sharding.partitions(flat, mesh))(flat)


def from_run(run: Run, mesh: Mesh | None = None, storage: str = "full") -> dict[str, Array]:
    """Loads the weights of a run in the decoding form, matrices in the dtype of the computation.

    Args:
        run: the run. Its weights move out of it one by one, so that memory does not hold them twice.
        mesh: devices that hold the weights; by default the first one.
        storage: width of the language model's kernels. Adapters are merged into full kernels.

    Raises:
        UserError: a weight of the language model is missing or damaged, or has another shape.
    """
    mesh, dtype = mesh or sharding.one_device(), jnp.dtype(run.config.model.dtype)
    adapters = {path: run.weights.pop(path) for path in list(run.weights) if group_of(path) == "lora"}
    language_model = _LanguageModel(run, adapters, mesh, storage)
    weights: dict[str, Array] = {}
    while run.weights:
        path, leaf = run.weights.popitem()
        weights[path] = sharding.place(path, leaf, mesh, dtype if leaf.ndim > 1 else leaf.dtype)
    for path, leaf in language_model.each():
        weights[f"llm/{path}"] = leaf
    return weights


def size_of(shapes: Mapping[str, Any], config: Config, storage: str = "full") -> int:
    """Returns the bytes of a model's weights in the decoding form, without the scales of narrow kernels.

    Args:
        shapes: path -> shape of each weight in the training form.
        config: of the stage.
        storage: width of the language model's kernels.
    """
    width = jnp.dtype(config.model.dtype).itemsize
    narrow = {"full": width, "int8": 1, "int4": 0.5}[storage]
    size = 0.0
    for path, leaf in shapes.items():
        is_kernel = path.startswith("llm/") and path.endswith("/kernel")
        size += math.prod(leaf.shape) * (narrow if is_kernel else width)
    return int(size)


class _LanguageModel:
    """Reads the language model of a run into its decoding form; the arguments are those of `from_run`, and adapters."""

    def __init__(self, run: Run, adapters: Mapping[str, Any], mesh: Mesh, storage: str):
        config, self._llm = run.config, run.parts.llm
        self._tensors = open_weights(config.llm.path, run.parts.base_shapes)
        self._adapters, self._mesh, self._folder = adapters, mesh, config.llm.path
        self._dtype = jnp.dtype(config.model.dtype)
        self._join = functools.partial(joined, alpha=config.model.lora.alpha, storage=storage, dtype=self._dtype)
        self._read: list[tuple[Bool[Array, ""], list[tuple]]] = []  # whether some weights are finite

    def each(self) -> Iterator[tuple[str, Array]]:
        """Yields path and weight; raises UserError for one that is NaN or infinite."""
        yield from self._alone("embed_tokens/embedding", ("embed_tokens/embedding",))
        for i in range(self._llm.num_hidden_layers):
            for norm in NORMS:
                yield from self._alone(f"layers_{i}/{norm}/scale", (f"layers/{norm}/scale", i))
            for name, layers in JOINED.items():
                yield from self._linear(f"layers_{i}/{name}", [(f"layers/{layer}", i) for layer in layers])
        yield from self._alone("norm/scale", ("norm/scale",))
        yield from self._linear("lm_head", [("lm_head",)])
        for is_finite, of in self._read:
            if not is_finite:
                for key in of:
                    name, tensor = self._tensors[key]
                    finite(tensor, name, self._folder)

    def _alone(self, path: str, key: tuple) -> Iterator[tuple[str, Array]]:
        """Yields a weight that has the published layout; `key` finds it in the folder."""
        weight = np.asarray(self._tensors[key][1])
        dtype = self._dtype if weight.ndim > 1 else np.dtype(np.float32)
        yield from self._checked({path: sharding.place(f"llm/{path}", weight, self._mesh, dtype)}, [key])

    def _linear(self, path: str, layers: Sequence[tuple]) -> Iterator[tuple[str, Array]]:
        """Yields the weights of a linear layer that joins some layers; their paths and places find them."""
        groups, kernels, adapters, keys = groups_of(self._llm, path), [], [], []
        for layer, *place in layers:
            keys.append((f"{layer}/kernel", *place))
            kernel = np.asarray(self._tensors[keys[-1]][1])
            kernel = kernel.reshape(groups, -1, kernel.shape[-1])
            part = "joins" if len(layers) > 1 else "transposed"
            kernels.append(sharding.place(f"llm/{path}/{part}", kernel, self._mesh, kernel.dtype))
            halves = [self._adapters.get(f"llm/{layer}/{half}") for half in ("lora_a", "lora_b")]
            adapters.append(None if halves[0] is None else tuple(np.asarray(half)[*place] for half in halves))
        leaves = {f"{path}/{name}": leaf for name, leaf in self._join(kernels, adapters).items()}
        shards = {to: sharding.partition(f"llm/{to}", leaf.shape, self._mesh) for to, leaf in leaves.items()}
        yield from self._checked(jax.device_put(leaves, shards), keys)

    def _checked(self, leaves: dict[str, Array], keys: list[tuple]) -> Iterator[tuple[str, Array]]:
        self._read.append((_are_finite(list(leaves.values())), keys))
        # The next weights are read while the device works on these, but no others, so that little memory is in use.
        if len(self._read) > 1:
            self._read[-2][0].block_until_ready()
        yield from leaves.items()


@jax.jit
def _are_finite(leaves: Sequence[Array]) -> Bool[Array, ""]:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]))
