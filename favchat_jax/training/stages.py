"""Which weights learn in which stage, and the optimiser that moves them (FaVChat v1, Sections 4.2 and 5.1; v2).

The freeze table is data: groups of weights by path, and for each variant and stage the groups that train. Weights live
in two flat dictionaries, `trainable` and `frozen`; gradients and moments exist for the first only.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from favchat_jax.errors import UserError

# Group -> pattern on a weight's path. Every weight of every model matches exactly one.
GROUPS = {
    "encoders": r"(umt|vision_layernorm|facexformer)/.*",
    "fusion": r"(fusion|linear_fuse|fuse_proj)/.*",
    "qformers": r"(general|facial)_qformer/.*",
    "linears": r"(general|facial)_(proj|mlp)/.*",
    "adapter": r"adapter/.*",
    "lora": r"llm/.*/?lora_[ab]",
    "llm": r"llm/(?!.*lora_[ab]$).*",
}

VISUAL = ("encoders", "fusion", "qformers", "linears", "adapter")
# Variant -> stage -> groups that train; the others are frozen.
TRAINS = {
    "v1": {
        "stage1": VISUAL,
        "stage2": (*VISUAL, "lora"),
        "stage3": ("adapter", "lora"),
        "coldstart": ("adapter", "lora"),
        "grpo": ("adapter", "lora"),
    },
    # CA2 belongs to the facial encoder, what follows a Q-Former to the Q-Former (figure of the training paradigm).
    "v2": {
        "stage1": ("encoders", "fusion", "adapter"),
        "stage2": ("encoders", "fusion", "qformers", "linears", "lora"),
        "stage3": ("qformers", "linears", "adapter", "lora"),
        "coldstart": ("adapter", "lora"),
        "grpo": ("adapter", "lora"),
    },
}

ADAM_SHARE = 0.1  # of Muon's rate, for the weights that it does not move


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage reads and what comes before it.

    Attributes:
        text: which text it trains on (`summary`, `qa`, `face_qa` or `reasoning`); the reinforcement stage has none.
        lora: whether its language model has adapters.
        before: the stage whose weights it starts from.
    """

    text: str | None
    lora: bool
    before: str | None


STAGES = {
    "stage1": Stage(text="summary", lora=False, before=None),
    "stage2": Stage(text="qa", lora=True, before="stage1"),
    "stage3": Stage(text="face_qa", lora=True, before="stage2"),
    # Data-Efficient GRPO, and the fine-tuning before it from which its policy knows the form of a response.
    "coldstart": Stage(text="reasoning", lora=True, before="stage3"),
    "grpo": Stage(text=None, lora=True, before="coldstart"),
}


def group_of(path: str) -> str:
    """The group of the weight at `path`; an error in the table (no group, or two) is a ValueError."""
    groups = [name for name, pattern in GROUPS.items() if re.fullmatch(pattern, path)]
    if len(groups) != 1:
        raise ValueError(f"weight {path} is in groups {groups}: it must be in exactly one")
    return groups[0]


def split(weights: Mapping[str, Any], variant: str, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts a flat dictionary of weights into (trainable, frozen).

    Raises:
        UserError: an unknown variant or stage.
    """
    if variant not in TRAINS or stage not in TRAINS[variant]:
        known = ", ".join(f"{v} {s}" for v, stages in TRAINS.items() for s in stages)
        raise UserError(f"there is no stage {stage!r} of variant {variant!r}: choose one of {known}")
    trains = TRAINS[variant][stage]
    trainable = {path: leaf for path, leaf in weights.items() if group_of(path) in trains}
    return trainable, {path: leaf for path, leaf in weights.items() if path not in trainable}


def schedule(optimizer: Any, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to a floor (VideoChat2's: floor 0.25 of the peak)."""
    warmup = max(1, round(optimizer.warmup * steps))
    rate = optimizer.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(steps, warmup + 1), rate * optimizer.floor)


def make_optimizer(optimizer: Any, steps: int) -> optax.GradientTransformation:
    """The optimiser of a config, after clipping by global norm.

    `adamw` is VideoChat2's; weight decay spares one-dimensional weights (biases and norm scales). `muon`
    (github: KellerJordan/Muon) moves kernels by orthogonalised momentum, all other weights by AdamW at a tenth of the
    rate: the embedded preset's, which learns more a step with it. The encoders are moved by AdamW in any case,
    at `encoder_rate` of the rate.

    Raises:
        UserError: another name.
    """
    rate = schedule(optimizer, steps)
    if optimizer.name not in ("adamw", "muon"):
        raise UserError(f"optimizer.name={optimizer.name} is unknown: choose adamw or muon")
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


def _adamw(optimizer: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay, mask=_decay_mask)


def _muon(optimizer: Any, rate: optax.Schedule) -> optax.GradientTransformation:
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
    """`inner` on a flat dictionary in which kernels of one shape lie in one array: otherwise every kernel's
    orthogonalisation is compiled by itself, which takes a third of a step's compilation."""

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
