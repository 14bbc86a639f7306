"""Holds Mistral's decoding form: the equations of `mistral.Block`, with weights laid out for one token at a time.

A token takes as long as reading all weights once. Fewer, larger products read them faster, and so do products with the
kernel as first operand. Compared with the training form,

- layers are not stacked, since slicing stacked weights would copy each layer once per token;
- adapters are merged into full kernels; beside int8 and int4 kernels they stay separate, in the computation's dtype;
- kernels that share an input are concatenated (`JOINED`), and each is stored as [out, in];
- keys and values of earlier tokens are in a cache of static length.

`joined` converts the weights of a layer, `decoding_form` those of the language model.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from favchat_jax.models.cache import LayerCache, attend, empty_layer, places
from favchat_jax.models.kernels import quantized
from favchat_jax.models.kernels.linear import for_reading, transposed_product
from favchat_jax.models.kernels.low_rank import low_rank
from favchat_jax.models.lora import merged
from favchat_jax.models.mistral import LoRA, MistralConfig, RMSNorm, rotate
from favchat_jax.sharding import by_clip

# Layer here -> the layers of `mistral.Block` whose kernels it joins. Saves 6 % of 8 answers of the base preset on CPUs.
JOINED = {
    "qkv_proj": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "o_proj": ("self_attn/o_proj",),
    "gate_up_proj": ("mlp/gate_proj", "mlp/up_proj"),
    "down_proj": ("mlp/down_proj",),
}
Adapter = tuple[Float[Array, "D r"], Float[Array, "r _F"]]


def groups_of(config: MistralConfig, path: str) -> int:
    """Returns the number of groups that the outputs of the layer at a path are in.

    Each group has its share of every layer that is joined. There is one for each key/value head where possible, so that
    the mesh axis `tensor` can cut between groups.
    """
    heads, name = config.num_key_value_heads, path.rpartition("/")[2]
    return {"qkv_proj": heads, "gate_up_proj": math.gcd(heads, config.intermediate_size)}.get(name, 1)


def parted(y: Float[Array, "... F"], widths: Sequence[int], groups: int) -> list[Float[Array, "... _F"]]:
    """Splits the output of a joined layer into those of the layers that it joins."""
    grouped = y.reshape(*y.shape[:-1], groups, -1)
    ends = np.cumsum(widths)[:-1] // groups
    return [part.reshape(*y.shape[:-1], -1) for part in jnp.split(grouped, ends, axis=-1)]


class DecodingLinear(nn.Module):
    """A bias-free linear layer, whose kernel is stored as [out, in].

    Attributes:
        features: width of the output.
        rank: of the adapters beside the kernel, all together; 0 without any.
        dtype: dtype of the computation.
        storage: `full`, or int8 or int4 for a kernel that `quantized.quantize` has narrowed.
    """

    features: int
    rank: int
    dtype: DTypeLike
    storage: str

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        x = x.astype(self.dtype)
        kernel = self.param("transposed", nn.initializers.lecun_normal(), (self.features, x.shape[-1]))
        narrow = self.storage != "full" and not self.is_initializing()
        y = transposed_product(x, kernel, self.get_variable("params", "transposed_scale") if narrow else None)
        if not self.rank:
            return y
        lora_a = self.param("lora_a", nn.initializers.zeros, (x.shape[-1], self.rank))
        lora_b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        return y + low_rank(x, lora_a.astype(self.dtype), lora_b.astype(self.dtype))


class Part(nn.Module):
    """Base class of the language model and its layers.

    Attributes:
        config: sizes, from the folder's `config.json`.
        dtype: dtype of the computation.
        storage: width of the kernels, see `DecodingLinear`.
        lora: adapters; merged already if the storage is full.
    """

    config: MistralConfig
    dtype: DTypeLike = jnp.float32
    storage: str = "full"
    lora: LoRA = LoRA()

    def linear(self, layer: str, features: int, name: str | None = None) -> DecodingLinear:
        """Builds a layer of `JOINED`, or the output layer; `name` as for any module."""
        joins = [path.rpartition("/")[2] for path in JOINED.get(layer, (layer,))]
        adapted = sum(one in self.lora.targets for one in joins) if self.storage != "full" else 0
        return DecodingLinear(features, self.lora.rank * adapted, self.dtype, self.storage, name=name)


class DecodingBlock(Part):
    """One layer: attention, then SwiGLU, each with a residual."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        positions: Int[Array, "R L"],
        slots: Bool[Array, "R S"] | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "R L D"], LayerCache | None]:
        config = self.config
        norm = partial(RMSNorm, config.rms_norm_eps, self.dtype)

        def linear(name: str, widths: Sequence[int], x: Array) -> list[Array]:
            y = self.linear(name, sum(widths), name=name)(x)
            return parted(y, widths, groups_of(config, name))

        own, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        parts = linear("qkv_proj", (own, shared, shared), norm(name="input_layernorm")(x))
        query, key, value = (rearrange(part, "R L (A C) -> R L A C", C=config.head_dim) for part in parts)
        query, key = rotate(query, positions, config.rope_theta), rotate(key, positions, config.rope_theta)
        y, cache = attend(query, key, value, positions, slots, cache, window=config.sliding_window)
        (y,) = linear("o_proj", (config.hidden_size,), rearrange(y, "R L A C -> R L (A C)"))
        x = by_clip(x + y)

        normed = norm(name="post_attention_layernorm")(x)
        gate, up = linear("gate_up_proj", (config.intermediate_size,) * 2, normed)
        (y,) = linear("down_proj", (config.hidden_size,), nn.silu(gate) * up)
        return by_clip(x + y), cache


