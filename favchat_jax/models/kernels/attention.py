"""Scaled dot-product attention, which every module calls, and the only place that picks a kernel.

| who calls | on an NVIDIA GPU | on a TPU | on a CPU |
|---|---|---|---|
| joint space-time attention, cross-attention | cuDNN flash attention | splash attention | XLA |
| causal with grouped heads (`causal`, `window`) | cuDNN flash attention | splash attention | XLA |
| a padding mask over keys | cuDNN flash attention | splash attention | XLA |
| windows with a bias, few queries, masks by query; one more token and a cache (`one_more`) | XLA | XLA | XLA |

Flash kernels never hold the L x S scores, which at the paper's 3136 tokens would be 300 MB a clip and layer. A window
of 49 tokens or a single query has next to none, and a learned bias would need them for its gradient.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from favchat_jax.sharding import CLIPS

LANES = 128  # a TPU's; splash attention takes lengths in multiples of it
BLOCK = 512  # queries and keys that a splash kernel holds at once, at most
SHORTEST = 64  # queries from which on a flash kernel pays
CUDNN_HEAD = 128  # channels of a head that cuDNN takes on every card
LOWEST = -1e30  # the score of what is hidden
SCOPE = "dot_product_attention"  # by which a trace, or a count of the program's work, tells these products
_TARGET: ContextVar[str | None] = ContextVar("attention_target", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Picks kernels for "cpu", "gpu" or "tpu" whatever this machine has: for compiling ahead of time."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    *,
    bias: Float[Array, "#B #H L S"] | None = None,
    mask: Bool[Array, "#B #H #L S"] | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Float[Array, "B L H D"]:
    """softmax(q k^T / sqrt(D) + bias) v, with the softmax in float32.

    Args:
        query: queries of H heads.
        key: keys of K heads, K a divisor of H: query head h reads key head h // (H / K) (grouped-query attention).
        value: values, shaped as `key`.
        bias: added to the scaled scores.
        mask: True where a query may read a key. What a query without any True returns is of no meaning.
        causal: query l reads keys up to l alone.
        window: with `causal`, query l reads keys after l - window alone.

    Returns:
        The attended values, in the dtype of `query`.
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    chex.assert_is_divisible(query.shape[2], key.shape[2])
    if causal:
        chex.assert_equal(query.shape[1], key.shape[1])
    run = {"xla": _plain, "cudnn": _cudnn, "splash": _splash}[kernel_for(query, key, bias, mask)]
    with jax.named_scope(SCOPE):
        return run(query, key, value, bias=bias, mask=mask, causal=causal, window=window)


def one_more(
    query: Float[Array, "B 1 H D"],
    keys: Float[Array, "B K D S"],
    values: Float[Array, "B K S D"],
    mask: Bool[Array, "B S"],
) -> Float[Array, "B 1 H D"]:
    """A token that is decoded reads the slots of a cache at which `mask` is True.

    The cache lies as the two products read it, group by group.
    """
    with jax.named_scope(SCOPE):
        rows, heads = keys.shape[:2]
        keys, values = (x.reshape(-1, *x.shape[2:]).astype(query.dtype) for x in (keys, values))
        query = rearrange(query * query.shape[3] ** -0.5, "B 1 (K G) D -> (B K) G D", K=heads)
        scores = jnp.einsum("NGD,NDS->NGS", query, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.repeat(mask, heads, axis=0)[:, None], scores, LOWEST)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        total = weights.sum(axis=-1, keepdims=True)
        read = jnp.einsum("NGS,NSD->NGD", weights.astype(query.dtype), values, preferred_element_type=jnp.float32)
        return rearrange((read / total).astype(query.dtype), "(B K) G D -> B 1 (K G) D", B=rows)


def kernel_for(query: Array, key: Array, bias: Array | None, mask: Array | None) -> str:
    """Which of "xla", "cudnn" and "splash" these arrays go to, by the platform that is compiled for."""
    platform = _TARGET.get() or jax.default_backend()
    over_keys = mask is None or (mask.shape[1:3] == (1, 1))
    if bias is not None or not over_keys or query.shape[1] < SHORTEST:
        return "xla"
    if platform == "tpu":  # over several chips a kernel is divided by the mesh that is set, or not at all
        alone = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
        return "splash" if alone else "xla"
    # With a mask, cuDNN takes even lengths alone; float32 it does not take at all.
    even = query.shape[1] % 2 == key.shape[1] % 2 == 0
    head = query.shape[3] <= CUDNN_HEAD and query.shape[3] % 8 == 0
    narrow = query.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if platform == "gpu" and narrow and head and (mask is None or even) else "xla"


def _plain(query, key, value, *, bias=None, mask=None, causal=False, window=None):
    if causal:
        distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])
        behind = (distance >= 0) & (distance < (window or query.shape[1]))
        mask = behind[None, None] if mask is None else mask & behind
    # Products of four dimensions; those of grouped heads would have five, which XLA lays out anew.
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[3] ** -0.5, key, value))
    return jnp.swapaxes(_scored(query, key, value, bias, mask), 1, 2)


