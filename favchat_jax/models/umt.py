"""Holds UMT-L/16, the general visual encoder: joint space-time attention over the patches of all frames of a clip.

Rebuilds the visual part of VideoChat2 (github: OpenGVLab/Ask-Anything, video_chat2/models/blip2/vit.py). Its weights
map to these names: published `blocks.{i}.norm1.weight` is `blocks/norm1/scale[i]`, `blocks.{i}.attn.qkv.weight` is
`blocks/attn/qkv/kernel[i]` transposed, and so on. There is no class token and no final norm; the `vision_layernorm`
that follows in VideoChat2 (epsilon `VISION_LAYERNORM_EPSILON`) belongs to the caller.
"""

from functools import lru_cache

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from favchat_jax.models.kernels.attention import attention
from favchat_jax.models.kernels.linear import Linear
from favchat_jax.models.kernels.scan import scan_stacked
from favchat_jax.sharding import by_clip

VISION_LAYERNORM_EPSILON = 1e-12


def sinusoid_table(positions: int, width: int) -> Float[np.ndarray, "S D"]:
    """Returns sin(p / 10000^(2i/width)) at even channels 2i, the cosine of this angle at odd channels 2i+1; float64."""
    frequencies = 10000.0 ** (-2 * (np.arange(width) // 2) / width)
    angles = np.arange(positions)[:, None] * frequencies
    return np.where(np.arange(width) % 2 == 0, np.sin(angles), np.cos(angles))


def linear_weights(new: int, old: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix that resamples `old` samples to `new` linearly between pixel centres, with repeated edges."""
    source = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0)
    return np.maximum(1 - np.abs(np.minimum(source, old - 1)[:, None] - np.arange(old)), 0)


def bicubic_weights(new: int, old: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix of cubic resampling (Keys' kernel, a = -0.75, no antialiasing), as the reference does it."""
    a = -0.75
    source = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(source).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(source - (first + tap))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(distance <= 1, near, far))
    return weights


@lru_cache(maxsize=16)
def position_table(
    frames: int, height: int, width: int, channels: int, *, checkpoint_frames: int, checkpoint_grid: int
) -> Float[np.ndarray, "T H W D"]:
    """Returns the position embedding of every patch of a clip, float32.

    One sinusoid runs through all positions of `checkpoint_frames` frames of `checkpoint_grid` x `checkpoint_grid`
    patches; that table is resampled in space (bicubic), then in time (linear). A single frame is an image: its table
    is the sinusoid over one frame's positions, not the clip's table resampled to one frame.
    """
    base_frames = 1 if frames == 1 else checkpoint_frames
    table = sinusoid_table(base_frames * checkpoint_grid**2, channels)
    table = table.reshape(base_frames, checkpoint_grid, checkpoint_grid, channels)
    if (height, width) != (checkpoint_grid, checkpoint_grid):
        rows, columns = bicubic_weights(height, checkpoint_grid), bicubic_weights(width, checkpoint_grid)
        table = np.einsum("hr,wc,trcd->thwd", rows, columns, table, optimize=True)
    if frames != base_frames:
        table = np.einsum("nt,thwd->nhwd", linear_weights(frames, base_frames), table, optimize=True)
    return table.astype(np.float32)


class PatchEmbedding(nn.Module):
    """Cuts frames into square patches and projects each with a matrix product, which equals a strided convolution.

    The kernel's rows run over a patch's rows, columns and colours, in that order.
    """

    width: int
    patch: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, frames: Float[Array, "*frames H W 3"]) -> Float[Array, "*frames h w D"]:
        patches = rearrange(frames, "... (h p) (w q) c -> ... h w (p q c)", p=self.patch, q=self.patch)
        return Linear(self.width, dtype=self.dtype, name="proj")(patches)


class Attention(nn.Module):
    """Self-attention whose query and value have a bias and whose key has none."""

    width: int
    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        qkv = Linear(3 * self.width, use_bias=False, dtype=self.dtype, name="qkv")(tokens)
        query, key, value = jnp.split(qkv, 3, axis=-1)
        query += self.param("q_bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        value += self.param("v_bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        query, key, value = (rearrange(x, "B S (A C) -> B S A C", A=self.heads) for x in (query, key, value))
        attended = rearrange(attention(query, key, value), "B S A C -> B S (A C)")
        return Linear(self.width, dtype=self.dtype, name="proj")(attended)


class MLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    width: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "... D"]) -> Float[Array, "... D"]:
        hidden = Linear(self.hidden, dtype=self.dtype, name="fc1")(tokens)
        return Linear(self.width, dtype=self.dtype, name="fc2")(nn.gelu(hidden, approximate=False))


class Block(nn.Module):
    """A pre-norm transformer block."""

    width: int
    heads: int
    mlp_ratio: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.norm1 = nn.LayerNorm(1e-6, dtype=self.dtype, use_fast_variance=False)
        self.attn = Attention(self.width, self.heads, self.dtype)
        self.norm2 = nn.LayerNorm(1e-6, dtype=self.dtype, use_fast_variance=False)
        self.mlp = MLP(self.width, self.mlp_ratio * self.width, self.dtype)

    def __call__(self, tokens: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class UMT(nn.Module):
    """The general visual encoder.

    Attributes:
        width: channels of a token.
        depth: blocks of the published model.
        layers_run: number of blocks that exist here; VideoChat2 reads the output of the last but one.
        heads: attention heads.
        mlp_ratio: hidden channels of a block's MLP, divided by `width`.
        patch: side of a patch in pixels.
        checkpoint_frames: length of the clips of the position table, which is interpolated for other lengths.
        checkpoint_size: side in pixels of the frames of the position table.
        taps: ascending 1-based blocks whose outputs are returned too.
        dtype: dtype of the computation; weights are float32.
        remat: activations that a block keeps for the backward pass (`remat.POLICIES`).
    """

    width: int = 1024
    depth: int = 24
    layers_run: int = 23
    heads: int = 16
    mlp_ratio: int = 4
    patch: int = 16
    checkpoint_frames: int = 4
    checkpoint_size: int = 224
    taps: tuple[int, ...] = ()
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    def setup(self):
        if not 0 < self.layers_run <= self.depth:
            raise ValueError(f"layers_run={self.layers_run} is not within the {self.depth} blocks of depth")
        if list(self.taps) != sorted(set(self.taps) & set(range(1, self.layers_run + 1))):
            raise ValueError(f"taps={self.taps} are not ascending numbers of the {self.layers_run} blocks that run")
        self.patch_embed = PatchEmbedding(self.width, self.patch, self.dtype)
        self.blocks = Block(self.width, self.heads, self.mlp_ratio, self.dtype)

    def __call__(
        self, frames: Float[Array, "B T H W 3"]
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "B S D"], ...]]:
        """Encodes clips into tokens.

        Args:
            frames: normalised frames (mean 0.485, 0.456, 0.406, standard deviation 0.229, 0.224, 0.225).

        Returns:
            The S = T * H/patch * W/patch tokens of the last block that runs, frame by frame in raster order, and
            the outputs of the blocks in `taps`.
        """
        patches = self.patch_embed(frames.astype(self.dtype))
        positions = position_table(
            *patches.shape[1:],
            checkpoint_frames=self.checkpoint_frames,
            checkpoint_grid=self.checkpoint_size // self.patch,
        )
        tokens = rearrange(patches + jnp.asarray(positions, self.dtype), "B T h w D -> B (T h w) D")

        def step(block: Block, tokens: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
            return by_clip(block(tokens))

        return scan_stacked(
            self.blocks, step, by_clip(tokens), depth=self.layers_run, taps=self.taps, policy=self.remat
        )
