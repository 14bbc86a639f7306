"""UMT against a PyTorch reference written from the published description of its block and position tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import linen as nn
from torch import Tensor

from favchat_jax.convert import umt
from favchat_jax.models.umt import UMT, VISION_LAYERNORM_EPSILON, position_table
from tests.parity.conftest import SEEDS, converted, moved, saved

WIDTH, HEADS, BLOCKS = 1024, 16, 2


class Attention(torch.nn.Module):
    """16 heads; query and value have a bias, key has none."""

    def __init__(self):
        super().__init__()
        self.q_bias, self.v_bias = (torch.nn.Parameter(torch.zeros(WIDTH)) for _ in "qv")
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros(WIDTH), self.v_bias])
        qkv = (self.qkv(x) + bias).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(torch.nn.Module):
    """Pre-norm, LayerNorm of epsilon 1e-6, an MLP of four times the width with the exact GELU."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (torch.nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn = Attention()
        self.mlp = torch.nn.ModuleDict(
            {"fc1": torch.nn.Linear(WIDTH, 4 * WIDTH), "fc2": torch.nn.Linear(4 * WIDTH, WIDTH)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def reference_positions(frames: int, side: int) -> Tensor:
    """Returns the table over 4 frames of 14 x 14 positions, resampled in space (bicubic), then in time (linear)."""
    base = 1 if frames == 1 else 4
    angles = np.arange(base * 196)[:, None] / np.power(10000, 2 * (np.arange(WIDTH) // 2) / WIDTH)
    angles[:, 0::2], angles[:, 1::2] = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    table = torch.tensor(angles, dtype=torch.float).reshape(base, 14, 14, WIDTH)
    if side != 14:
        table = F.interpolate(table.permute(0, 3, 1, 2), (side, side), mode="bicubic", align_corners=False)
        table = table.permute(0, 2, 3, 1)
    if frames != base:
        table = F.interpolate(table.permute(1, 2, 3, 0).flatten(0, 1), frames, mode="linear")
        table = table.unflatten(0, (side, side)).permute(3, 0, 1, 2)
    return table


class Reference(torch.nn.Module):
    """The encoder's first two blocks under their published names, and the norm after it."""

    def __init__(self):
        super().__init__()
        encoder = torch.nn.Module()
        encoder.patch_embed = torch.nn.Module()
        encoder.patch_embed.proj = torch.nn.Conv3d(3, WIDTH, (1, 16, 16), (1, 16, 16))
        encoder.blocks = torch.nn.ModuleList(Block() for _ in range(BLOCKS))
        self.vision_encoder = torch.nn.Module()
        self.vision_encoder.encoder = encoder
        self.vision_layernorm = torch.nn.LayerNorm(WIDTH, eps=1e-12)
        for module in self.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(module.weight)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        encoder = self.vision_encoder.encoder
        x = encoder.patch_embed.proj(frames).permute(0, 2, 3, 4, 1)
        x = (x + reference_positions(*x.shape[1:3])).flatten(1, 3)
        for block in encoder.blocks:
            x = block(x)
        return self.vision_layernorm(x)


@pytest.mark.parametrize("seed", SEEDS)
def test_umt_computes_what_the_reference_does_at_4_8_and_16_frames(seed, tmp_path, same):
    torch.manual_seed(seed)
    reference = moved(Reference())
    model = UMT(depth=BLOCKS + 1, layers_run=BLOCKS)
    file = saved(reference.state_dict(), tmp_path / "umt.pth")
    weights = converted(umt.TABLE, file, umt.weight_shapes(model), tmp_path / "umt")
    norm = nn.LayerNorm(VISION_LAYERNORM_EPSILON, use_fast_variance=False)

    @jax.jit
    def ours(weights, frames):
        tokens, _ = model.apply({"params": weights["umt"]}, frames)
        return norm.apply({"params": weights["vision_layernorm"]}, tokens)

    # Frames of 112 pixels, whose positions are resampled in space too; those of 224 once, since they take minutes.
    for count, side in [(4, 112), (8, 112), (16, 112), *([(8, 224)] if seed == 0 else [])]:
        frames = torch.randn(1, 3, count, side, side)
        result = ours(weights, jnp.asarray(frames.permute(0, 2, 3, 4, 1).numpy()))
        same(f"UMT, 2 blocks, {count} frames of {side} pixels", seed, result, reference(frames))


@pytest.mark.parametrize(("frames", "side"), [(1, 14), (4, 14), (8, 14), (16, 14), (1, 24), (4, 24), (16, 24), (2, 7)])
def test_position_tables_are_the_references_interpolation(frames, side, same):
    ours = position_table(frames, side, side, WIDTH, checkpoint_frames=4, checkpoint_grid=14)
    same("UMT, position tables", 0, ours, reference_positions(frames, side))
