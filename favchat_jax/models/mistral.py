"""Mistral: the language model, every size read from a Hugging Face folder's `config.json`.

Grouped-query attention with rotary positions, SwiGLU, RMSNorm, optional sliding window (Jiang et al. 2023), LoRA on any
of its linear layers. Training scans one stacked block over the layers; decoding runs unstacked layers with a key/value
cache of static length, because slicing stacked weights would copy every layer once per token, and reads the kernels
that share an input as one where the weights hold them as one (`convert.stacking.for_decoding`).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from favchat_jax.errors import UserError
from favchat_jax.models.kernels.attention import attention, one_more
from favchat_jax.models.kernels.remat import remat
from favchat_jax.models.lora import LoRADense
from favchat_jax.sharding import by_clip


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Where adapters sit and how large they are; `rank=0` means none. Names of targets are PEFT's."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@dataclasses.dataclass(frozen=True)
class MistralConfig:
    """The fields of `config.json` that shape the computation, under their published names.

    The defaults are those of Mistral-7B-Instruct-v0.2.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    sliding_window: int | None = None
    max_position_embeddings: int = 32768

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "MistralConfig":
        """Reads a Hugging Face configuration; raises UserError where it asks for what is not Mistral."""
        if config.get("model_type") != "mistral":
            raise UserError(f"model_type is {config.get('model_type')!r}: llm.path must name a Mistral folder")
        if config.get("tie_word_embeddings"):
            raise UserError("tie_word_embeddings is set: Mistral's input and output embeddings are separate")
        # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or {}
        kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type", "default")
        if kind != "default":
            raise UserError(f"rope type {kind!r} is not supported: Mistral uses plain rotary positions")
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
            sliding_window=config.get("sliding_window"),
            max_position_embeddings=config["max_position_embeddings"],
        )


@struct.dataclass
class LayerCache:
    """Keys and values of one layer, slot s holding position s. S is static.

    Each lies as the product of a token's queries with it reads it: nothing is transposed for a token.
    """

    keys: Float[Array, "B K H S"]
    values: Float[Array, "B K S H"]


def empty_cache(config: MistralConfig, batch: int, length: int, dtype=jnp.float32) -> list[LayerCache]:
    """One zeroed cache a layer, for `batch` sequences of at most `length` tokens."""
    rows = (batch, config.num_key_value_heads)
    keys, values = (*rows, config.head_dim, length), (*rows, length, config.head_dim)
    return [LayerCache(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(config.num_hidden_layers)]


def rotate(x: Float[Array, "B L N H"], positions: Int[Array, "B L"], theta: float) -> Float[Array, "B L N H"]:
    """Rotary positions: the pair (x_i, x_{i + H/2}) turns by position * theta^(-2i / H), computed in float32."""
    frequencies = theta ** -(jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, the root mean square in float32."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (scale * normed).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions and an optional cache."""

    config: MistralConfig
    lora: LoRA
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, positions, mask, cache, deterministic):
        config = self.config

        def project(name, features, value):
            return adapted(name, features, self.lora, self.dtype, name)(value, deterministic)

        own, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        if self.has_variable("params", "qkv_proj"):
            query, key, value = jnp.split(project("qkv_proj", own + 2 * shared, x), (own, own + shared), axis=-1)
        else:
            query, key, value = project("q_proj", own, x), project("k_proj", shared, x), project("v_proj", shared, x)
        query, key, value = (rearrange(t, "B L (N H) -> B L N H", H=config.head_dim) for t in (query, key, value))
        query, key = rotate(query, positions, config.rope_theta), rotate(key, positions, config.rope_theta)
        if cache is not None:
            keys = _write(cache.keys, rearrange(key, "B L K H -> B K H L"), positions, axis=1)
            cache = LayerCache(keys, _write(cache.values, rearrange(value, "B L K H -> B K L H"), positions, axis=0))
        if cache is None or value.shape[1] > 1:
            y = attention(query, key, value, mask=mask, causal=True, window=config.sliding_window)
        else:
            y = one_more(query, cache.keys, cache.values, mask)
        return project("o_proj", config.hidden_size, rearrange(y, "B L N H -> B L (N H)")), cache


class Block(nn.Module):
    """One pre-norm layer: attention, then SwiGLU, each with a residual."""

    config: MistralConfig
    lora: LoRA
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, positions, mask, cache, deterministic):
        config = self.config
        normed = RMSNorm(config.rms_norm_eps, self.dtype, name="input_layernorm")(x)
        attended, cache = Attention(config, self.lora, self.dtype, name="self_attn")(
            normed, positions, mask, cache, deterministic
        )
        x = by_clip(x + attended)
        normed = RMSNorm(config.rms_norm_eps, self.dtype, name="post_attention_layernorm")(x)
        return by_clip(x + MLP(config, self.lora, self.dtype, name="mlp")(normed, deterministic)), cache


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: MistralConfig
    lora: LoRA
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, deterministic):
        def project(name, features, value):
            return adapted(name, features, self.lora, self.dtype, name)(value, deterministic)

        width = self.config.intermediate_size
        if self.has_variable("params", "gate_up_proj"):
            gate, up = jnp.split(project("gate_up_proj", 2 * width, x), 2, axis=-1)
        else:
            gate, up = project("gate_proj", width, x), project("up_proj", width, x)
        return project("down_proj", self.config.hidden_size, nn.silu(gate) * up)


