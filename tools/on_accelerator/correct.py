"""Checks that the device computes what a CPU does: attention at the paper's shapes, and the first training losses."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from favchat_jax import sharding
from favchat_jax.models.kernels.attention import attention, attention_to_cache, kernel_for, plain
from favchat_jax.planning import plan
from tools.on_accelerator import drawn

Keep = Callable[[list[dict[str, Any]]], None]  # takes the rows that a part has so far

CLOSE = 2e-2  # largest relative error of bfloat16 attention, in values and in gradients
# Losses of stage 2's first steps with the embedded preset's sizes and drawn weights, recorded on a CPU.
LOSSES = (8.72257, 8.23003, 7.81064, 7.55877)
SAME = 1e-3  # largest relative difference of a loss

# Form of attention -> batch, queries, keys, heads, key heads, channels of a head at the paper's sizes, and the rest.
WAYS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "joint space-time": ((1, 3136, 3136, 16, 16, 64), {}),
    "cross-attention": ((2, 160, 3136, 12, 12, 64), {}),
    "cross-attention to masked keys": ((2, 96, 64, 12, 12, 64), {"padding": 0.1}),
    "causal, grouped heads": ((2, 512, 512, 32, 8, 128), {"causal": True}),
    "causal, grouped heads, padding": ((2, 512, 512, 32, 8, 128), {"causal": True, "padding": 0.2}),
    "causal, window": ((1, 1024, 1024, 32, 8, 128), {"causal": True, "window": 512}),
}


def kernels(preset: str, folder: Path, until: float, keep: Keep) -> None:
    """Compares each form of attention with the plain one in float32; measures both in bfloat16."""
    del folder, until
    rows = []
    for name in WAYS:
        rows.append(_way(name, *WAYS[name], shrink=preset != "paper"))
        keep(rows)
    keep([*rows, _one_token(preset != "paper")])


def _way(name: str, sizes: tuple[int, ...], how: dict[str, Any], shrink: bool) -> dict[str, Any]:
    batch, queries, keys, heads, key_heads, width = sizes
    if shrink:
        queries, keys, heads, key_heads = max(64, queries // 8), max(64, keys // 8), heads // 4, key_heads // 4
    how = dict(how)
    visible = jnp.arange(keys) < keys - round(keys * how.pop("padding", 0.0))
    if not bool(visible.all()):
        how["mask"] = jnp.broadcast_to(visible, (batch, 1, 1, keys))
    shapes = [(batch, queries, heads, width), *[(batch, keys, key_heads, width)] * 2, (batch, queries, heads, width)]
    exact = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    narrow = [x.astype(jnp.bfloat16) for x in exact]
    exact = [x.astype(jnp.float32) for x in narrow]

    @functools.partial(jax.jit, static_argnames="kernel")
    def run(query, key, value, cotangent, kernel):
        out, pull = jax.vjp(lambda *x: kernel(*x, **how), query, key, value)
        return out, *pull(cotangent)

    with jax.default_matmul_precision("highest"):
        expected = run(*exact, kernel=plain)
    found = run(*narrow, kernel=attention)
    errors = [_error(one, other) for one, other in zip(found, expected, strict=True)]
    return {
        "attention": name,
        "kernel": kernel_for(*narrow[:2], None, how.get("mask")),
        "error": errors[0],
        "gradient_error": max(errors[1:]),
        "right": all(error <= CLOSE for error in errors),
        "seconds": _seconds(lambda: run(*narrow, kernel=attention)),
        "plain_seconds": _seconds(lambda: run(*narrow, kernel=plain)),
    }


def _one_token(shrink: bool) -> dict[str, Any]:
    """Compares the attention of one token to a cache, at batch 8, with the plain form."""
    rows, slots, heads, key_heads, width = (2, 96, 4, 2, 64) if shrink else (8, 640, 32, 8, 128)
    query = jax.random.normal(jax.random.key(0), (rows, 1, heads, width), jnp.bfloat16)
    keys, values = (jax.random.normal(jax.random.key(i), (rows, slots, key_heads, width), jnp.bfloat16) for i in (1, 2))
    mask = jnp.arange(slots) < jnp.arange(slots - rows, slots)[:, None]
    wide = [x.astype(jnp.float32) for x in (query, keys, values)]
    with jax.default_matmul_precision("highest"):
        expected = plain(*wide, mask=mask[:, None, None])
    cache = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
    run = jax.jit(attention_to_cache)
    error = _error(run(query, *cache, mask), expected)
    seconds = _seconds(lambda: run(query, *cache, mask))
    row = {"attention": "one token to a cache", "kernel": "xla", "error": error, "right": error <= CLOSE}
    return {**row, "seconds": seconds}


def _error(found: jax.Array, expected: jax.Array) -> float:
    """Returns the norm of the difference relative to the norm of the expected values; infinite if it is no number."""
    difference = jnp.linalg.norm((found.astype(jnp.float32) - expected).ravel()) / jnp.linalg.norm(expected.ravel())
    return float(difference) if math.isfinite(difference) else math.inf


def _seconds(run: Any) -> float:
    """Returns the time of one of ten runs in a row, after one to warm up."""
    jax.block_until_ready(run())
    started = time.perf_counter()
    for _ in range(10):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / 10


def losses(preset: str, folder: Path, until: float, keep: Keep) -> None:
    """Compares the first losses of stage 2 at the embedded preset's sizes with those recorded on a CPU."""
    del preset, until
    config = drawn.settings("tiny", "stage2", folder).updated({"optimizer.warmup": 0.0})
    mesh = sharding.one_device()
    with jax.default_matmul_precision("highest"):
        arguments = plan.lay_out(config, mesh, clips=4)
        state, frozen, found = drawn.state(config, arguments), drawn.draw(arguments.frozen), []
        batch = sharding.place_batch(drawn.batch(config, 4), mesh)
        for _ in LOSSES:
            state, metrics = arguments.step(state, frozen, batch)
            found.append(float(metrics["loss"]))
    right = all(abs(one - other) <= SAME * other for one, other in zip(found, LOSSES, strict=True))
    keep([{"losses": found, "recorded": LOSSES, "right": right}])