class DecodingMistral(Part):
    """The language model with the methods of `mistral.Mistral`, and `extend` for decoding."""

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size)
        fields = config, self.dtype, self.storage, self.lora
        self.layers = [DecodingBlock(*fields) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)
        self.lm_head = self.linear("lm_head", config.vocab_size)

    def embed(self, tokens: Int[Array, "... L"]) -> Float[Array, "... L D"]:
        """Returns word embeddings; those of ids outside the vocabulary are undefined, for the caller to replace."""
        return self.embed_tokens(jnp.clip(tokens, 0, self.config.vocab_size - 1)).astype(self.dtype)

    def logits(self, hidden: Float[Array, "... D"], deterministic: bool = True) -> Float[Array, "... V"]:
        """Returns scores over the vocabulary; without adapters there is no dropout."""
        return self.lm_head(hidden)

    def empty_cache(self, rows: int, length: int) -> list[LayerCache]:
        """Returns one zeroed cache per layer, for `rows` sequences of at most `length` tokens."""
        size = rows, self.config.num_key_value_heads, self.config.head_dim, length
        return [empty_layer(*size, self.dtype) for _ in range(self.config.num_hidden_layers)]

    def __call__(self, embeddings: Float[Array, "R L D"], deterministic: bool = True) -> Float[Array, "R L D"]:
        """Returns the final hidden states of complete sequences; without adapters there is no dropout."""
        return self._run(embeddings, [None] * len(self.layers), None)[0]

    def extend(
        self, embeddings: Float[Array, "R L D"], cache: list[LayerCache], positions: Int[Array, "R L"] | None = None
    ) -> tuple[Float[Array, "R L D"], list[LayerCache]]:
        """Extends sequences; returns their final hidden states, and the cache with these tokens in it.

        Args:
            embeddings: one token of each sequence, or the first several tokens of all.
            cache: one per layer.
            positions: of the tokens, and their slots; 0, 1, ... by default.
        """
        return self._run(embeddings, cache, positions)

    def _run(self, embeddings, cache, positions):
        positions, slots = places(embeddings, positions, cache[0], self.config.sliding_window)
        x, caches = by_clip(embeddings.astype(self.dtype)), []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = layer(x, positions, slots, layer_cache)
            caches.append(layer_cache)
        return self.norm(x), caches


