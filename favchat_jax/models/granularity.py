"""From the facial encoder's blocks to the tokens of the facial Q-Former: Eq. 2 of v1, and CA2 of v2.

v1, layer-wise cross-attention granularity fusion (Section 4.1, Eq. 1 and 2). The facial encoder's blocks yield features
from fine to coarse, e_1 .. e_N (Eq. 1). The general encoder's tokens e_g are read by e_1, what comes out is read by
e_2, and so on:

    e*_2     = softmax((W_Q e_1) (W_K e_g)^T / sqrt(d)) W_V e_g
    e*_{i+1} = softmax((W_Q e_i) (W_K e*_i)^T / sqrt(d)) W_V e*_i        1 < i <= N       (Eq. 2)

per frame, and e*_{N+1} goes to the facial Q-Former. As printed, Eq. 2 takes its values from e_g alone: the face only
steers the attention. By default each step therefore adds its query stream (`residual`), so that facial content passes.

v2, CA2 (low-level prompt-query learning), once a question, with the question's words p and h_0 = p:

    W_i = MLP_i(e_i),    a_i = CrossAttention(h_{i-1}, W_i),    h_i = CrossAttention(p, Linear(a_i))    1 <= i <= N

over all frames at once, and h_N, a token a word, goes to the facial Q-Former. As drawn, a module passes what it read
to the next one as a query only, so that W_N alone would reach the Q-Former: here too `residual` lets all pass.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from favchat_jax.models.kernels.attention import attention
from favchat_jax.models.kernels.linear import Linear
from favchat_jax.models.umt import sinusoid_table
from favchat_jax.sharding import by_clip


class CrossAttentionStep(nn.Module):
    """One line of Eq. 2, where facial features e_i query the fused features so far, or half a module of CA2.

    Attributes:
        width: d, also the width of the result.
        heads: number of attention heads.
        residual: add the projected query stream to the attended values (pre-norm); False is the step as printed.
        dtype: dtype of the computation.
    """

    width: int
    heads: int
    residual: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, queries: Float[Array, "B L D"], values: Float[Array, "B S E"], mask: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B L d"]:
        """What `queries` read of those `values` at which `mask`, if any, is True."""
        query_input, value_input = queries, values
        if self.residual:
            query_input = nn.LayerNorm(dtype=self.dtype, name="query_norm")(queries)
            value_input = nn.LayerNorm(dtype=self.dtype, name="value_norm")(values)

        def heads(name: str, x):
            projected = Linear(self.width, dtype=self.dtype, name=name)(x)
            return rearrange(projected, "B L (N H) -> B L N H", N=self.heads)

        if mask is not None:
            mask = rearrange(mask, "B S -> B 1 1 S")
        projected = heads("query", query_input), heads("key", value_input), heads("value", value_input)
        attended = attention(*projected, mask=mask)
        attended = rearrange(attended, "B L N H -> B L (N H)")
        if not self.residual:
            return attended
        attended = Linear(self.width, dtype=self.dtype, name="out")(attended)
        return Linear(self.width, dtype=self.dtype, name="skip")(query_input) + attended


class GranularityFusion(nn.Module):
    """v1: Eq. 2 over all granularities, frame by frame; fields as in `CrossAttentionStep`."""

    width: int
    heads: int
    residual: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, general: Float[Array, "B T S d"], facial: Sequence[Float[Array, "B T L_i D_i"]]
    ) -> Float[Array, "B T L_N d"]:
        """e*_{N+1}: one token for each position of the coarsest map e_N, in every frame."""
        batch = general.shape[0]
        fused = rearrange(general, "B T S d -> (B T) S d")
        for i, features in enumerate(facial, start=1):
            step = CrossAttentionStep(self.width, self.heads, self.residual, self.dtype, name=f"step_{i}")
            fused = by_clip(step(rearrange(features, "B T L D -> (B T) L D"), fused))
        return rearrange(fused, "(B T) L d -> B T L d", B=batch)


class BlockMLP(nn.Module):
    """The MLP after a block of the facial encoder: pre-norm, two layers, with a linear layer around it (a choice).

    It starts as the linear layer alone, so that what an encoder was trained to hold is not garbled on its way.
    """

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "... D"]) -> Float[Array, "... d"]:
        normed = nn.LayerNorm(dtype=self.dtype, name="norm")(features)
        hidden = nn.gelu(Linear(self.width, dtype=self.dtype, name="in")(normed))
        out = Linear(self.width, dtype=self.dtype, name="out", kernel_init=nn.initializers.zeros)
        return Linear(self.width, dtype=self.dtype, name="skip")(normed) + out(hidden)


class CA2(nn.Module):
    """One module of v2: the module before queries a block's W_i, then the words query what it read.

    Fields as in `CrossAttentionStep`, which both halves are.
    """

    width: int
    heads: int
    residual: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        previous: Float[Array, "B Q P C"],
        block: Float[Array, "B F d"],
        prompt: Float[Array, "B Q P E"],
        prompt_mask: Bool[Array, "B Q P"],
    ) -> Float[Array, "B Q P d"]:
        batch, questions = prompt.shape[:2]
        fields = (self.width, self.heads, self.residual, self.dtype)
        # All questions of a clip read a block in one attention, so that its keys and values exist once.
        read = CrossAttentionStep(*fields, name="visual")(rearrange(previous, "B Q P C -> B (Q P) C"), block)
        read = Linear(self.width, dtype=self.dtype, name="linear")(read)
        read = rearrange(read, "B (Q P) d -> (B Q) P d", Q=questions)
        prompt, prompt_mask = (rearrange(x, "B Q P ... -> (B Q) P ...") for x in (prompt, prompt_mask))
        asked = CrossAttentionStep(*fields, name="text")(prompt, read, prompt_mask)
        return rearrange(asked, "(B Q) P d -> B Q P d", B=batch)


class PromptGuidedFusion(nn.Module):
    """v2: a module of CA2 for each block of the facial encoder, over all frames of a clip.

    Attributes:
        blocks: N.
        width, heads, residual, dtype: as in `CrossAttentionStep`.
    """

    blocks: int
    width: int
    heads: int
    residual: bool = True
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.mlp = [BlockMLP(self.width, self.dtype) for _ in range(self.blocks)]
        self.ca2 = [CA2(self.width, self.heads, self.residual, self.dtype) for _ in range(self.blocks)]

    def read_blocks(self, facial: Sequence[Float[Array, "B T L_i D_i"]]) -> tuple[Float[Array, "B F_i d"], ...]:
        """W_1 .. W_N with the positions of all their tokens, once a clip, whatever is asked."""
        return tuple(add_positions(mlp(features)) for mlp, features in zip(self.mlp, facial, strict=True))

    def __call__(
        self,
        blocks: Sequence[Float[Array, "B F_i d"]],
        prompt: Float[Array, "B Q P E"],
        prompt_mask: Bool[Array, "B Q P"],
    ) -> Float[Array, "B Q P d"]:
        """h_N: what the words of each question found in the blocks; nothing of use where `prompt_mask` is False."""
        found = prompt
        for ca2, block in zip(self.ca2, blocks, strict=True):
            found = by_clip(ca2(found, block, prompt, prompt_mask))
        return found


def add_positions(tokens: Float[Array, "B T L D"]) -> Float[Array, "B (T L) D"]:
    """Adds a sinusoid of the frame's number to one half of the channels and one of the place within the frame to the
    other, and lays all frames in one sequence.

    The facial encoder sees single frames and knows relative positions alone, and v1's fusion is per frame, so without
    this what reads the result (v1's facial Q-Former, v2's CA2) could tell neither frames nor places apart.
    """
    frames, places, width = tokens.shape[1:]
    time = np.broadcast_to(sinusoid_table(frames, width // 2)[:, None], (frames, places, width // 2))
    place = np.broadcast_to(sinusoid_table(places, width - width // 2), (frames, places, width - width // 2))
    positions = jnp.asarray(np.concatenate([time, place], axis=-1), tokens.dtype)
    return rearrange(tokens + positions, "B T L D -> B (T L) D")
