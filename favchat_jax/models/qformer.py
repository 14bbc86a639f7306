"""Holds the Q-Former: learned queries that read a clip's visual tokens and, with a prompt, the question about it.

Rebuilds BLIP-2's BERT as VideoChat2 runs it (github: OpenGVLab/Ask-Anything, video_chat2/models/blip2/Qformer.py).
Queries and prompt share each layer's self-attention, in which all tokens but padding are read. In every second layer,
the queries then read the visual tokens. Queries and prompt have separate MLPs. Published names map one to one, with
kernels transposed:

| published (`qformer.bert.` left out) | here |
|---|---|
| `query_tokens`, `extra_query_tokens` | the same |
| `embeddings.{word_embeddings,position_embeddings}` | the same, `/embedding` |
| `embeddings.LayerNorm` | `embeddings_norm` |
| `encoder.layer.{i}.attention.self.{query,key,value}` | `layer_{i}/attention/{query,key,value}` |
| `encoder.layer.{i}.attention.output.{dense,LayerNorm}` | `layer_{i}/attention/{output,norm}` |
| `encoder.layer.{i}.crossattention.*` | `layer_{i}/crossattention/*`, as above |
| `encoder.layer.{i}.intermediate.dense`, `.output.{dense,LayerNorm}` | `layer_{i}/mlp/{intermediate,output,norm}` |
| `encoder.layer.{i}.intermediate_query`, `.output_query` | `layer_{i}/mlp_query/*`, as above |
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from favchat_jax.models.kernels.attention import attention
from favchat_jax.models.kernels.linear import Linear
from favchat_jax.models.kernels.scan import scan_layers
from favchat_jax.sharding import by_clip

_EMBEDDING_INIT = nn.initializers.normal(0.02)


def _layer_norm(dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(1e-12, dtype=dtype, use_fast_variance=False, name=name)


class Residual(nn.Module):
    """Base class of a layer's branches, which end in linear, dropout, stochastic depth, addition and norm (post-norm).

    Attributes:
        dropout: rate on single channels.
        drop_path: rate at which the branch is left out, drawn for each question.
        dtype: dtype of the computation.
    """

    dropout: float
    drop_path: float
    dtype: DTypeLike = jnp.float32

    def finish(
        self, branch: Float[Array, "B Q L E"], trunk: Float[Array, "B Q L D"], deterministic: bool
    ) -> Float[Array, "B Q L D"]:
        """Returns the norm of `trunk` plus the projected `branch`."""
        branch = Linear(trunk.shape[-1], dtype=self.dtype, name="output")(branch)
        branch = nn.Dropout(self.dropout)(branch, deterministic=deterministic)
        branch = nn.Dropout(self.drop_path, broadcast_dims=(2, 3))(branch, deterministic=deterministic)
        return _layer_norm(self.dtype, "norm")(branch + trunk)


class Attention(Residual):
    """Self-attention within each question's tokens, or cross-attention to its clip's visual tokens.

    BERT's dropout of attention weights is left out: fused attention kernels have none.
    """

    heads: int = 12

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B Q L D"],
        *,
        visual: Float[Array, " B #Q S E"] | None = None,
        mask: Bool[Array, "B Q _S"] | None = None,
        deterministic: bool,
    ) -> Float[Array, "B Q L D"]:
        batch, questions, _, width = tokens.shape
        context = tokens if visual is None else visual
        # Questions that read the same tokens do so in one attention, so that its keys and values exist once.
        shared = context.shape[1] < questions
        fold = "B Q L (A C) -> B (Q L) A C" if shared else "B Q L (A C) -> (B Q) L A C"
        query, key, value = (
            rearrange(Linear(width, dtype=self.dtype, name=name)(source), fold, A=self.heads)
            for name, source in (("query", tokens), ("key", context), ("value", context))
        )
        if mask is not None:
            mask = rearrange(mask, "B Q S -> (B Q) 1 1 S")
        attended = attention(query, key, value, mask=mask).reshape(batch, questions, -1, width)
        return self.finish(attended, tokens, deterministic)


class MLP(Residual):
    """Two linear layers with the exact (erf) GELU between them.

    Attributes:
        hidden: channels between the two layers.
    """

    hidden: int = 3072

    @nn.compact
    def __call__(self, tokens: Float[Array, "B Q L D"], *, deterministic: bool) -> Float[Array, "B Q L D"]:
        hidden = Linear(self.hidden, dtype=self.dtype, name="intermediate")(tokens)
        return self.finish(nn.gelu(hidden, approximate=False), tokens, deterministic)


class Layer(nn.Module):
    """One layer: shared self-attention, cross-attention of the queries, one MLP for queries and one for the prompt."""

    heads: int
    mlp: int
    cross: bool
    dropout: float
    drop_path: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "B Q N D"],
        text: Float[Array, "B Q P D"] | None,
        visual: Float[Array, " B #Q S E"],
        mask: Bool[Array, "B Q N+P"] | None,
        visual_mask: Bool[Array, "B Q S"] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "B Q N D"], Float[Array, "B Q P D"] | None]:
        branch = self.dropout, self.drop_path, self.dtype
        count = queries.shape[2]
        tokens = queries
        if text is not None:
            # The barrier prevents a fusion: XLA's Triton code for GPUs cannot compile a norm of half a concatenation.
            tokens = jax.lax.optimization_barrier(jnp.concatenate([queries, text], axis=2))
        tokens = Attention(*branch, self.heads, name="attention")(tokens, mask=mask, deterministic=deterministic)
        queries = tokens[:, :, :count]
        if self.cross:
            cross = Attention(*branch, self.heads, name="crossattention")
            queries = cross(queries, visual=visual, mask=visual_mask, deterministic=deterministic)
        queries = MLP(*branch, self.mlp, name="mlp_query")(queries, deterministic=deterministic)
        if text is not None:
            text = MLP(*branch, self.mlp, name="mlp")(tokens[:, :, count:], deterministic=deterministic)
        return queries, text


class QFormer(nn.Module):
    """The Q-Former of one stream of visual tokens.

    Attributes:
        width: channels of a token.
        depth: layers.
        heads: attention heads.
        mlp: hidden channels of an MLP.
        queries: learned queries of BLIP-2.
        extra_queries: queries that VideoChat2's instruction tuning adds.
        vocabulary: word pieces of the prompt's tokenizer, `[DEC]` included.
        positions: longest prompt.
        cross_every: layers 0, cross_every, 2 * cross_every, ... read the visual tokens.
        prompt: whether the text branch exists and the question is read.
        dropout: rate on embeddings and on the output of attentions and MLPs.
        drop_path: rate of the last layer's stochastic depth; it rises linearly from 0 at the first.
        dtype: dtype of the computation; weights are float32.
        remat: activations that a layer keeps for the backward pass (`remat.POLICIES`).
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    queries: int = 32
    extra_queries: int = 64
    vocabulary: int = 30523
    positions: int = 512
    cross_every: int = 2
    prompt: bool = True
    dropout: float = 0.1
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    def setup(self):
        self.query_tokens = self.param("query_tokens", _EMBEDDING_INIT, (self.queries, self.width))
        if self.extra_queries:
            self.extra_query_tokens = self.param(
                "extra_query_tokens", _EMBEDDING_INIT, (self.extra_queries, self.width)
            )
        self.embeddings_norm = _layer_norm(self.dtype)
        if self.prompt:
            self.word_embeddings = nn.Embed(
                self.vocabulary, self.width, dtype=self.dtype, embedding_init=_EMBEDDING_INIT
            )
            self.position_embeddings = nn.Embed(
                self.positions, self.width, dtype=self.dtype, embedding_init=_EMBEDDING_INIT
            )
        self.embeddings_dropout = nn.Dropout(self.dropout)
        drop_paths = [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]
        self.layer = [
            Layer(self.heads, self.mlp, i % self.cross_every == 0, self.dropout, drop_path, self.dtype)
            for i, drop_path in enumerate(drop_paths)
        ]

    def embed_prompt(self, prompt: Int[Array, "B Q P"]) -> Float[Array, "B Q P D"]:
        """Returns the normed sum of word and position embeddings, the input of the first layer (without dropout)."""
        length = prompt.shape[-1]
        if length > self.positions:
            raise ValueError(f"a prompt of {length} word pieces is longer than the {self.positions} positions")
        return self.embeddings_norm(self.word_embeddings(prompt) + self.position_embeddings(jnp.arange(length)))

    def __call__(
        self,
        visual: Float[Array, "B S E"] | Float[Array, "B Q S E"],
        prompt: Int[Array, "B Q P"] | None = None,
        prompt_mask: Bool[Array, "B Q P"] | None = None,
        *,
        visual_mask: Bool[Array, "B Q S"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B Q N D"]:
        """Returns the last layer's N = queries + extra_queries query tokens.

        Args:
            visual: visual tokens of each clip, or of each question about it.
            prompt: word pieces of each question, padded on the right. Where `self.prompt` is False, its words are not
                read and a clip's questions share their tokens. Without a prompt, Q is 1 and only the clip is read.
            prompt_mask: True at word pieces, False at padding; required with a prompt.
            visual_mask: True at visual tokens that are read; only for visual tokens of each question.
            deterministic: no dropout; otherwise the random stream `dropout` is needed.
        """
        tokens = self.query_tokens
        if self.extra_queries:
            tokens = jnp.concatenate([tokens, self.extra_query_tokens])
        text, mask, questions = None, None, 1
        if self.prompt and prompt is not None:
            assert prompt_mask is not None, "a prompt needs its mask"
            questions = prompt.shape[1]
            text = self.embeddings_dropout(self.embed_prompt(prompt), deterministic=deterministic)
            seen = jnp.ones((*prompt.shape[:2], len(tokens)), bool)
            mask = jnp.concatenate([seen, prompt_mask.astype(bool)], axis=2)
        elif self.prompt and self.is_initializing():
            raise ValueError("a Q-Former with prompt=True has to be initialised with a prompt")
        tokens = jnp.broadcast_to(tokens, (visual.shape[0], questions, *tokens.shape))
        tokens = self.embeddings_dropout(self.embeddings_norm(tokens), deterministic=deterministic)
        visual = visual.astype(self.dtype)
        if visual.ndim == 3:
            visual = visual[:, None]

        def step(layer, carry):
            tokens, text = carry
            return layer(by_clip(tokens), text, visual, mask, visual_mask, deterministic)

        tokens, _ = scan_layers(self.layer, step, (tokens, text), period=self.cross_every, policy=self.remat)
        if prompt is not None:
            tokens = jnp.broadcast_to(tokens, (*prompt.shape[:2], *tokens.shape[2:]))
        return tokens
