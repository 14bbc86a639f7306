"""Layer-wise cross-attention granularity fusion (FaVChat v1, Section 4.1, Eq. 1 and 2).

The facial encoder's blocks yield features from fine to coarse, e_1 .. e_N (Eq. 1). The general encoder's tokens e_g are
read by e_1, what comes out is read by e_2, and so on:

    e*_2     = softmax((W_Q e_1) (W_K e_g)^T / sqrt(d)) W_V e_g
    e*_{i+1} = softmax((W_Q e_i) (W_K e*_i)^T / sqrt(d)) W_V e*_i        1 < i <= N       (Eq. 2)

per frame, and e*_{N+1} goes to the facial Q-Former. As printed, Eq. 2 takes its values from e_g alone: the face only
steers the attention. By default each step therefore adds its query stream (`residual`), so that facial content passes.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from favchat_jax.models.attention import attention
from favchat_jax.models.linear import Linear
from favchat_jax.models.umt import sinusoid_table


class CrossAttentionStep(nn.Module):
    """One line of Eq. 2: facial features e_i query the fused features so far.

    Attributes:
        width: d, also the width of the result.
        heads: number of attention heads.
        residual: add the projected query stream to the attended values (pre-norm); False is Eq. 2 as printed.
        dtype: dtype of the computation.
    """

    width: int
    heads: int
    residual: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, facial: Float[Array, "B L D"], fused: Float[Array, "B S d"]) -> Float[Array, "B L d"]:
        query_input, value_input = facial, fused
        if self.residual:
            query_input = nn.LayerNorm(dtype=self.dtype, name="query_norm")(facial)
            value_input = nn.LayerNorm(dtype=self.dtype, name="value_norm")(fused)

        def heads(name: str, x):
            projected = Linear(self.width, dtype=self.dtype, name=name)(x)
            return rearrange(projected, "B L (N H) -> B L N H", N=self.heads)

        attended = attention(heads("query", query_input), heads("key", value_input), heads("value", value_input))
        attended = rearrange(attended, "B L N H -> B L (N H)")
        if not self.residual:
            return attended
        attended = Linear(self.width, dtype=self.dtype, name="out")(attended)
        return Linear(self.width, dtype=self.dtype, name="skip")(query_input) + attended


class GranularityFusion(nn.Module):
    """Eq. 2 over all granularities, frame by frame; fields as in `CrossAttentionStep`."""

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
            fused = step(rearrange(features, "B T L D -> (B T) L D"), fused)
        return rearrange(fused, "(B T) L d -> B T L d", B=batch)


def add_positions(tokens: Float[Array, "B T L D"]) -> Float[Array, "B (T L) D"]:
    """Adds a sinusoid of the frame's number to one half of the channels and one of the place within the frame to the
    other, and lays all frames in one sequence.

    Fusion is per frame and the facial encoder knows relative positions alone, so without this the facial Q-Former
    could tell neither frames nor places apart.
    """
    frames, places, width = tokens.shape[1:]
    time = np.broadcast_to(sinusoid_table(frames, width // 2)[:, None], (frames, places, width // 2))
    place = np.broadcast_to(sinusoid_table(places, width - width // 2), (frames, places, width - width // 2))
    positions = jnp.asarray(np.concatenate([time, place], axis=-1), tokens.dtype)
    return rearrange(tokens + positions, "B T L D -> B (T L) D")
