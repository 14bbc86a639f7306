"""Table of FaceXFormer's encoder and its own fusion (github: Kartik-3004/facexformer, key `state_dict_backbone`)."""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from favchat_jax.checkpoints.table import Row, Shape, Table, linear, norm, prefixed
from favchat_jax.models.facexformer import FaceXFormerEncoder, LinearFuse

STAGES = 4
BLOCK = (
    *norm("norm1", "norm1"),
    Row("attn.relative_position_bias_table", "attn/relative_position_bias_table"),
    *linear("attn.qkv", "attn/qkv"),
    *linear("attn.proj", "attn/proj"),
    *norm("norm2", "norm2"),
    *linear("mlp.0", "mlp/fc1"),
    *linear("mlp.3", "mlp/fc2"),
)
# torchvision's `features`: 0 is the patches and their norm; 1, 3, 5, 7 are stages; 2, 4, 6 are the merging layers.
SWIN = (
    Row("0.0.weight", "patch_embed/proj/kernel", "patches"),
    Row("0.0.bias", "patch_embed/proj/bias"),
    *norm("0.2", "patch_norm"),
    *(
        row
        for i in range(STAGES)
        for row in prefixed(BLOCK, published=f"{1 + 2 * i}.{{j}}.", path=f"stages_{i}/blocks_{{j}}/")
    ),
    *(
        row
        for i in range(STAGES - 1)
        for row in (
            *norm(f"{2 + 2 * i}.norm", f"merge_{i}/norm"),
            *linear(f"{2 + 2 * i}.reduction", f"merge_{i}/reduction", bias=False),
        )
    ),
)
ENCODER = prefixed(SWIN, published="backbone.0.", path="facexformer/")
FUSE = (
    *linear("linear_c.{i}.proj", "linear_fuse/linear_c_{i}"),
    Row("linear_fuse.weight", "linear_fuse/linear_fuse", "pointwise"),
)
TABLE = Table(
    "FaceXFormer",
    (*ENCODER, *FUSE),
    ignored=(
        (r"backbone\.0\..*\.relative_position_index", "computed here"),
        (r"backbone\.1\..*", "torchvision's last norm, which FaVChat does not use"),
        (r"pe_layer\..*|face_decoder\..*", "FaceXFormer's decoder, which FaVChat does not use"),
    ),
    hint="it is not of Swin-B",
)


def weight_shapes(encoder: FaceXFormerEncoder | None = None, fuse: LinearFuse | None = None) -> dict[str, Shape]:
    """Returns path -> shape of the weights of the encoder (Swin-B by default) and of its fusion."""
    encoder, fuse = encoder or FaceXFormerEncoder(), fuse or LinearFuse()
    side = encoder.patch * encoder.window * 2 ** len(encoder.depths)
    frames = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    taps, swin = jax.eval_shape(encoder.init_with_output, jax.random.key(0), frames)
    tree = {"facexformer": swin["params"], "linear_fuse": jax.eval_shape(fuse.init, jax.random.key(0), taps)["params"]}
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
