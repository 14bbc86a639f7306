"""Runs splash attention, a TPU's flash attention, on lengths padded to full lanes and on each device's own shard."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from favchat_jax.models.kernels.own_shard import on_own_shard

LANES = 128  # a TPU's; splash attention takes lengths in multiples of it
BLOCK = 512  # queries and keys that a kernel holds at once, at most


def attention(query, key, value, *, bias=None, mask=None, causal=False, window=None, interpret=False):
    """Computes `attention.plain` without a bias and with masks over keys only.

    Padding and masked keys form a segment to which no query belongs. `interpret` runs the kernel without a TPU.
    """
    assert bias is None
    batch, length, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    seen = jnp.ones((batch, keys), bool) if mask is None else jnp.broadcast_to(mask[:, 0, 0], (batch, keys))

    def laid_out(x):
        return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, -x.shape[1] % LANES), (0, 0)])

    def one(query, key, value, seen):
        # Computed while tracing, as constants of the program, so that the cache holds no tracer.
        with jax.ensure_compile_time_eval():
            kernel = _kernel(query.shape[0], query.shape[1], key.shape[1], causal, window, interpret)
        segments = splash.SegmentIds(jnp.ones(query.shape[1], jnp.int32), seen)
        return kernel(query * width**-0.5, key, value, segments)

    run = on_own_shard(jax.vmap(one), batch, heads, key_heads, axis=1)
    seen = jnp.pad(seen, [(0, 0), (0, -keys % LANES)]).astype(jnp.int32)
    attended = run(laid_out(query), laid_out(key), laid_out(value), seen)
    return jnp.swapaxes(attended[:, :, :length], 1, 2).astype(query.dtype)


@functools.lru_cache(maxsize=64)
def _kernel(heads: int, length: int, keys: int, causal: bool, window: int | None, interpret: bool):
    mask: splash.CausalMask | splash.FullMask | splash.LocalMask
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
