"""Layers of one form as one scan, so that a compiler sees them once.

Their weights are stacked as the step runs and lie apart everywhere else, under the names that published ones map to.
docs/results.md says what it saves in compiling a step.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")


def scan_layers(
    layers: Sequence[nn.Module], step: Callable[[nn.Module, Carry], Carry], carry: Carry, period: int = 1
) -> Carry:
    """`carry` after `step` with each of the layers; as a scan over those periods whose layers have the same fields.

    Each layer draws random numbers of its own from the stream `dropout`. Where fewer than two periods are alike, and
    while weights are made, layers run one by one.

    Args:
        layers: bound modules with weights and no other variables.
        step: runs one of them; keeps the carry's shapes.
        carry: what the first layer gets.
        period: layers after which their fields repeat.
    """
    count = 0 if layers[0].is_initializing() else _alike(layers, period)
    if count > period:
        carry = _scanned(layers[:count], step, carry, period)
        layers = layers[count:]
    for layer in layers:
        carry = step(layer, carry)
    return carry


def _scanned(layers, step, carry, period):
    weights = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer.variables["params"] for layer in layers[i::period]))
        for i in range(period)
    ]
    keys = None
    if layers[0].has_rng("dropout"):
        keys = jax.random.split(layers[0].make_rng("dropout"), (len(layers) // period, period))

    def body(carry, of_period):
        weights, keys = of_period
        for i in range(period):
            rngs = {} if keys is None else {"dropout": keys[i]}
            carry = step(_form(layers[i]).bind({"params": weights[i]}, rngs=rngs), carry)
        return carry, None

    return jax.lax.scan(body, carry, (weights, keys))[0]


def _form(layer: nn.Module) -> nn.Module:
    """A layer's fields, apart from its place in a model and its weights."""
    return layer.clone(parent=None, name=None)


def _alike(layers: Sequence[nn.Module], period: int) -> int:
    """How many of the layers are whole periods with the fields of the first."""
    forms = [_form(layer) for layer in layers]
    end = period
    while end + period <= len(forms) and forms[end : end + period] == forms[:period]:
        end += period
    return min(end, len(forms))
