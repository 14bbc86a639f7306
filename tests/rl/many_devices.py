"""Reinforces on some meshes, in processes of its own, since a process has one number of devices.

python many_devices.py PROCESSES JOBS, where PROCESSES is what train.py takes and JOBS is JSON: a list of jobs, each a
config and a workdir.
"""

import json
import sys
from pathlib import Path

from favchat_jax import processes
from favchat_jax.config import Config
from favchat_jax.rl import de_grpo
from favchat_jax.sharding import training_mesh


def main(place: str, jobs: list[tuple[dict, str]]) -> None:
    """Does each of the jobs."""
    with processes.joined(place):
        for fields, workdir in jobs:
            config = Config.from_json(fields)
            de_grpo.train(config, Path(workdir), training_mesh(config))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
