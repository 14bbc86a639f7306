"""Holds FaceXFormer's facial encoder: a Swin transformer with four outputs (taps), e_1..e_4 of FaVChat's Eq. 1.

Rebuilds the backbone of github: Kartik-3004/facexformer (network/models/facexformer.py), which is torchvision's
`swin_b` without norm and head. Published names map one to one, with kernels transposed:

| published | here |
|---|---|
| `backbone.0.0.0`, `backbone.0.0.2` | `patch_embed/proj`, `patch_norm` |
| `backbone.0.{1+2i}.{j}.norm1`, `.norm2` | `stages_{i}/blocks_{j}/norm1`, `/norm2` |
| `backbone.0.{1+2i}.{j}.attn.*` | `stages_{i}/blocks_{j}/attn/*` |
| `backbone.0.{1+2i}.{j}.mlp.0`, `.mlp.3` | `stages_{i}/blocks_{j}/mlp/fc1`, `/fc2` |
| `backbone.0.{2+2i}.norm`, `.reduction` | `merge_{i}/norm`, `/reduction` |
| `linear_c.{i}.proj`, `linear_fuse` | `linear_c_{i}`, `linear_fuse` of `LinearFuse` |

`backbone.1`, torchvision's final norm, affects no tap and is left out.
"""

from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from favchat_jax.models.kernels.attention import attention
from favchat_jax.models.kernels.linear import Linear, flat_product
from favchat_jax.models.kernels.scan import scan_layers
from favchat_jax.models.umt import MLP, PatchEmbedding
from favchat_jax.sharding import by_clip


@lru_cache(maxsize=64)
def relative_position_index(window: tuple[int, int], table_window: int) -> Int[np.ndarray, "L L"]:
    """Returns the row of the bias table for each (query, key) of a window in raster order.

    The table has a row for each of (2 * table_window - 1)^2 offsets (query - key) in a full window, in raster order.
    """
    rows, columns = (axis.ravel() for axis in np.indices(window))
    row_offset = rows[:, None] - rows + table_window - 1
    column_offset = columns[:, None] - columns + table_window - 1
    return row_offset * (2 * table_window - 1) + column_offset