@partial(jax.jit, static_argnames=("alpha", "storage", "dtype"))
def joined(
    kernels: Sequence[Float[Array, "groups _F D"]],
    adapters: Sequence[Adapter | None],
    *,
    alpha: float,
    storage: str = "full",
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Array]:
    """Joins linear layers that share an input into the weights of one `DecodingLinear`.

    Args:
        kernels: as [out, in], with the outputs in groups (`groups_of`).
        adapters: A and B of each layer, or None.
        alpha: of the adapters. It becomes a part of the weights.
        storage: width of the result.
        dtype: of a full kernel and of the adapters in the result.
    """

    def flat(parts: Sequence[Float[Array, "groups _F D"]]) -> Float[Array, "F D"]:
        return jnp.concatenate(parts, axis=1).reshape(-1, parts[0].shape[-1])

    def grouped(b: Float[Array, "r _F"]) -> Float[Array, "groups _F r"]:
        return b.T.reshape(kernels[0].shape[0], -1, b.shape[0])

    if storage == "full":
        pairs = zip(kernels, adapters, strict=True)
        full = [merged(kernel, grouped(of[1]), of[0].T, alpha) if of else kernel for kernel, of in pairs]
        return {"transposed": for_reading(flat(full).astype(dtype))}
    integers, scale = quantized.quantize(flat(kernels), storage, axis=-1)
    leaves = {"transposed": integers, "transposed_scale": scale}
    if not any(adapters):
        return leaves
    blocks = []  # rows of a block-diagonal B: each adapter writes the outputs of its layer alone
    for number, (_, b) in ((number, of) for number, of in enumerate(adapters) if of):
        empty = [jnp.zeros((*kernel.shape[:2], b.shape[0]), jnp.float32) for kernel in kernels]
        empty[number] = (alpha / b.shape[0]) * grouped(b.astype(jnp.float32))
        blocks.append(flat(empty).T)
    a = jnp.concatenate([of[0] for of in adapters if of], axis=-1)
    return {**leaves, "lora_a": a.astype(dtype), "lora_b": jnp.concatenate(blocks).astype(dtype)}


def decoding_form(
    llm: Mapping[str, Any], config: MistralConfig, alpha: float, storage: str = "full", dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Converts `Mistral`'s weights, with or without adapters, to `DecodingMistral`'s.

    Layers are converted one after another, so that only one of them needs memory beside the given weights and the
    result.

    Args:
        llm: `Mistral`'s tree.
        config: sizes.
        alpha: of the adapters.
        storage: width of the result's kernels.
        dtype: of full kernels and of adapters in the result.
    """

    def converted(name: str, layers: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        adapters = [(layer["lora_a"], layer["lora_b"]) if "lora_a" in layer else None for layer in layers]
        transposed = [layer["kernel"].T for layer in layers]
        kernels = [kernel.reshape(groups_of(config, name), -1, kernel.shape[-1]) for kernel in transposed]
        return joined(kernels, adapters, alpha=alpha, storage=storage, dtype=dtype)

    tree = {name: llm[name] for name in ("embed_tokens", "norm")}
    tree["lm_head"] = converted("lm_head", [llm["lm_head"]])
    for i in range(config.num_hidden_layers):
        layer = _layer(llm["layers"], i)
        tree[f"layers_{i}"] = {name: layer[name] for name in ("input_layernorm", "post_attention_layernorm")}
        for name, paths in JOINED.items():
            parts = [layer[part][linear] for part, linear in (path.split("/") for path in paths)]
            tree[f"layers_{i}"][name] = converted(name, parts)
    return tree


@jax.jit  # one program serves all layers
def _layer(layers: Mapping[str, Any], i: Int[Array, ""] | int) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[i], dict(layers))
