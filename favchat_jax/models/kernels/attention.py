"""Scaled dot-product attention, which every module calls, and the only place that picks a kernel.

| attention | on an NVIDIA GPU | on a TPU | on a CPU |
|---|---|---|---|
| joint space-time attention, cross-attention | cuDNN flash attention | splash attention | XLA |
| causal with grouped heads (`causal`, `window`) | cuDNN flash attention | splash attention | XLA |
| with a padding mask over keys | cuDNN flash attention | splash attention | XLA |
| windows with a bias, few queries, masks by query; one token and a cache (`attention_to_cache`) | XLA | XLA | XLA |

Flash kernels never hold the L x S scores, which at the paper's 3136 tokens would be 300 MB a clip and layer. A window
of 49 tokens or a single query has next to none, and a learned bias would need them for its gradient.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from favchat_jax.models.kernels import splash, xla_attention

SHORTEST = 64  # queries from which on a flash kernel pays
CUDNN_HEAD = 128  # channels of a head that cuDNN takes on every card
SCOPE = "dot_product_attention"  # name of these products in a trace, and in a count of the program's work
_TARGET: ContextVar[str | None] = ContextVar("attention_target", default=None)


def plain(query, key, value, *, bias=None, mask=None, causal=False, window=None):
    """The formula that every kernel computes; arguments as of `attention`."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("BLAC,BSAC->BALS", query * query.shape[3] ** -0.5, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    mask = xla_attention.visible(query.shape[1], mask, causal, window)
    if mask is not None:
        scores = jnp.where(mask, scores, xla_attention.LOWEST)
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
    """softmax(q k^T / sqrt(C) + bias) v, with the softmax in float32.

    Args:
        query: queries of A heads.
        key: keys of K heads, K a divisor of A: query head a reads key head a // (A / K) (grouped-query attention).
        value: values, shaped as `key`.
        bias: added to the scaled scores.
        mask: True where a query may read a key. Rows without any True are undefined.
        causal: query l reads keys up to l alone.
        window: with `causal`, query l reads keys after l - window alone.

    Returns:
        The attended values, in the dtype of `query`.
    """
    chex.assert_is_divisible(query.shape[2], key.shape[2])
    if causal:
        chex.assert_equal(query.shape[1], key.shape[1])
    kernels = {"xla": xla_attention.attention, "cudnn": _cudnn, "splash": splash.attention}
    with jax.named_scope(SCOPE):
        run = kernels[kernel_for(query, key, bias, mask)]
        return run(query, key, value, bias=bias, mask=mask, causal=causal, window=window)


def attention_to_cache(
    query: Float[Array, "R 1 A C"],
    keys: Float[Array, "R K C S"],
    values: Float[Array, "R K S C"],
    mask: Bool[Array, "R S"],
) -> Float[Array, "R 1 A C"]:
    """One token of each sequence reads the slots of its cache at which `mask` is True.

    The cache has the layout in which the two products read it, so that nothing is transposed for a token.
    """
    with jax.named_scope(SCOPE):
        rows, heads = keys.shape[:2]
        keys, values = (x.reshape(-1, *x.shape[2:]).astype(query.dtype) for x in (keys, values))
        query = rearrange(query * query.shape[3] ** -0.5, "R 1 (K G) C -> (R K) G C", K=heads)
        scores = jnp.einsum("NGC,NCS->NGS", query, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.repeat(mask, heads, axis=0)[:, None], scores, xla_attention.LOWEST)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        total = weights.sum(axis=-1, keepdims=True)
        read = jnp.einsum("NGS,NSC->NGC", weights.astype(query.dtype), values, preferred_element_type=jnp.float32)
        return rearrange((read / total).astype(query.dtype), "(R K) G C -> R 1 (K G) C", R=rows)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Picks kernels for "cpu", "gpu" or "tpu" whatever this machine has: for compiling ahead of time."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def kernel_for(query: Array, key: Array, bias: Array | None, mask: Array | None) -> str:
    """Which of "xla", "cudnn" and "splash" these arrays go to, by the platform that is compiled for."""
    platform = _TARGET.get() or jax.default_backend()
    over_keys = mask is None or (mask.shape[1:3] == (1, 1))
    if bias is not None or not over_keys or query.shape[1] < SHORTEST:
        return "xla"
    if platform == "tpu":
        return "splash"
    even = query.shape[1] % 2 == key.shape[1] % 2 == 0
    head = query.shape[3] <= CUDNN_HEAD and query.shape[3] % 8 == 0
    narrow = query.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if platform == "gpu" and narrow and head and (mask is None or even) else "xla"


def _cudnn(query, key, value, *, bias=None, mask=None, causal=False, window=None):
    if mask is not None:  # becomes a bias, which cuDNN wants whole
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        is_causal=causal,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