@jax.custom_vjp
def _scored(query, key, value, bias, mask):
    """Attention with all of its scores, [B, H, L, S], and a gradient that passes over them half as often as autodiff's.

    Values are summed under weights that do not add up to 1 yet, since dividing the sums is less to divide. In the
    backward pass the sum over a row of the weights times their gradients is the product of the output with its own
    (as in flash attention), and gradients of keys and values are products whose small factor is the transposed one.
    """
    return _scored_forward(query, key, value, bias, mask)[0]


def _scored_forward(query, key, value, bias, mask):
    scores = jnp.einsum("BHLD,BHSD->BHLS", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, LOWEST)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    summed = jnp.einsum("BHLS,BHSD->BHLD", weights, value, preferred_element_type=jnp.float32)
    out = (summed / total).astype(query.dtype)
    return out, (query, key, value, bias, mask, weights, total, out)


def _scored_backward(saved, d_out):
    query, key, value, bias, mask, weights, total, out = saved
    along = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1, keepdims=True) / total
    d_sum = (d_out / total).astype(value.dtype)
    d_weights = jnp.einsum("BHLD,BHSD->BHLS", d_sum, value, preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights - along)
    if mask is not None:
        d_scores = jnp.where(mask, d_scores, 0)
    # Behind a barrier it exists once; fused into both products below it would be computed for each.
    d_scores = jax.lax.optimization_barrier(d_scores)
    d_bias = None if bias is None else _summed_to(bias, d_scores)
    d_scores = d_scores.astype(query.dtype)
    d_query = jnp.einsum("BHLS,BHSD->BHLD", d_scores, key)
    d_key = jnp.einsum("BHLD,BHLS->BHDS", query, d_scores)
    d_value = jnp.einsum("BHLD,BHLS->BHDS", d_sum, weights)
    return d_query, jnp.swapaxes(d_key, 2, 3), jnp.swapaxes(d_value, 2, 3), d_bias, None


def _summed_to(bias, d_scores):
    """The gradient of what was broadcast over the scores."""
    repeated = [axis for axis, size in enumerate(bias.shape) if size != d_scores.shape[axis]]
    return d_scores.sum(axis=repeated, keepdims=True).astype(bias.dtype)


_scored.defvjp(_scored_forward, _scored_backward)


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


def _splash(query, key, value, *, bias=None, mask=None, causal=False, window=None, interpret=False):
    """Splash attention on lengths padded to whole lanes; padding and masked keys are a segment that no query is of."""
    assert bias is None
    batch, length, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    seen = jnp.ones((batch, keys), bool) if mask is None else jnp.broadcast_to(mask[:, 0, 0], (batch, keys))

    def laid_out(x):
        return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, -x.shape[1] % LANES), (0, 0)])

    def one(query, key, value, seen):
        # Computed while tracing, as constants of the program: no tracer may end up in the cache.
        with jax.ensure_compile_time_eval():
            kernel = _splash_kernel(query.shape[0], query.shape[1], key.shape[1], causal, window, interpret)
        segments = splash.SegmentIds(jnp.ones(query.shape[1], jnp.int32), seen)
        return kernel(query * width**-0.5, key, value, segments)

    run = _on_own_shard(jax.vmap(one), heads, key_heads, batch)
    seen = jnp.pad(seen, [(0, 0), (0, -keys % LANES)]).astype(jnp.int32)
    attended = run(laid_out(query), laid_out(key), laid_out(value), seen)
    return jnp.swapaxes(attended[:, :, :length], 1, 2).astype(query.dtype)


@functools.lru_cache(maxsize=64)
def _splash_kernel(heads: int, length: int, keys: int, causal: bool, window: int | None, interpret: bool):
    mask = splash.CausalMask((length, keys)) if causal else splash.FullMask((length, keys))
    if window is not None:
        mask = splash.LocalMask((length, keys), (window - 1, 0), 0)
    q, kv = (_block(n) for n in (length, keys))
    sizes = splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    masks = splash.MultiHeadMask([mask] * heads)
    return splash.make_splash_mha(masks, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _block(length: int) -> int:
    """The largest multiple of `LANES` up to `BLOCK` that divides a length."""
    return max(n for n in range(LANES, min(BLOCK, length) + 1, LANES) if length % n == 0)


def _on_own_shard(run, heads: int, key_heads: int, batch: int):
    """`run` on each device's own clips and heads where a mesh is set, since XLA cannot divide a kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run
    size = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    rows = tuple(axis for axis in CLIPS if size.get(axis, 1) > 1)
    if batch % int(np.prod([size[axis] for axis in rows])):
        rows = ()
    tensor = size.get("tensor", 1)
    split = "tensor" if tensor > 1 and heads % tensor == key_heads % tensor == 0 else None
    whole, flat = PartitionSpec(rows or None, split), PartitionSpec(rows or None)
    return jax.shard_map(run, in_specs=(whole, whole, whole, flat), out_specs=whole, check_vma=False)
