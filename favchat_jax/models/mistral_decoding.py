"""Holds Mistral's decoding form: the equations of `mistral.Block`, with weights laid out for one token at a time.

A token takes as long as reading all weights once. Fewer, larger products read them faster, and so do products with the
kernel as first operand. Compared with the training form,

- layers are not stacked, since slicing stacked weights would copy each layer once per token;
- adapters are merged into the kernels;
- kernels that share an input are concatenated (`qkv_proj`, `gate_up_proj`), and each is stored as [out, in];
- keys and values of earlier tokens are in a cache of static length.

`decoding_form` converts the training form's weights.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from favchat_jax.models.kernels.attention import attention, attention_to_cache
from favchat_jax.models.kernels.linear import TransposedLinear
from favchat_jax.models.lora import merge
from favchat_jax.models.mistral import MistralConfig, RMSNorm, rotate
from favchat_jax.sharding import by_clip


class LayerCache(NamedTuple):
    """Keys and values of one layer, with position s in slot s; S is static.

    They are stored in the layout in which one token's products read them, so that nothing is transposed.
    """

    keys: Float[Array, "R K C S"]
    values: Float[Array, "R K S C"]

    def written(
        self, keys: Float[Array, "R L K C"], values: Float[Array, "R L K C"], first: Int[Array, " R"]
    ) -> "LayerCache":
        """Returns the cache with L more tokens in each row, from slot `first` on."""

        def write(cache: Array, new: Array, axis: int) -> Array:
            update = partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
            return jax.vmap(update)(cache, new.astype(cache.dtype), first)

        return LayerCache(
            write(self.keys, rearrange(keys, "R L K C -> R K C L"), 2),
            write(self.values, rearrange(values, "R L K C -> R K L C"), 1),
        )


def empty_cache(config: MistralConfig, rows: int, length: int, dtype: DTypeLike = jnp.float32) -> list[LayerCache]:
    """Returns one zeroed cache per layer, for `rows` sequences of at most `length` tokens."""
    keys = (rows, config.num_key_value_heads, config.head_dim, length)
    values = (rows, config.num_key_value_heads, length, config.head_dim)
    return [LayerCache(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(config.num_hidden_layers)]


class DecodingBlock(nn.Module):
    """One layer; fields are those of `DecodingMistral`."""

    config: MistralConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        positions: Int[Array, "R L"],
        mask: Bool[Array, "R S"] | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "R L D"], LayerCache | None]:
        config = self.config
        linear = partial(TransposedLinear, dtype=self.dtype)
        norm = partial(RMSNorm, config.rms_norm_eps, self.dtype)
        own, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

        qkv = linear(own + 2 * shared, name="qkv_proj")(norm(name="input_layernorm")(x))
        query, key, value = (
            rearrange(part, "R L (A C) -> R L A C", C=config.head_dim)
            for part in jnp.split(qkv, (own, own + shared), axis=-1)
        )
        query, key = rotate(query, positions, config.rope_theta), rotate(key, positions, config.rope_theta)
        if cache is not None:
            cache = cache.written(key, value, positions[:, 0])
        if cache is None or mask is None:  # a complete sequence, or its first tokens
            y = attention(query, key, value, causal=True, window=config.sliding_window)
        else:
            y = attention_to_cache(query, cache.keys, cache.values, mask)
        x = by_clip(x + linear(config.hidden_size, name="o_proj")(rearrange(y, "R L A C -> R L (A C)")))

        gate_up = linear(2 * config.intermediate_size, name="gate_up_proj")(norm(name="post_attention_layernorm")(x))
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return by_clip(x + linear(config.hidden_size, name="down_proj")(nn.silu(gate) * up)), cache


class DecodingMistral(nn.Module):
    """The language model with the methods of `mistral.Mistral`, and `extend` for decoding.

    Attributes:
        config: sizes, from the folder's `config.json`.
        dtype: dtype of the computation.
    """

    config: MistralConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size)
        self.layers = [DecodingBlock(config, self.dtype) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)
        self.lm_head = TransposedLinear(config.vocab_size, self.dtype)

    def embed(self, tokens: Int[Array, "... L"]) -> Float[Array, "... L D"]:
        """Returns word embeddings; those of ids outside the vocabulary are undefined, for the caller to replace."""
        return self.embed_tokens(jnp.clip(tokens, 0, self.config.vocab_size - 1)).astype(self.dtype)

    def logits(self, hidden: Float[Array, "... D"], deterministic: bool = True) -> Float[Array, "... V"]:
        """Returns scores over the vocabulary; without adapters there is no dropout."""
        return self.lm_head(hidden)

    def __call__(self, embeddings: Float[Array, "R L D"], deterministic: bool = True) -> Float[Array, "R L D"]:
        """Returns the final hidden states of complete sequences; without adapters there is no dropout."""
        return self._run(embeddings, [None] * len(self.layers))[0]

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

    def _run(self, embeddings, cache, positions=None):
        length, mask = embeddings.shape[1], None
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), embeddings.shape[:2])
        if length == 1 and cache[0] is not None:
            mask = readable(positions[:, 0], cache[0].values.shape[2], self.config.sliding_window)
        x, caches = by_clip(embeddings.astype(self.dtype)), []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = layer(x, positions, mask, layer_cache)
            caches.append(layer_cache)
        return self.norm(x), caches


def readable(position: Int[Array, " R"], slots: int, window: int | None) -> Bool[Array, "R S"]:
    """Returns True at the slots that a token at each row's position reads: its own, and earlier ones in the window."""
    distance = position[:, None] - jnp.arange(slots)
    return (distance >= 0) & (distance < (window or slots))


def decoding_form(llm: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Converts `Mistral`'s weights, with or without adapters, to `DecodingMistral`'s.

    Layers are converted one after another, so that only one of them needs memory beside the given weights and the
    result.

    Args:
        llm: `Mistral`'s tree.
        alpha: of the adapters.
    """
    tree = {name: llm[name] for name in ("embed_tokens", "norm")}
    tree["lm_head"] = _decoding_head(llm["lm_head"], alpha)
    for i in range(jax.tree.leaves(llm["layers"])[0].shape[0]):
        tree[f"layers_{i}"] = _decoding_layer(llm["layers"], i, alpha)
    return tree


# One program serves all layers; operation by operation, each shape would compile on its own.
@partial(jax.jit, static_argnames="alpha")
def _decoding_layer(layers: Mapping[str, Any], i: Int[Array, ""] | int, alpha: float) -> dict[str, Any]:
    layer = merge(jax.tree.map(lambda leaf: leaf[i], dict(layers)), alpha)
    attn, mlp = layer["self_attn"], layer["mlp"]
    return {
        "input_layernorm": layer["input_layernorm"],
        "qkv_proj": joined(attn["q_proj"], attn["k_proj"], attn["v_proj"]),
        "o_proj": joined(attn["o_proj"]),
        "post_attention_layernorm": layer["post_attention_layernorm"],
        "gate_up_proj": joined(mlp["gate_proj"], mlp["up_proj"]),
        "down_proj": joined(mlp["down_proj"]),
    }


@partial(jax.jit, static_argnames="alpha")
def _decoding_head(head: Mapping[str, Any], alpha: float) -> dict[str, Array]:
    return joined(merge(dict(head), alpha))


def joined(*linears: Mapping[str, Array]) -> dict[str, Array]:
    """Joins linear layers that share an input into the weights of one `TransposedLinear`.

    Saves 6 % of 8 answers of the base preset on a CPU.
    """
    return {"transposed": jnp.concatenate([linear["kernel"] for linear in linears], axis=-1).T}