class Mistral(nn.Module):
    """The language model from embeddings to final hidden states; `logits` is apart so that a loss can go in chunks.

    Attributes:
        config: sizes, from the folder's `config.json`.
        lora: adapters; their weights sit beside the kernels as `lora_a`, `lora_b`.
        dtype: dtype of the computation.
        scan: one stacked block over the layers (training), or layers apart (decoding).
        remat: what a layer keeps for the backward pass (`remat.POLICIES`; with `scan`).
    """

    config: MistralConfig
    lora: LoRA = LoRA()
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: str = ""

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(
            config.vocab_size, config.hidden_size, embedding_init=nn.initializers.normal(config.hidden_size**-0.5)
        )
        if self.scan:
            block = remat(Block, self.remat, prevent_cse=False, static_argnums=(5,))
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=config.num_hidden_layers,
            )(config, self.lora, self.dtype)
        else:
            self.layers = [Block(config, self.lora, self.dtype) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)
        self.lm_head = adapted("lm_head", config.vocab_size, self.lora, self.dtype)

    def embed(self, tokens: Int[Array, "... L"]) -> Float[Array, "... L D"]:
        """Word embeddings; ids outside the vocabulary read its nearest row and must be overwritten by the caller."""
        return self.embed_tokens(jnp.clip(tokens, 0, self.config.vocab_size - 1)).astype(self.dtype)

    def logits(self, hidden: Float[Array, "... D"], deterministic: bool = True) -> Float[Array, "... V"]:
        """Scores over the vocabulary."""
        return self.lm_head(hidden, deterministic)

    def __call__(
        self,
        embeddings: Float[Array, "B L D"],
        *,
        positions: Int[Array, "B L"] | None = None,
        valid: Bool[Array, "B L"] | None = None,
        cache: list[LayerCache] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B L D"], list[LayerCache] | None]:
        """Final hidden states, and the caches with these tokens written into them.

        Args:
            embeddings: embedded tokens, visual ones included.
            positions: position of each token; 0, 1, ... by default. With a cache they are also the slots written,
                consecutive from the first one on.
            valid: False at padding, which nothing reads (without a cache only). Padding on the right needs none:
                causality hides it.
            cache: one a layer (with `scan=False` only). A single token reads the tokens before it there; several are
                the beginning of their sequence.
            deterministic: no dropout.
        """
        batch, length, _ = embeddings.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        # Tokens lie in the order of their positions, so that causality needs no mask.
        mask = None if valid is None else valid[:, None, None, :]
        if cache is not None:
            mask = readable(positions, cache[0].values.shape[2], self.config.sliding_window) if length == 1 else None
        x = by_clip(embeddings.astype(self.dtype))
        if self.scan:
            if cache is not None:
                raise ValueError("a cache needs scan=False")
            x, _ = self.layers(x, positions, mask, None, deterministic)
        else:
            caches = []
            for layer, layer_cache in zip(self.layers, cache or [None] * len(self.layers), strict=True):
                x, layer_cache = layer(x, positions, mask, layer_cache, deterministic)
                caches.append(layer_cache)
            cache = caches if cache is not None else None
        return self.norm(x), cache


def adapted(target: str, features: int, lora: LoRA, dtype: jnp.dtype, name: str | None = None) -> LoRADense:
    """A linear layer, with an adapter where `lora` names it as a target."""
    rank = lora.rank if target in lora.targets else 0
    return LoRADense(features, rank, lora.alpha, lora.dropout, dtype, name=name)


def readable(positions: Int[Array, "B L"], slots: int, window: int | None) -> Bool[Array, "B S"]:
    """True at the slots of a cache that a token at each row's first position may read: its own, and those before it
    that are in the window."""
    distance = positions[:, :1] - jnp.arange(slots)
    return (distance >= 0) & (distance < (window or slots))


def _write(cache: Float[Array, "B K ..."], new: Float[Array, "B K ..."], positions: Int[Array, "B L"], axis: int):
    """Writes each row's new entries into its slots, which are along a head's `axis`, from positions[row, 0] on.

    Head by head: on a CPU, XLA would do the write of a whole row a second time for what reads it, into a copy.
    """
    rows, heads = cache.shape[:2]
    flat, new = (x.reshape(rows * heads, *x.shape[2:]) for x in (cache, new.astype(cache.dtype)))
    update = jax.vmap(lambda row, entries, first: jax.lax.dynamic_update_slice_in_dim(row, entries, first, axis))
    return update(flat, new, jnp.repeat(positions[:, 0], heads)).reshape(cache.shape)
