"""How long a run is, and how far it has come."""

import dataclasses
import math
from pathlib import Path

from favchat_jax.checkpoints.store import Checkpoints
from favchat_jax.checkpoints.workdir import stored_config
from favchat_jax.config import Config
from favchat_jax.data.sources import open_dataset, training_split


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call that trains a stage ended.

    Attributes:
        step: the step that the workdir stands at.
        steps: the step at which the run is finished.
        resumed_at: the step that this call started from.
    """

    step: int
    steps: int
    resumed_at: int

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps


def total_steps(config: Config) -> int:
    """Length of the run in steps: `config.steps`, or that of `config.epochs` over the training split."""
    if config.steps:
        return config.steps
    split = training_split(config.data.name, config.stage)
    records = len(open_dataset(config.data.name, config.data.packed, split))
    return max(1, math.ceil(config.epochs * records / config.batch))


def is_finished(workdir: str | Path) -> bool:
    """Whether the run in a workdir has made its last step; False where there is no run."""
    latest = Checkpoints(workdir).latest()
    return latest is not None and latest >= total_steps(stored_config(workdir))
