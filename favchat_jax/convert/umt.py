"""Table of UMT-L and its norm as published by VideoChat2 (github: OpenGVLab/Ask-Anything, `umt_l16_qformer.pth`)."""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from favchat_jax.checkpoints.table import Row, Shape, Table, linear, norm, prefixed
from favchat_jax.models.umt import UMT

BLOCK = (
    *norm("norm1", "norm1"),
    Row("attn.q_bias", "attn/q_bias"),
    Row("attn.v_bias", "attn/v_bias"),
    *linear("attn.qkv", "attn/qkv", bias=False),
    *linear("attn.proj", "attn/proj"),
    *norm("norm2", "norm2"),
    *linear("mlp.fc1", "mlp/fc1"),
    *linear("mlp.fc2", "mlp/fc2"),
)
ROWS = (
    Row("vision_encoder.encoder.patch_embed.proj.weight", "umt/patch_embed/proj/kernel", "frame patches"),
    Row("vision_encoder.encoder.patch_embed.proj.bias", "umt/patch_embed/proj/bias"),
    *prefixed(BLOCK, published="vision_encoder.encoder.blocks.{i}.", path="umt/blocks/"),
    *norm("vision_layernorm", "vision_layernorm"),
)
IGNORED = (
    (r"vision_encoder\.encoder\.blocks\.23\..*", "the last of 24 blocks, which VideoChat2 does not run"),
    (r"vision_encoder\.encoder\.(img_)?pos_embed", "sinusoids, computed here"),
    (r"vision_temp_embed", "only used in the Q-Former's pretraining"),
    (r"temp|(vision_proj|text_proj|itm_head)\..*", "losses of the Q-Former's pretraining"),
)
TABLE = Table(
    "UMT",
    ROWS,
    ignored=(*IGNORED, (r"qformer\..*|(extra_)?query_tokens", "the Q-Former: --kind=qformer")),
    hint="it is not UMT-L",
)


def weight_shapes(model: UMT | None = None) -> dict[str, Shape]:
    """Returns path -> shape of the weights of the encoder (UMT-L by default) and of its norm."""
    model = model or UMT()
    side = model.patch
    frames = jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32)
    tree = jax.eval_shape(model.init, jax.random.key(0), frames)["params"]
    shapes = {f"umt/{path}": leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    return {**shapes, **{f"vision_layernorm/{name}": (model.width,) for name in ("scale", "bias")}}
