"""Builds a stage's optimiser and its learning-rate schedule (FaVChat v1, Section 5.1)."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from favchat_jax.config import OptimizerConfig
from favchat_jax.stages import GROUPS

ADAM_SHARE = 0.1  # AdamW's rate as a share of Muon's, for weights that are not matrices


def schedule(optimizer: OptimizerConfig, steps: int) -> optax.Schedule:
    """Builds a linear warm-up to the peak and a cosine or a line down to a floor (VideoChat2's: 0.25 of the peak)."""
    rate, last = optimizer.learning_rate, optimizer.learning_rate * optimizer.floor
    warmup = max(1, round(optimizer.warmup * steps)) if optimizer.warmup else 0
    rest = max(1, steps - warmup)
    falling = {
        "cosine": optax.cosine_decay_schedule(rate, rest, last / rate),
        "linear": optax.linear_schedule(rate, last, rest),
    }[optimizer.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), falling], [warmup]) if warmup else falling


def make_optimizer(optimizer: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Builds a config's optimiser, which first clips gradients by their global norm.

    `adamw` is VideoChat2's, without weight decay of biases and norm scales. `muon` (github: KellerJordan/Muon) updates
    kernels by orthogonalised momentum and all other weights by AdamW at a tenth of the rate; the embedded preset learns
    more per step with it. The encoders always use AdamW, at `encoder_rate` times the rate.
    """
    rate = schedule(optimizer, steps)
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.partition(
            {
                "encoders": _adamw(optimizer, lambda step: optimizer.encoder_rate * rate(step)),
                "others": _adamw(optimizer, rate) if optimizer.name == "adamw" else _muon(optimizer, rate),
            },
            _encoders_and_others,
        ),
    )


def _encoders_and_others(weights: Any) -> Any:
    def label(path, _):
        path = "/".join(str(key.key) for key in path)
        return "encoders" if re.fullmatch(GROUPS["encoders"], path) else "others"

    return jax.tree_util.tree_map_with_path(label, weights)


def _adamw(optimizer: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay, mask=_decay_mask)


def _muon(optimizer: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return _stacked(
        muon(
            rate,
            weight_decay=optimizer.weight_decay,
            weight_decay_mask=_decay_mask,
            adam_b1=optimizer.b1,
            adam_b2=optimizer.b2,
            adam_learning_rate=lambda step: ADAM_SHARE * rate(step),
            adam_weight_decay=optimizer.weight_decay,
            muon_weight_dimension_numbers=_matrices,
        )
    )


def _stacked(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` to a flat dictionary in which kernels of one shape are stacked to one array.

    Otherwise each kernel's orthogonalisation is compiled separately, which takes a third of a step's compilation.
    """

    def stack(weights):
        if weights is None:
            return None
        stacks, rest = _stacks(weights), dict(weights)
        found = {name: jnp.stack([rest.pop(path) for path in paths]) for name, paths in stacks.items()}
        return found | rest

    def update(updates, state, weights=None):
        moved, state = inner.update(stack(updates), state, stack(weights))
        for name, paths in _stacks(updates).items():
            moved |= dict(zip(paths, moved.pop(name), strict=True))
        return moved, state

    return optax.GradientTransformation(lambda weights: inner.init(stack(weights)), update)


def _stacks(weights: Mapping[str, Any]) -> dict[str, list[str]]:
    """Paths of the kernels of each shape, by the stack's name."""
    stacks: dict[str, list[str]] = {}
    for path, leaf in sorted(weights.items()):
        if path.endswith("kernel") and hasattr(leaf, "shape"):  # not the encoders', which others move
            stacks.setdefault(f"stacked/{'x'.join(map(str, leaf.shape))}/kernel", []).append(path)
    return stacks


def _decay_mask(weights: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(str(path[-1].key)), weights)


def _matrices(weights: Any) -> Any:
    """Axes of input and output of each kernel, one of every scanned layer too; None for what Muon does not move."""

    def axes(path, leaf):
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if str(path[-1].key).endswith("kernel") else None

    return jax.tree_util.tree_map_with_path(axes, weights)


def decays(path: str) -> bool:
    """Whether weight decay applies: not to one-dimensional weights (biases, norm scales, the scalars of `no_moe`).

    Told by name, since scanned layers stack biases into matrices.
    """
    return not path.endswith(("bias", "scale", "adapter/weights"))
