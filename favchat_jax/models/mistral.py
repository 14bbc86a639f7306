"""Holds Mistral, the language model, whose sizes are read from a Hugging Face folder's `config.json`.

It has grouped-query attention with rotary positions, SwiGLU, RMSNorm, an optional sliding window (Jiang et al. 2023),
and LoRA on any of its linear layers.
"""

import dataclasses
from types import UnionType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from favchat_jax.errors import UserError
from favchat_jax.models.cache import LayerCache, attend, empty_layer, places
from favchat_jax.models.kernels.scan import scan_stacked
from favchat_jax.models.lora import LoRADense
from favchat_jax.sharding import by_clip

Hidden = Float[Array, "R L D"]  # hidden states
Positions = Int[Array, "R L"]
KeyMask = Bool[Array, "R 1 1 L"]  # False at padding
Cached = tuple[Bool[Array, "R S"] | None, LayerCache | None]  # slots to read, and a layer's cache
REFETCH = "fetch the folder again"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)  # whole numbers of `config.json`


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The rank, scale, dropout and target layers of the adapters; `rank=0` means none. Targets have PEFT's names."""

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
        """Reads a Hugging Face configuration.

        Raises:
            UserError: another model's configuration, or a field with a value that no Mistral has.
            KeyError, TypeError, ZeroDivisionError: a field is missing or of the wrong type.
        """
        if config.get("model_type") != "mistral":
            raise UserError(f"model_type is {config.get('model_type')!r}: llm.path must name a Mistral folder")
        if config.get("quantization_config"):
            method = dict(config["quantization_config"]).get("quant_method", "some method")
            raise UserError(
                f"quantization_config is set: these weights are quantised already ({method}). Name the folder of the "
                "full ones, which --storage (answers) and llm.storage (training) narrow"
            )
        if config.get("tie_word_embeddings"):
            raise UserError("tie_word_embeddings is set: Mistral's input and output embeddings are separate")
        # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or {}
        kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type", "default")
        if kind != "default":
            raise UserError(f"rope type {kind!r} is not supported: Mistral uses plain rotary positions")
        sizes = {name: config[name] for name in SIZES}
        sizes["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for name, value in sizes.items():
            if not _is_number(value, int):
                raise UserError(f"{name} is {value!r}, not a positive whole number: {REFETCH}")
        theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
        scalars = {"rms_norm_eps": config["rms_norm_eps"], "rope_theta": theta}
        for name, value in scalars.items():
            if not _is_number(value, int | float):
                raise UserError(f"{name} is {value!r}, not a positive number: {REFETCH}")
        window = config.get("sliding_window")
        if window is not None and not _is_number(window, int):
            raise UserError(f"sliding_window is {window!r}, neither null nor a positive whole number: {REFETCH}")
        return cls(**sizes, **scalars, sliding_window=window)


def _is_number(value: object, kind: type | UnionType) -> bool:
    positive = isinstance(value, int | float) and 0 < value < float("inf")
    return positive and isinstance(value, kind) and not isinstance(value, bool)


def rotate(x: Float[Array, "R L A C"], positions: Int[Array, "R L"], theta: float) -> Float[Array, "R L A C"]:
    """Rotates each pair (x_i, x_{i + C/2}) by position * theta^(-2i / C) (rotary positions), computed in float32."""
    frequencies = theta ** -(jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """The norm x / rms(x) * scale, with the root mean square in float32."""

    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (scale * normed).astype(self.dtype)


class Part(nn.Module):
    """Base class of the language model and its parts.

    Attributes:
        config: sizes, from the folder's `config.json`.
        lora: adapters, whose weights are stored beside the kernels as `lora_a`, `lora_b`.
        dtype: dtype of the computation.
        storage: width of the frozen kernels: `full`, int8 or int4 (`quantized.store`).
    """

    config: MistralConfig
    lora: LoRA = LoRA()
    dtype: DTypeLike = jnp.float32
    storage: str = "full"

    def linear(self, target: str, features: int) -> LoRADense:
        """Builds the linear layer of this name, with an adapter where `lora` targets it."""
        rank = self.lora.rank if target in self.lora.targets else 0
        return LoRADense(features, rank, self.lora.alpha, self.lora.dropout, self.dtype, self.storage)


class Attention(Part):
    """Causal grouped-query self-attention with rotary positions and an optional sliding window."""

    def setup(self):
        config, width = self.config, self.config.head_dim
        self.q_proj = self.linear("q_proj", config.num_attention_heads * width)
        self.k_proj = self.linear("k_proj", config.num_key_value_heads * width)
        self.v_proj = self.linear("v_proj", config.num_key_value_heads * width)
        self.o_proj = self.linear("o_proj", config.hidden_size)

    def __call__(
        self, x: Hidden, positions: Positions, mask: KeyMask | None, deterministic: bool, cached: Cached
    ) -> tuple[Hidden, LayerCache | None]:
        projected = (layer(x, deterministic) for layer in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (rearrange(y, "R L (A C) -> R L A C", C=self.config.head_dim) for y in projected)
        query, key = (rotate(y, positions, self.config.rope_theta) for y in (query, key))
        window = self.config.sliding_window
        y, cache = attend(query, key, value, positions, *cached, mask=mask, window=window)
        return self.o_proj(rearrange(y, "R L A C -> R L (A C)"), deterministic), cache


class MLP(Part):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def setup(self):
        self.gate_proj = self.linear("gate_proj", self.config.intermediate_size)
        self.up_proj = self.linear("up_proj", self.config.intermediate_size)
        self.down_proj = self.linear("down_proj", self.config.hidden_size)

    def __call__(self, x: Float[Array, "R L D"], deterministic: bool) -> Float[Array, "R L D"]:
        return self.down_proj(nn.silu(self.gate_proj(x, deterministic)) * self.up_proj(x, deterministic), deterministic)


class Block(Part):
    """One pre-norm layer: attention, then SwiGLU, each with a residual; and its cache, if there is one."""

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        positions: Positions,
        mask: KeyMask | None,
        deterministic: bool,
        cached: Cached = (None, None),
    ) -> tuple[Hidden, LayerCache | None]:
        fields = self.config, self.lora, self.dtype, self.storage
        normed = RMSNorm(self.config.rms_norm_eps, self.dtype, name="input_layernorm")(x)
        attended, cache = Attention(*fields, name="self_attn")(normed, positions, mask, deterministic, cached)
        x = by_clip(x + attended)
        normed = RMSNorm(self.config.rms_norm_eps, self.dtype, name="post_attention_layernorm")(x)
        return by_clip(x + MLP(*fields, name="mlp")(normed, deterministic)), cache


class Mistral(Part):
    """The language model from embeddings to final hidden states; `logits` is separate so that a loss can run in chunks.

    Its layers' weights are stacked along a first axis. `mistral_decoding.DecodingMistral` is the form that writes
    answers fastest; `extend` writes them with the weights that are trained, so that memory holds no other form of them.

    Attributes:
        remat: activations that a layer keeps for the backward pass (`remat.POLICIES`).
    """

    remat: str = ""

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(
            config.vocab_size, config.hidden_size, embedding_init=nn.initializers.normal(config.hidden_size**-0.5)
        )
        self.layers = Block(config, self.lora, self.dtype, self.storage)
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)
        self.lm_head = self.linear("lm_head", config.vocab_size)

    def embed(self, tokens: Int[Array, "... L"]) -> Float[Array, "... L D"]:
        """Returns word embeddings; those of ids outside the vocabulary are undefined, for the caller to replace."""
        return self.embed_tokens(jnp.clip(tokens, 0, self.config.vocab_size - 1)).astype(self.dtype)

    def logits(self, hidden: Float[Array, "... D"], deterministic: bool = True) -> Float[Array, "... V"]:
        """Returns scores over the vocabulary."""
        return self.lm_head(hidden, deterministic)

    def __call__(
        self,
        embeddings: Float[Array, "R L D"],
        *,
        positions: Int[Array, "R L"] | None = None,
        valid: Bool[Array, "R L"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "R L D"]:
        """Returns the final hidden states.

        Args:
            embeddings: embedded tokens, visual ones included.
            positions: position of each token; 0, 1, ... by default.
            valid: False at padding, which no token reads. Padding on the right needs no mask: causality hides it.
            deterministic: no dropout.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(embeddings.shape[1]), embeddings.shape[:2])
        mask = None if valid is None else valid[:, None, None, :]

        def step(block: Block, x: Float[Array, "R L D"]) -> Float[Array, "R L D"]:
            return block(x, positions, mask, deterministic)[0]

        x = by_clip(embeddings.astype(self.dtype))
        x, _ = scan_stacked(self.layers, step, x, depth=self.config.num_hidden_layers, policy=self.remat)
        return self.norm(x)

    def empty_cache(self, rows: int, length: int) -> LayerCache:
        """Returns a zeroed cache of all layers, for `rows` sequences of at most `length` tokens."""
        one = empty_layer(rows, self.config.num_key_value_heads, self.config.head_dim, length, self.dtype)
        return jax.tree.map(lambda leaf: jnp.zeros((self.config.num_hidden_layers, *leaf.shape), leaf.dtype), one)

    def extend(
        self, embeddings: Float[Array, "R L D"], cache: LayerCache, positions: Int[Array, "R L"] | None = None
    ) -> tuple[Float[Array, "R L D"], LayerCache]:
        """Extends sequences; returns their final hidden states, and the cache with these tokens in it.

        Args:
            embeddings: one token of each sequence, or the first several tokens of all.
            cache: of all layers, from `empty_cache` or an earlier call.
            positions: of the tokens, and their slots; 0, 1, ... by default.
        """
        positions, slots = places(embeddings, positions, cache, self.config.sliding_window)

        # The cache is a part of the carry, which XLA changes in place; as an output of the scan it would exist twice.
        def step(block: Block, carry: tuple[Array, LayerCache, Array]) -> tuple[Array, LayerCache, Array]:
            x, cache, i = carry
            of_layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), cache)
            x, of_layer = block(x, positions, None, True, (slots, of_layer))
            update = jax.lax.dynamic_update_index_in_dim
            return x, jax.tree.map(lambda leaf, new: update(leaf, new, i, 0), cache, of_layer), i + 1

        carry = by_clip(embeddings.astype(self.dtype)), cache, jnp.zeros((), jnp.int32)
        (x, cache, _), _ = scan_stacked(self.layers, step, carry, depth=self.config.num_hidden_layers)
        return self.norm(x), cache

    def read(self, tokens: Int[Array, "R L"]) -> Float[Array, "R L V"]:
        """Returns scores over the vocabulary of the next token after each token of a text."""
        return self.logits(self(self.embed(tokens)))
