"""Layers that training keeps stacked along a first axis, apart again for decoding."""

from collections.abc import Mapping
from typing import Any

import jax


def unstack_layers(llm: Mapping[str, Any]) -> dict[str, Any]:
    """`Mistral`'s tree of `scan=True` (`layers/...` with a leading axis) as that of `scan=False` (`layers_0/...`)."""
    stacked = llm["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)}
    return {**{name: child for name, child in llm.items() if name != "layers"}, **layers}
