"""Layers that training keeps stacked along a first axis, apart again for decoding, with their kernels joined."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

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


def for_decoding(llm: Mapping[str, Any]) -> dict[str, Any]:
    """`unstack_layers` of a tree without adapters, with the kernels of `JOINED` side by side: one product each.

    A token's time is that of reading all weights, and fewer, larger products read them faster.
    """
    tree = unstack_layers(llm)
    for layer in (child for name, child in tree.items() if name.startswith("layers_")):
        for part, (name, parts) in JOINED.items():
            kernels = [layer[part].pop(one)["kernel"] for one in parts]
            layer[part][name] = {"kernel": jnp.concatenate(kernels, axis=-1)}
    return tree
