"""Fuses the facial encoder's granularities into the tokens of the facial Q-Former: Eq. 2 of v1, and CA2 of v2.

v1, layer-wise cross-attention granularity fusion (Section 4.1). The facial encoder yields features from fine to coarse,
e_1 .. e_N (Eq. 1). In each frame e_1 reads the general encoder's tokens e_g, e_2 reads the result, and so on:

    e*_2     = softmax((W_Q e_1) (W_K e_g)^T / sqrt(d)) W_V e_g
    e*_{i+1} = softmax((W_Q e_i) (W_K e*_i)^T / sqrt(d)) W_V e*_i        1 < i <= N       (Eq. 2)

e*_{N+1} goes to the facial Q-Former. As printed, Eq. 2 takes its values from e_g alone: the face only steers the
attention. By default each step therefore adds its query stream (`residual`), so that facial content passes.

v2, CA2 (low-level prompt-query learning). For each question with words p, over all frames at once and with h_0 = p:

    W_i = MLP_i(e_i),    a_i = CrossAttention(h_{i-1}, W_i),    h_i = CrossAttention(p, Linear(a_i))    1 <= i <= N

h_N, one token per word, goes to the facial Q-Former. As drawn in the paper, a module passes its result to the next one
as a query only, so that only W_N reaches the Q-Former. With `residual`, all W_i do.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from favchat_jax.models.kernels.attention import attention
from favchat_jax.models.kernels.linear import Linear
from favchat_jax.models.umt import sinusoid_table
from favchat_jax.sharding import by_clip


class Fusion(nn.Module):
    """Base class of both fusions and their parts, with the sizes of their cross-attentions.

    Attributes:
        width: d, also the width of the result.
        heads: attention heads.
        residual: add the projected query stream to the attended values (pre-norm); False is the step as printed.
        dtype: dtype of the computation.
    """

    width: int
    heads: int
    residual: bool = True
    dtype: DTypeLike = jnp.float32

    def step(self, name: str) -> "CrossAttentionStep":
        """Builds a cross-attention of these sizes."""
        return CrossAttentionStep(self.width, self.heads, self.residual, self.dtype, name=name)


class CrossAttentionStep(Fusion):
    """One line of Eq. 2, where facial features e_i query the fused features so far, or half a module of CA2."""

    @nn.compact
    def __call__(
        self, queries: Float[Array, "R L E"], values: Float[Array, "R S F"], mask: Bool[Array, "R S"] | None = None
    ) -> Float[Array, "R L D"]:
        """Returns the attended values of each query; `mask` is True at the values that may be read."""
        if self.residual:
            queries = nn.LayerNorm(dtype=self.dtype, name="query_norm")(queries)
            values = nn.LayerNorm(dtype=self.dtype, name="value_norm")(values)

        def linear(name: str, x):
            return Linear(self.width, dtype=self.dtype, name=name)(x)

        query, key, value = (
            rearrange(linear(name, x), "R L (A C) -> R L A C", A=self.heads)
            for name, x in (("query", queries), ("key", values), ("value", values))
        )
        if mask is not None:
            mask = rearrange(mask, "R S -> R 1 1 S")
        attended = rearrange(attention(query, key, value, mask=mask), "R L A C -> R L (A C)")
        if not self.residual:
            return attended
        return linear("skip", queries) + linear("out", attended)


class GranularityFusion(Fusion):
    """v1: Eq. 2 over all granularities, frame by frame."""

    @nn.compact
    def __call__(
        self, e_g: Float[Array, "B T S D"], e: Sequence[Float[Array, "B T _L _E"]]
    ) -> Float[Array, "B T _L D"]:
        """Returns e*_{N+1} of e_g and e_1 .. e_N: one token for each position of the coarsest map, in every frame."""
        fused = rearrange(e_g, "B T S D -> (B T) S D")
        for i, e_i in enumerate(e, start=1):
            fused = by_clip(self.step(f"step_{i}")(rearrange(e_i, "B T L E -> (B T) L E"), fused))
        return rearrange(fused, "(B T) L D -> B T L D", B=e_g.shape[0])


class BlockMLP(nn.Module):
    """The MLP after a block of the facial encoder: pre-norm, two layers, and a linear skip connection (a choice).

    At initialisation only the skip connection contributes, so that the encoder's features pass undistorted.
    """

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, e_i: Float[Array, "... E"]) -> Float[Array, "... D"]:
        normed = nn.LayerNorm(dtype=self.dtype, name="norm")(e_i)
        hidden = nn.gelu(Linear(self.width, dtype=self.dtype, name="in")(normed))
        out = Linear(self.width, dtype=self.dtype, name="out", kernel_init=nn.initializers.zeros)
        return Linear(self.width, dtype=self.dtype, name="skip")(normed) + out(hidden)


class CA2(Fusion):
    """One module of v2: h_{i-1} queries a block's W_i, then the words query the result."""

    @nn.compact
    def __call__(
        self,
        previous: Float[Array, "B Q P F"],
        block: Float[Array, "B S D"],
        prompt: Float[Array, "B Q P E"],
        prompt_mask: Bool[Array, "B Q P"],
    ) -> Float[Array, "B Q P D"]:
        batch, questions = prompt.shape[:2]
        # All questions of a clip read a block in one attention, so that its keys and values exist once.
        read = self.step("visual")(rearrange(previous, "B Q P F -> B (Q P) F"), block)
        read = Linear(self.width, dtype=self.dtype, name="linear")(read)
        read = rearrange(read, "B (Q P) D -> (B Q) P D", Q=questions)
        prompt, prompt_mask = (rearrange(x, "B Q P ... -> (B Q) P ...") for x in (prompt, prompt_mask))
        return rearrange(self.step("text")(prompt, read, prompt_mask), "(B Q) P D -> B Q P D", B=batch)


