"""The two encoders of a clip in PyTorch: UMT and FaceXFormer's Swin, under the names of their published weights."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn


def attention(query, key, value, heads, mask=None):
    """Multi-head softmax(q k^T / sqrt(D) + mask) v for [..., L, D] and [..., S, D]; `mask` is boolean or additive."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(-2, -3).flatten(-2)


# General encoder: UMT-L/16.


def sinusoid_table(positions, width):
    """Returns [positions, width] float64: sin(p / 10000^(2i/width)) in even channels 2i, cos in odd channels 2i+1."""
    channel = torch.arange(width)
    frequencies = 10000.0 ** (-2 * (channel // 2).double() / width)
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos())


# Cached functions replace buffers, which would have to be filled again after loading on the meta device. The first call
# may be in inference mode and a later one in training, so inference mode is off.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def position_table(frames, height, width, channels, checkpoint_frames, checkpoint_grid):
    """Resamples the clip's sinusoid in space (bicubic), then in time (linear): [frames * height * width, channels].

    A single frame is an image: its table is the sinusoid over one frame's positions.
    """
    base_frames = 1 if frames == 1 else checkpoint_frames
    table = sinusoid_table(base_frames * checkpoint_grid**2, channels)
    table = table.view(base_frames, checkpoint_grid, checkpoint_grid, channels).permute(0, 3, 1, 2)
    if (height, width) != (checkpoint_grid, checkpoint_grid):
        table = F.interpolate(table, (height, width), mode="bicubic", align_corners=False)
    table = table.permute(2, 3, 1, 0).flatten(0, 1)  # [h w, D, T]
    if frames != base_frames:
        table = F.interpolate(table, frames, mode="linear", align_corners=False)
    return table.permute(2, 0, 1).flatten(0, 1).float()


class UMTAttention(nn.Module):
    """Joint space-time self-attention; query and value have a bias, the key has none."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, tokens):
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        return self.proj(attention(query + self.q_bias, key, value + self.v_bias, self.heads))


class UMTMLP(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens):
        return self.fc2(F.gelu(self.fc1(tokens)))


class UMTBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = UMTAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = UMTMLP(width)

    def forward(self, tokens):
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class UMT(nn.Module):
    """The general encoder: normalised frames [B, T, H, W, 3] to tokens [B, T*h*w, D], and the outputs of `taps`."""

    def __init__(self, *, width, heads, patch, layers_run, checkpoint_size, checkpoint_frames, taps=()):
        super().__init__()
        self.taps, self.checkpoint = tuple(taps), (checkpoint_frames, checkpoint_size // patch)
        size = (1, patch, patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, kernel_size=size, stride=size)})
        self.blocks = nn.ModuleList(UMTBlock(width, heads) for _ in range(layers_run))

    def forward(self, frames):
        patches = self.patch_embed["proj"](frames.permute(0, 4, 1, 2, 3))
        channels, *size = patches.shape[1:]
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = tokens + position_table(*size, channels, *self.checkpoint).to(tokens)
        tapped = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in self.taps:
                tapped.append(tokens)
        return tokens, tapped


# Facial encoder: FaceXFormer's encoder, which is torchvision's Swin without its last norm and head.


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def relative_position_index(window, table_window):
    """Returns [L, L]: the row of the bias table for each (query, key) of a window in raster order."""
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, window), indexing="ij"))
    row_offset = rows[:, None] - rows + table_window - 1
    return row_offset * (2 * table_window - 1) + columns[:, None] - columns + table_window - 1


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def shifted_window_mask(size, window, shift):
    """Returns [windows, 1, L, L]: True if two tokens of a window were in the same region before the roll."""
    rows, columns = (torch.arange(n) >= n - s for n, s in zip(size, shift, strict=True))
    regions = windows((2 * rows[:, None] + columns[None, :])[None, :, :, None], window).flatten(1)
    return (regions[:, :, None] == regions[:, None, :])[:, None]


def windows(tokens, window):
    """Splits a map [B, H, W, D] into windows [B * windows, L, D]."""
    batch, height, width, channels = tokens.shape
    tokens = tokens.view(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return tokens.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


class WindowAttention(nn.Module):
    """Self-attention within windows of a map [N, H, W, D], with a learned bias for each relative position.

    A map that does not divide into windows is padded with zeros, which take part in attention. A map smaller than the
    window is one window.
    """

    def __init__(self, width, heads, window, shifted):
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))

    def forward(self, tokens):
        batch, *size, width = tokens.shape
        window = tuple(min(self.window, n) for n in size)
        padded = tuple(-(-n // w) * w for n, w in zip(size, window, strict=True))
        shift = tuple(self.window // 2 if self.shifted and w < n else 0 for n, w in zip(padded, window, strict=True))

        tokens = F.pad(tokens, (0, 0, 0, padded[1] - size[1], 0, padded[0] - size[0]))
        tokens = windows(tokens.roll((-shift[0], -shift[1]), (1, 2)), window)
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        attended = self.proj(attention(query, key, value, self.heads, self._bias(padded, window, shift, len(tokens))))
        grid = (batch, padded[0] // window[0], padded[1] // window[1], *window, width)
        tokens = attended.view(grid).transpose(2, 3).reshape(batch, *padded, width).roll(shift, (1, 2))
        return tokens[:, : size[0], : size[1]]

    def _bias(self, padded, window, shift, count):
        table = self.relative_position_bias_table
        bias = table[relative_position_index(window, self.window).to(table.device)].permute(2, 0, 1)[None]
        if not any(shift):
            return bias
        mask = shifted_window_mask(padded, window, shift).to(table.device)
        return bias.masked_fill(~mask, -torch.inf).repeat(count // len(mask), 1, 1, 1)


class SwinBlock(nn.Module):
    """Pre-norm block: window attention, then an MLP (whose third layer is a dropout in the published model)."""

    def __init__(self, width, heads, window, shifted):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, shifted)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, tokens):
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PatchMerging(nn.Module):
    """Halves the map: 2x2 neighbours side by side (down the column first), norm, linear to twice the width."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, tokens):
        tokens = F.pad(tokens, (0, 0, 0, tokens.shape[2] % 2, 0, tokens.shape[1] % 2))
        top, bottom = tokens[:, ::2], tokens[:, 1::2]
        corners = (top[:, :, ::2], bottom[:, :, ::2], top[:, :, 1::2], bottom[:, :, 1::2])
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class ChannelsLast(nn.Module):
    """Moves channels last, [N, D, H, W] to [N, H, W, D], like torchvision's permutation."""

    def forward(self, maps):
        return maps.permute(0, 2, 3, 1)


class FaceXFormerEncoder(nn.Sequential):
    """The facial encoder: normalised frames [N, H, W, 3] to one map [N, h, w, D] per granularity, finest first.

    Its only module is torchvision's `features`, since the published names continue with `0.`.
    """

    def __init__(self, *, width, depths, heads, window, patch):
        patches = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        features = [nn.Sequential(patches, ChannelsLast(), nn.LayerNorm(width))]
        for i, (depth, own_heads) in enumerate(zip(depths, heads, strict=True)):
            if i:
                features.append(PatchMerging(width * 2 ** (i - 1)))
            blocks = (SwinBlock(width * 2**i, own_heads, window, j % 2 == 1) for j in range(depth))
            features.append(nn.Sequential(*blocks))
        super().__init__(nn.Sequential(*features))

    def forward(self, frames):
        tokens, maps = frames.permute(0, 3, 1, 2), []
        for number, layer in enumerate(self[0]):
            tokens = layer(tokens)
            if number % 2 == 1:
                maps.append(tokens)
        return maps


class ProjectedMaps(nn.ModuleList):
    """`linear_c` of FaceXFormer's own fusion: projects each map and resizes it to the finest one, deepest first."""

    def __init__(self, widths, width=256):
        super().__init__(nn.ModuleDict({"proj": nn.Linear(own, width)}) for own in widths)

    def forward(self, maps):
        """Projects and joins the maps, [N, h_i, w_i, D_i] to [N, 4 * width, H, W]."""
        projected = [layer["proj"](m).permute(0, 3, 1, 2) for layer, m in zip(self, maps, strict=True)]
        size = maps[0].shape[1:3]
        resized = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in projected]
        return torch.cat(resized[::-1], dim=1)
