"""Table of BLIP-2's Q-Former as published by VideoChat2 (github: OpenGVLab/Ask-Anything, `umt_l16_qformer.pth`)."""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from favchat_jax.checkpoints.table import Row, Shape, Table, linear, norm, prefixed
from favchat_jax.models.qformer import QFormer


def _attention(published: str, path: str) -> tuple[Row, ...]:
    projections = (linear(f"{published}.self.{name}", f"{path}/{name}") for name in ("query", "key", "value"))
    return *(row for rows in projections for row in rows), *_end(f"{published}.output", path)


def _mlp(published_in: str, published_out: str, path: str) -> tuple[Row, ...]:
    return *linear(f"{published_in}.dense", f"{path}/intermediate"), *_end(published_out, path)


def _end(published: str, path: str) -> tuple[Row, ...]:
    return *linear(f"{published}.dense", f"{path}/output"), *norm(f"{published}.LayerNorm", f"{path}/norm")


LAYER = (
    *_attention("attention", "attention"),
    *_attention("crossattention", "crossattention"),
    *_mlp("intermediate", "output", "mlp"),
    *_mlp("intermediate_query", "output_query", "mlp_query"),
)
BERT = (
    Row("embeddings.word_embeddings.weight", "word_embeddings/embedding"),
    Row("embeddings.position_embeddings.weight", "position_embeddings/embedding"),
    *norm("embeddings.LayerNorm", "embeddings_norm"),
    *prefixed(LAYER, published="encoder.layer.{i}.", path="layer_{i}/"),
)
QUERIES = (
    Row("query_tokens", "query_tokens", "leading axis"),
    Row("extra_query_tokens", "extra_query_tokens", "leading axis"),
)
ROWS = (*prefixed(BERT, published="qformer.bert."), *QUERIES)
IGNORED = (
    (r"qformer\.bert\.embeddings\.position_ids", "a count from 0, computed here"),
    (r"qformer\.cls\..*", "BERT's word prediction, only used in the Q-Former's pretraining"),
    (r"temp|(vision_proj|text_proj|itm_head)\..*", "losses of the Q-Former's pretraining"),
)
OPTIONAL = (
    (r"(.*/)?extra_query_tokens", "added by instruction tuning; newly initialised"),
    (
        r"(.*/)?((word|position)_embeddings/embedding|layer_\d+/mlp/.*)",
        "the text branch, which VideoChat2's stage 2 omits; newly initialised",
    ),
)
TABLE = Table(
    "the Q-Former",
    ROWS,
    ignored=(*IGNORED, (r"vision_(encoder|layernorm)\..*|vision_temp_embed", "the general encoder: --kind=umt")),
    optional=OPTIONAL,
    hint="it is not of BERT-base",
)


def weight_shapes(model: QFormer | None = None, visual: int = 1024) -> dict[str, Shape]:
    """Returns path -> shape of a Q-Former's weights (by default the published one); `visual` is its input width."""
    model = model or QFormer()
    tokens = jax.ShapeDtypeStruct((1, 1, visual), jnp.float32)
    prompt, mask = (jax.ShapeDtypeStruct((1, 1, 1), dtype) for dtype in (jnp.int32, jnp.bool_))
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens, prompt, mask)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
