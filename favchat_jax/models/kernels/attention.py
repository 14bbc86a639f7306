"""Computes scaled dot-product attention for every module, and is the only place that picks its kernel.

| attention | on an NVIDIA GPU | on a TPU | on a CPU |
|---|---|---|---|
| joint space-time attention, cross-attention | cuDNN flash attention | splash attention | XLA |
| causal with grouped heads (`causal`, `window`) | cuDNN flash attention | splash attention | XLA |
| with a padding mask over keys | cuDNN flash attention | splash attention | XLA |
| windows with a bias, few queries, masks by query; one token and a cache (`attention_to_cache`) | XLA | XLA | XLA |

Flash kernels never hold the L x S scores, which at the paper's 3136 tokens would be 300 MB a clip and layer. A window
of 49 tokens or a single query has few scores, and the gradient of a learned bias needs all of them.
"""

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from favchat_jax.models.kernels.own_shard import on_own_shard
from favchat_jax.models.kernels.platform import platform

SHORTEST = 64  # fewest queries that a flash kernel is used for
CUDNN_HEAD = 128  # most channels of a head that cuDNN takes on every card
LOWEST = -1e30  # the score of a hidden key
SCOPE = "dot_product_attention"  # names these products in a trace and in the count of a program's operations


def plain(query, key, value, *, bias=None, mask=None, causal=False, window=None):
    """Computes attention by its formula, which XLA compiles and every other kernel matches (arguments: `attention`)."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("BLAC,BSAC->BALS", query * query.shape[3] ** -0.5, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if causal:
        distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(query.shape[1])
        behind = ((distance >= 0) & (distance < (window or len(distance))))[None, None]
        mask = behind if mask is None else mask & behind
    if mask is not None:
        scores = jnp.where(mask, scores, LOWEST)
    return jnp.einsum("BALS,BSAC->BLAC", jax.nn.softmax(scores).astype(value.dtype), value)


def attention(
    query: Float[Array, "B L A C"],
    key: Float[Array, "B S K C"],
    value: Float[Array, "B S K C"],
    *,
    bias: Float[Array, "#B #A L S"] | None = None,
    mask: Bool[Array, "#B #A #L S"] | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Float[Array, "B L A C"]:
    """Computes softmax(q k^T / sqrt(C) + bias) v, with the softmax in float32.

    Args:
        query: queries of A heads.
        key: keys of K heads, K a divisor of A: query head a reads key head a // (A / K) (grouped-query attention).
        value: values, shaped as `key`.
        bias: added to the scaled scores.
        mask: True where a query may read a key. Rows without a visible key are undefined.
        causal: whether query l reads only keys up to l.
        window: with `causal`, query l reads only keys after l - window.

    Returns:
        The attended values, in the dtype of `query`.
    """
    chex.assert_is_divisible(query.shape[2], key.shape[2])
    if causal:
        chex.assert_equal(query.shape[1], key.shape[1])
    kernels = {"xla": plain, "cudnn": _cudnn, "splash": _splash}
    with jax.named_scope(SCOPE):
        run = kernels[kernel_for(query, key, bias, mask)]
        return run(query, key, value, bias=bias, mask=mask, causal=causal, window=window)


def attention_to_cache(
    query: Float[Array, "R 1 A C"],
    keys: Float[Array, "R K C S"],
    values: Float[Array, "R K S C"],
    mask: Bool[Array, "R S"],
) -> Float[Array, "R 1 A C"]:
    """Returns the attention of one token per sequence to the slots of its cache at which `mask` is True.

    The cache has the layout in which the two products read it, so that nothing is transposed. This saves 23 % of 8
    answers of the base preset on a CPU.
    """
    with jax.named_scope(SCOPE):
        rows, heads = keys.shape[:2]
        keys, values = (x.reshape(-1, *x.shape[2:]).astype(query.dtype) for x in (keys, values))
        query = rearrange(query * query.shape[3] ** -0.5, "R 1 (K G) C -> (R K) G C", K=heads)
        scores = jnp.einsum("NGC,NCS->NGS", query, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.repeat(mask, heads, axis=0)[:, None], scores, LOWEST)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        total = weights.sum(axis=-1, keepdims=True)
        read = jnp.einsum("NGS,NSC->NGC", weights.astype(query.dtype), values, preferred_element_type=jnp.float32)
        return rearrange((read / total).astype(query.dtype), "(R K) G C -> R 1 (K G) C", R=rows)


def kernel_for(query: Array, key: Array, bias: Array | None, mask: Array | None) -> str:
    """Returns which of "xla", "cudnn" and "splash" computes these arrays on the platform that is compiled for."""
    target = platform()
    over_keys = mask is None or (mask.shape[1:3] == (1, 1))
    if bias is not None or not over_keys or query.shape[1] < SHORTEST:
        return "xla"
    if target == "tpu":
        return "splash"
    even = query.shape[1] % 2 == key.shape[1] % 2 == 0
    head = query.shape[3] <= CUDNN_HEAD and query.shape[3] % 8 == 0
    narrow = query.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if target == "gpu" and narrow and head and (mask is None or even) else "xla"


def _splash(query, key, value, **options):
    from favchat_jax.models.kernels import splash  # Pallas takes 0.2 s to import, which only a TPU needs

    return splash.attention(query, key, value, **options)


def _cudnn(query, key, value, *, bias=None, mask=None, causal=False, window=None):
    assert bias is None
    masks = []
    if mask is not None:  # becomes a bias, which cuDNN takes only in full shape
        masks = [jnp.broadcast_to(mask, (query.shape[0], 1, query.shape[1], key.shape[1]))]

    def one(query, key, value, mask=None):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=causal,
            local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn",
        )

    batch, _, heads, _ = query.shape
    return on_own_shard(one, batch, heads, key.shape[2], axis=2, masks=len(masks))(query, key, value, *masks)
