"""Says how far a run has come."""

import dataclasses
from pathlib import Path

from favchat_jax.checkpoints.store import Checkpoints
from favchat_jax.checkpoints.workdir import stored_config
from favchat_jax.data.sources import open_dataset, training_split


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call that trains a stage ended.

    Attributes:
        step: last step of the workdir.
        steps: number of steps of the whole run.
        resumed_at: step at which this call started.
    """

    step: int
    steps: int
    resumed_at: int

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps


def is_finished(workdir: str | Path) -> bool:
    """Returns whether the run in a workdir has made its last step; False without a run."""
    latest = Checkpoints(workdir).latest()
    if latest is None:
        return False
    config = stored_config(workdir)
    split = training_split(config.data.name, config.stage)
    return latest >= config.total_steps(len(open_dataset(config.data.name, config.data.packed, split)))