class PromptGuidedFusion(Fusion):
    """v2: a module of CA2 for each block of the facial encoder, over all frames of a clip.

    Attributes:
        blocks: N.
    """

    blocks: int = 4

    def setup(self):
        self.mlp = [BlockMLP(self.width, self.dtype) for _ in range(self.blocks)]
        self.ca2 = [CA2(self.width, self.heads, self.residual, self.dtype) for _ in range(self.blocks)]

    def read_blocks(self, e: Sequence[Float[Array, "B T _L _E"]]) -> tuple[Float[Array, "B _S D"], ...]:
        """Returns W_1 .. W_N with the positions of all their tokens, which serve all questions about a clip."""
        return tuple(add_positions(mlp(e_i)) for mlp, e_i in zip(self.mlp, e, strict=True))

    def __call__(
        self,
        blocks: Sequence[Float[Array, "B _S D"]],
        prompt: Float[Array, "B Q P E"],
        prompt_mask: Bool[Array, "B Q P"],
    ) -> Float[Array, "B Q P D"]:
        """Returns h_N of W_1 .. W_N and the words of each question; undefined where `prompt_mask` is False."""
        h = prompt
        for ca2, block in zip(self.ca2, blocks, strict=True):
            h = by_clip(ca2(h, block, prompt, prompt_mask))
        return h


def add_positions(tokens: Float[Array, "B T L D"]) -> Float[Array, "B T*L D"]:
    """Adds sinusoids of the frame's number and of the place within the frame, each to one half of the channels.

    The facial encoder sees single frames and knows only relative positions, and v1's fusion is per frame. Without
    these positions, v1's facial Q-Former and v2's CA2 could not tell frames or places apart.

    Returns:
        The tokens of all frames as one sequence.
    """
    frames, places, width = tokens.shape[1:]
    time = np.broadcast_to(sinusoid_table(frames, width // 2)[:, None], (frames, places, width // 2))
    place = np.broadcast_to(sinusoid_table(places, width - width // 2), (frames, places, width - width // 2))
    positions = jnp.asarray(np.concatenate([time, place], axis=-1), tokens.dtype)
    return rearrange(tokens + positions, "B T L D -> B (T L) D")
