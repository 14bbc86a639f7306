"""Layers that training keeps stacked along a first axis, apart again for decoding: kernels joined and transposed."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from favchat_jax.models.lora import merge

# Kernels with the same input, and the name under which `Mistral` reads them as one.
JOINED = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


def unstack_layers(llm: Mapping[str, Any]) -> dict[str, Any]:
    """`Mistral`'s tree of `scan=True` (`layers/...` with a leading axis) as that of `scan=False` (`layers_0/...`)."""
    stacked = llm["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)}
    return {**{name: child for name, child in llm.items() if name != "layers"}, **layers}


def for_decoding(llm: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """`Mistral`'s tree of `scan=True` as decoding reads it: layers apart, adapters merged, kernels of `JOINED` as one,
    each kernel transposed.

    A token's time is that of reading all weights; fewer, larger products read them faster, and so do those with the
    kernel as first operand (`models.linear.transposed_product`). Layers are made one after another, so that beside the
    given weights and the result no more than one of them is in memory.

    Args:
        llm: weights, with adapters or without.
        alpha: the adapters'.
    """
    tree = _transposed(merge({name: child for name, child in llm.items() if name != "layers"}, alpha))
    for i in range(jax.tree.leaves(llm["layers"])[0].shape[0]):
        layer = merge(jax.tree.map(lambda leaf, i=i: leaf[i], llm["layers"]), alpha)
        for part, (name, parts) in JOINED.items():
            kernels = [layer[part].pop(one)["kernel"] for one in parts]
            layer[part][name] = {"kernel": jnp.concatenate(kernels, axis=-1)}
        tree[f"layers_{i}"] = _transposed(layer)
    return tree


def _transposed(weights: dict[str, Any]) -> dict[str, Any]:
    """Every `kernel` below `weights` as `transposed`, [out, in]."""
    if "kernel" in weights:
        return {"transposed": weights["kernel"].T}
    return {name: _transposed(child) if isinstance(child, dict) else child for name, child in weights.items()}