@lru_cache(maxsize=64)
def shifted_window_mask(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Bool[np.ndarray, "windows L L"]:
    """Returns True where two tokens of one window of the rolled map were neighbours before the roll, too.

    The roll moves the map's first `shift` rows and columns behind its last ones. In a window that holds both, tokens on
    different sides of the seam do not attend to each other.
    """
    seam = [(np.arange(n) >= n - s).astype(int) for n, s in zip(size, shift, strict=True)]
    regions = 2 * seam[0][:, None] + seam[1][None, :]
    regions = rearrange(regions, "(y h) (x w) -> (y x) (h w)", h=window[0], w=window[1])
    return regions[:, :, None] == regions[:, None, :]


class WindowAttention(nn.Module):
    """Self-attention within windows of the map, with a learned bias for each relative position.

    A map that does not divide into windows is padded with zeros after the norm, and the zeros take part, as in
    torchvision. A map smaller than the window, which never occurs at the paper's sizes, is one window of its own size.

    Attributes:
        heads: attention heads.
        window: side of a window in tokens.
        shifted: whether the map is first rolled by half a window, so that windows overlap several of the last block.
    """

    heads: int
    window: int
    shifted: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "R H W D"]) -> Float[Array, "R H W D"]:
        batch, *size, _ = tokens.shape
        window = tuple(min(self.window, n) for n in size)
        padded = tuple(-(-n // w) * w for n, w in zip(size, window, strict=True))
        shift = tuple(self.window // 2 if self.shifted and w < n else 0 for n, w in zip(padded, window, strict=True))

        if padded != tuple(size):
            tokens = jnp.pad(tokens, ((0, 0), (0, padded[0] - size[0]), (0, padded[1] - size[1]), (0, 0)))
        if any(shift):
            tokens = jnp.roll(tokens, (-shift[0], -shift[1]), (1, 2))
        tokens = rearrange(tokens, "b (y h) (x w) d -> (b y x) (h w) d", h=window[0], w=window[1])
        tokens = self._attend(tokens, window, padded, shift)
        tokens = rearrange(tokens, "(b y x) (h w) d -> b (y h) (x w) d", b=batch, y=padded[0] // window[0], h=window[0])
        if any(shift):
            tokens = jnp.roll(tokens, shift, (1, 2))
        return tokens[:, : size[0], : size[1]]

    def _attend(self, tokens, window, padded, shift):
        width = tokens.shape[-1]
        qkv = Linear(3 * width, dtype=self.dtype, name="qkv")(tokens)
        query, key, value = jnp.moveaxis(rearrange(qkv, "b l (n h d) -> b l n h d", n=3, h=self.heads), 2, 0)
        table = self.param(
            "relative_position_bias_table", nn.initializers.normal(0.02), ((2 * self.window - 1) ** 2, self.heads)
        )
        bias = jnp.moveaxis(table[relative_position_index(window, self.window)], -1, 0)[None]
        mask = None
        if any(shift):
            seen = shifted_window_mask(padded, window, shift)
            mask = jnp.tile(seen[:, None], (tokens.shape[0] // len(seen), 1, 1, 1))
        attended = attention(query, key, value, bias=bias.astype(self.dtype), mask=mask)
        return Linear(width, dtype=self.dtype, name="proj")(rearrange(attended, "b l h d -> b l (h d)"))


class SwinBlock(nn.Module):
    """A pre-norm block: window attention, then an MLP."""

    heads: int
    window: int
    shifted: bool
    mlp_ratio: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "R H W D"]) -> Float[Array, "R H W D"]:
        width = tokens.shape[-1]
        normed = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name="norm1")(tokens)
        tokens = tokens + WindowAttention(self.heads, self.window, self.shifted, self.dtype, name="attn")(normed)
        normed = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name="norm2")(tokens)
        return tokens + MLP(width, self.mlp_ratio * width, self.dtype, name="mlp")(normed)


class SwinStage(nn.Module):
    """The blocks of one resolution; every second block shifts its windows."""

    depth: int
    heads: int
    window: int
    mlp_ratio: int
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    @nn.compact
    def __call__(self, tokens: Float[Array, "R H W D"]) -> Float[Array, "R H W D"]:
        blocks = [
            SwinBlock(self.heads, self.window, j % 2 == 1, self.mlp_ratio, self.dtype, name=f"blocks_{j}")
            for j in range(self.depth)
        ]

        def step(block: SwinBlock, tokens: Float[Array, "R H W D"]) -> Float[Array, "R H W D"]:
            return by_clip(block(tokens))

        return scan_layers(blocks, step, tokens, period=2, policy=self.remat)


class PatchMerging(nn.Module):
    """Halves the map: concatenates 2x2 neighbours (down the column first), norms them, projects to twice the width."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "R H W D"]) -> Float[Array, "R h w E"]:
        _, height, width, channels = tokens.shape
        if height % 2 or width % 2:
            tokens = jnp.pad(tokens, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        tokens = rearrange(tokens, "b (y p) (x q) d -> b y x (q p d)", p=2, q=2)
        tokens = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name="norm")(tokens)
        return Linear(2 * channels, use_bias=False, dtype=self.dtype, name="reduction")(tokens)


class FaceXFormerEncoder(nn.Module):
    """The facial encoder, which sees single frames.

    Attributes:
        width: channels of the first stage; each further stage doubles them.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: side of an attention window in tokens.
        mlp_ratio: hidden channels of a block's MLP, divided by its width.
        patch: side of a patch in pixels.
        dtype: dtype of the computation; weights are float32.
        remat: activations that a block keeps for the backward pass (`remat.POLICIES`).
    """

    width: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 7
    mlp_ratio: int = 4
    patch: int = 4
    dtype: DTypeLike = jnp.float32
    remat: str = ""

    @nn.compact
    def __call__(self, frames: Float[Array, "R H W 3"]) -> list[Float[Array, "R _h _w _D"]]:
        """Encodes R normalised frames (mean and standard deviation as UMT's).

        Returns:
            The output of each stage before its patch merging, finest first: at 224 pixels [R, 56, 56, 128],
            [R, 28, 28, 256], [R, 14, 14, 512], [R, 7, 7, 1024].
        """
        tokens = PatchEmbedding(self.width, self.patch, self.dtype, name="patch_embed")(frames.astype(self.dtype))
        tokens = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name="patch_norm")(tokens)
        taps: list[Array] = []
        for i, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            if taps:
                tokens = PatchMerging(self.dtype, name=f"merge_{i - 1}")(tokens)
            stage = SwinStage(depth, heads, self.window, self.mlp_ratio, self.dtype, self.remat, name=f"stages_{i}")
            tokens = stage(tokens)
            taps.append(tokens)
        return taps


class LinearFuse(nn.Module):
    """FaceXFormer's own fusion: each tap is projected and resized to the finest map, and a 1x1 convolution mixes all.

    Attributes:
        width: channels of each projection and of the result.
    """

    width: int = 256
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, taps: list[Float[Array, "R _h _w _D"]]) -> Float[Array, "R H W E"]:
        kernel = self.param("linear_fuse", nn.initializers.lecun_normal(), (len(taps) * self.width, self.width))
        # Published order: project, resize, concatenate deepest first, convolve. A pointwise linear map commutes with
        # interpolation, so each tap's share of the convolution runs on its own small map.
        shares = jnp.split(kernel.astype(self.dtype), len(taps))[::-1]
        height, width = taps[0].shape[1:3]
        maps = []
        for i, (tap, share) in enumerate(zip(taps, shares, strict=True)):
            projected = Linear(self.width, dtype=self.dtype, name=f"linear_c_{i}")(tap.astype(self.dtype))
            size = (tap.shape[0], height, width, self.width)
            maps.append(jax.image.resize(flat_product(projected, share), size, "bilinear", antialias=False))
        return sum(maps[1:], maps[0])
