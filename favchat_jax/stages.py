"""Defines the stages of training: their order, their workdirs, and the weights that train in each of them.

The freeze table (FaVChat v1, Section 4.2; v2's figure of the training paradigm) lists groups of weights by path, and
for each variant and stage the groups that train. Weights are in two flat dictionaries, `trainable` and `frozen`, and
only the first has gradients and moments.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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

ENCODING = ("encoders", "fusion")  # groups that compute a clip's features
VISUAL = (*ENCODING, "qformers", "linears", "adapter")
# Variant -> stage -> groups that train; the others are frozen.
TRAINS = {
    "v1": {
        "stage1": VISUAL,
        "stage2": (*VISUAL, "lora"),
        "stage3": ("adapter", "lora"),
        "coldstart": ("adapter", "lora"),
        "grpo": ("adapter", "lora"),
    },
    # CA2 belongs to the facial encoder, and the layers after a Q-Former belong to it (figure of the training paradigm).
    "v2": {
        "stage1": ("encoders", "fusion", "adapter"),
        "stage2": ("encoders", "fusion", "qformers", "linears", "lora"),
        "stage3": ("qformers", "linears", "adapter", "lora"),
        "coldstart": ("adapter", "lora"),
        "grpo": ("adapter", "lora"),
    },
}


Name = Literal["stage1", "stage2", "stage3", "coldstart", "grpo"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of training.

    Attributes:
        text: text that it trains on: `summary`, `qa`, `face_qa` or `reasoning`; None in the reinforcement stage.
        lora: whether its language model has adapters.
        before: stage whose weights it starts from.
    """

    text: str | None
    lora: bool
    before: Name | None


STAGES: dict[Name, Stage] = {
    "stage1": Stage(text="summary", lora=False, before=None),
    "stage2": Stage(text="qa", lora=True, before="stage1"),
    "stage3": Stage(text="face_qa", lora=True, before="stage2"),
    # The cold start teaches the form of a response; Data-Efficient GRPO follows.
    "coldstart": Stage(text="reasoning", lora=True, before="stage3"),
    "grpo": Stage(text=None, lora=True, before="coldstart"),
}


def group_of(path: str) -> str:
    """Returns the group of the weight at `path`; raises ValueError if not exactly one group fits."""
    groups = [name for name, pattern in GROUPS.items() if re.fullmatch(pattern, path)]
    if len(groups) != 1:
        raise ValueError(f"weight {path} is in groups {groups}: it must be in exactly one")
    return groups[0]


def split(weights: Mapping[str, Any], variant: str, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a flat dictionary of weights into (trainable, frozen)."""
    trains = TRAINS[variant][stage]
    trainable = {path: leaf for path, leaf in weights.items() if group_of(path) in trains}
    return trainable, {path: leaf for path, leaf in weights.items() if path not in trainable}


def has_fixed_features(variant: str, stage: Name) -> bool:
    """Returns whether a clip's features are fixed in a stage that learns from text: their weights are frozen."""
    return STAGES[stage].text is not None and not set(ENCODING) & set(TRAINS[variant][stage])


def default_workdir(preset: str, variant: str, ablation: str, stage: str) -> Path:
    """Returns runs/PRESET-VARIANT[-ABLATION]/STAGE."""
    return Path("runs") / "-".join([preset, variant, *([] if ablation == "none" else [ablation])]) / stage
