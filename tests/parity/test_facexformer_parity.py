"""FaceXFormer's encoder against transformers' and torchvision's Swin, its fusion against its published layers."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SwinConfig, SwinModel

from favchat_jax.convert import facexformer
from favchat_jax.models.facexformer import FaceXFormerEncoder, LinearFuse
from tests.parity.conftest import SEEDS, converted, moved, saved

DEPTHS, HEADS, WIDTHS = (2, 2, 2, 2), (4, 8, 16, 32), (128, 256, 512, 1024)
ENCODER = FaceXFormerEncoder(depths=DEPTHS)
# transformers' names -> torchvision's, which FaceXFormer publishes.
BLOCK = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj"}
BLOCK |= {"attention.relative_position_bias": "attn", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}


def published(swin: SwinModel) -> dict[str, Tensor]:
    """Renames the weights of transformers' Swin to the names of FaceXFormer's backbone."""
    state, names = swin.state_dict(), {}
    for kind in ("weight", "bias"):
        names[f"embeddings.patch_embeddings.projection.{kind}"] = f"0.0.{kind}"
        names[f"embeddings.norm.{kind}"] = f"0.2.{kind}"
        names[f"layernorm.{kind}"] = None
    result = {}
    for name, tensor in state.items():
        if name.startswith("encoder.layers."):
            stage, kind, rest = int(name.split(".")[2]), *name.split(".", 4)[3:]
            place = f"{1 + 2 * stage}." if kind == "blocks" else f"{2 + 2 * stage}."
            for ours, theirs in BLOCK.items():
                rest = rest.replace(ours, theirs)
            if ".attention." in rest:  # query, key and value are one layer there
                block, layer = rest.split(".attention.")
                if layer.startswith("q_proj"):
                    parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                    result[f"{place}{block}.attn.qkv.{layer.split('.')[1]}"] = torch.cat(parts)
                continue
            result[place + rest] = tensor
        elif names[name]:
            result[names[name]] = tensor
    return {f"backbone.0.{name}": tensor for name, tensor in result.items()}


class Fusion(torch.nn.Module):
    """Projects each tap to 256 channels, resizes it, concatenates all with the deepest first, and convolves (1x1)."""

    def __init__(self):
        super().__init__()
        self.linear_c = torch.nn.ModuleList(torch.nn.ModuleDict({"proj": torch.nn.Linear(w, 256)}) for w in WIDTHS)
        self.linear_fuse = torch.nn.Conv2d(1024, 256, 1, bias=False)

    def forward(self, taps: list[Tensor]) -> Tensor:
        """Takes taps and returns the result with channels second."""
        maps = [
            layer["proj"](tap.movedim(1, -1)).movedim(-1, 1) for tap, layer in zip(taps, self.linear_c, strict=True)
        ]
        maps = [F.interpolate(m, taps[0].shape[2:], mode="bilinear", align_corners=False) for m in maps]
        return self.linear_fuse(torch.cat(maps[::-1], 1))


@jax.jit
def ours(weights: dict, frames: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    taps = ENCODER.apply({"params": weights["facexformer"]}, frames)
    return taps, LinearFuse().apply({"params": weights["linear_fuse"]}, taps)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_four_taps_are_swins_and_the_fused_map_is_facexformers(seed, tmp_path, same):
    torch.manual_seed(seed)
    config = SwinConfig(embed_dim=128, depths=list(DEPTHS), num_heads=list(HEADS), window_size=7, image_size=224)
    swin, fusion = moved(SwinModel(config, add_pooling_layer=False)), moved(Fusion())
    frames = torch.randn(2, 3, 224, 224)
    taps = []
    with torch.no_grad():
        embedded, size = swin.embeddings(frames)
        options = {"output_hidden_states": True, "output_hidden_states_before_downsampling": True}
        taps = list(swin.encoder(embedded, size, **options).reshaped_hidden_states[1:])
        fused = fusion(taps)
    state = {**published(swin), **fusion.state_dict(), "backbone.1.weight": torch.ones(1024)}
    compare(state, frames, taps, fused, seed, tmp_path, same, "transformers' Swin-B")


def compare(state, frames, taps, fused, seed, folder, same, reference):
    """Saves a state dict as FaceXFormer publishes it, converts it, and compares all taps and the fused map."""
    file = saved(state, folder / "facexformer.pt", key="state_dict_backbone")
    shapes = facexformer.weight_shapes(ENCODER)
    weights = converted(facexformer.TABLE, file, shapes, folder / "facexformer")
    result, result_fused = ours(weights, jnp.asarray(frames.movedim(1, -1).numpy()))
    for i, (tap, expected) in enumerate(zip(result, taps, strict=True), start=1):
        same(f"FaceXFormer, tap {i} ({reference})", seed, tap, expected.movedim(1, -1))
    same(f"FaceXFormer, fused map ({reference})", seed, result_fused, fused.movedim(1, -1))


def test_the_taps_are_those_of_torchvisions_layers_under_its_own_names(tmp_path, same):
    with contextlib.suppress(Exception):  # a build for another PyTorch fails in many ways
        from torchvision.models.swin_transformer import SwinTransformer
    if "SwinTransformer" not in locals():
        pytest.skip("torchvision is not installed, or of another build than torch")
    torch.manual_seed(0)
    sizes = {"embed_dim": 128, "depths": list(DEPTHS), "num_heads": list(HEADS), "window_size": [7, 7]}
    swin, fusion = moved(SwinTransformer(patch_size=[4, 4], **sizes)), moved(Fusion())
    backbone = torch.nn.Sequential(*list(swin.children())[:-1])  # without its head, as FaceXFormer has it
    frames, taps = torch.randn(2, 3, 224, 224), []
    for i in (1, 3, 5, 7):
        backbone[0][i].register_forward_hook(lambda module, given, output: taps.append(output.movedim(-1, 1)))
    with torch.no_grad():
        backbone(frames)
        fused = fusion(taps)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    compare({**state, **fusion.state_dict()}, frames, taps, fused, 0, tmp_path, same, "torchvision's Swin-B")
