"""The ablations of Table 6 as configs: each is a stage's config without one part of the model."""

import importlib

from ml_collections import ConfigDict

from configs.common import STAGES


def get_config(ablation: str, argument: str = "") -> ConfigDict:
    """Returns the config of a stage without the part that `ablation` names.

    Args:
        ablation: no_face, no_granularity or no_moe.
        argument: comma-separated `stage=` (stage3 by default), `preset=`, `variant=`.

    Raises:
        ValueError: an argument is unknown, or names another ablation.
    """
    items = [item for item in argument.split(",") if item]
    given = [item.partition("=")[0] for item in items]
    if "ablation" in given:
        raise ValueError(f"config argument ablation= is {ablation} here: use stage=, preset= or variant=")
    chosen = [item.partition("=")[2] for item in items if item.startswith("stage=")]
    stage = chosen[-1] if chosen else "stage3"
    if stage not in STAGES:
        raise ValueError(f"stage={stage} is unknown: choose one of {', '.join(STAGES)}")
    rest = [item for item in items if not item.startswith("stage=")]
    return importlib.import_module(f"configs.{stage}").get_config(",".join([*rest, f"ablation={ablation}"]))
