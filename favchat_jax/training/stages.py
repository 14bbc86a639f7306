"""Which weights learn in which stage, and the optimiser that moves them (FaVChat v1, Sections 4.2 and 5.1).

The freeze table is data: groups of weights by path, and for each variant and stage the groups that train. Weights live
in two flat dictionaries, `trainable` and `frozen`; gradients and moments exist for the first only.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import optax

from favchat_jax.errors import UserError

# Group -> pattern on a weight's path. Every weight of every model matches exactly one.
GROUPS = {
    "encoders": r"(umt|vision_layernorm|facexformer)/.*",
    "fusion": r"(fusion|linear_fuse|fuse_proj)/.*",
    "qformers": r"(general|facial)_qformer/.*",
    "linears": r"(general|facial)_proj/.*",
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
    },
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage reads and what comes before it.

    Attributes:
        text: which text it trains on (`summary`, `qa` or `face_qa`).
        lora: whether its language model has adapters.
        before: the stage whose weights it starts from.
    """

    text: str
    lora: bool
    before: str | None


STAGES = {
    "stage1": Stage(text="summary", lora=False, before=None),
    "stage2": Stage(text="qa", lora=True, before="stage1"),
    "stage3": Stage(text="face_qa", lora=True, before="stage2"),
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
    """AdamW after clipping by global norm; weight decay spares one-dimensional weights (biases and norm scales)."""
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            schedule(optimizer, steps),
            b1=optimizer.b1,
            b2=optimizer.b2,
            weight_decay=optimizer.weight_decay,
            mask=lambda weights: {path: decays(path) for path in weights},
        ),
    )


def decays(path: str) -> bool:
    """Whether weight decay applies: not to one-dimensional weights (biases, norm scales, the scalars of `no_moe`).

    Told by name, since scanned layers stack biases into matrices.
    """
    return not path.endswith(("bias", "scale", "adapter/weights"))
