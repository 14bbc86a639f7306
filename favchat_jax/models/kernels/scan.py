"""Runs one layer after another, compiled once: layers with equal fields become one scan.

The plain form of both functions is

    for layer in layers:
        carry = step(layer, carry)

They differ in the layout of the weights, which checkpoints fix. `scan_stacked` runs layers whose weights are stacked
along a first axis (UMT, Mistral). `scan_layers` runs layers with separate weights (Swin, Q-Former).
A scan gains no speed in a step; it makes compiling stage 1 for an A800 twice as fast (docs/results.md).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from favchat_jax.models.kernels.remat import remat

Carry = TypeVar("Carry")


def scan_stacked(
    layer: nn.Module,
    step: Callable[[Any, Carry], Carry],
    carry: Carry,
    *,
    depth: int,
    taps: tuple[int, ...] = (),
    policy: str = "",
) -> tuple[Carry, tuple[Carry, ...]]:
    """Returns `carry` after `step` with each of `depth` layers, and its value after each layer of `taps`.

    Args:
        layer: bound module that holds the weights of all layers, stacked.
        step: runs one layer; keeps the carry's shapes.
        carry: input of the first layer; a single array if there are taps.
        depth: number of layers.
        taps: layers, counted from 1.
        policy: activations that a layer keeps for the backward pass (`remat.POLICIES`).
    """
    # Tapped outputs are part of the carry, written outside the rematerialised call: stacked scan outputs would hold
    # every layer's, and a buffer inside the call would be kept once per layer for the backward pass. Layers without a
    # tap write to a spare last slot.
    slots = np.full(depth, len(taps))
    slots[np.array(taps, int) - 1] = np.arange(len(taps))
    run = remat(step, policy, prevent_cse=False)

    def body(layer, state, slot):
        carry, tapped = state
        carry = run(layer, carry)
        if taps:
            tapped = jax.lax.dynamic_update_index_in_dim(tapped, carry, slot, 0)
        return (carry, tapped), None

    first: Any = carry
    tapped = jnp.zeros((len(taps) + 1, *first.shape), first.dtype) if taps else None
    scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=depth)
    (carry, tapped), _ = scan(layer, (carry, tapped), slots)
    return carry, tuple(tapped[i] for i in range(len(taps)))


def scan_layers(
    layers: Sequence[nn.Module],
    step: Callable[[Any, Carry], Carry],
    carry: Carry,
    *,
    period: int = 1,
    policy: str = "",
) -> Carry:
    """Returns `carry` after `step` with each of the layers, as a scan over periods whose layers have equal fields.

    Their weights are stacked as the step runs. Each layer draws separate random numbers from the stream `dropout`.
    Layers run one by one at initialisation, and where fewer than two periods are equal.

    Args:
        layers: bound modules with weights and no other variables.
        step: runs one layer; keeps the carry's shapes.
        carry: input of the first layer.
        period: number of layers after which their fields repeat.
        policy: activations that a layer keeps for the backward pass (`remat.POLICIES`).
    """
    count = 0 if layers[0].is_initializing() else _alike(layers, period)
    if count > period:
        carry = _scanned(layers[:count], step, carry, period, policy)
        layers = layers[count:]
    run = remat(step, policy)
    for layer in layers:
        carry = run(layer, carry)
    return carry


def _scanned(layers, step, carry, period, policy):
    weights = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer.variables["params"] for layer in layers[i::period]))
        for i in range(period)
    ]
    keys = None
    if layers[0].has_rng("dropout"):
        keys = jax.random.split(layers[0].make_rng("dropout"), (len(layers) // period, period))

    def one(i, weights, key, carry):
        rngs = {} if key is None else {"dropout": key}
        return step(_unbound(layers[i]).bind({"params": weights}, rngs=rngs), carry)

    run = remat(one, policy, jax.checkpoint, prevent_cse=False, static_argnums=0)

    def body(carry, of_period):
        weights, keys = of_period
        for i in range(period):
            carry = run(i, weights[i], None if keys is None else keys[i], carry)
        return carry, None

    return jax.lax.scan(body, carry, (weights, keys))[0]


def _unbound(layer: nn.Module) -> nn.Module:
    """Returns a layer with the same fields, without a name, a parent or weights."""
    return layer.clone(parent=None, name=None)


def _alike(layers: Sequence[nn.Module], period: int) -> int:
    """Counts the layers at the start that form complete periods with the fields of the first."""
    fields = [_unbound(layer) for layer in layers]
    end = period
    while end + period <= len(fields) and fields[end : end + period] == fields[:period]:
        end += period
    return min(end, len(fields))
