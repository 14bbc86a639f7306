"""Trains a shrunken stage on a mesh, in processes of its own, since a process has one number of devices.

python many_devices.py SPEC, where SPEC is JSON: stage and changes of a config; processes, as train.py takes them;
batches, a file of whole ones, one a step; runs, a list of a mesh (three sizes) and its jobs, each a workdir and a
number of steps to go on there. Prints what `main` returns.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from favchat_jax import processes, sharding
from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.initial import starting_state
from favchat_jax.checkpoints.store import Checkpoints
from favchat_jax.config import Config
from favchat_jax.training.optimizer import make_optimizer, schedule
from favchat_jax.training.step import make_step


def main(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Does the jobs of each run, from the newest checkpoint of a workdir, if any, to one after the job's last step.

    Returns:
        Of each run: losses, of its jobs, step by step; shares, path -> share of the trained weight that a device
        holds; compilations of the step in all its jobs.
    """
    with np.load(spec["batches"]) as stored:
        batches = dict(stored)
    with processes.joined(spec["processes"]):
        return [_run(spec, batches, sizes, jobs) for sizes, jobs in spec["runs"]]


def _run(spec, batches, sizes, jobs):
    mesh = {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, sizes, strict=True)}
    config = Config.from_ml_collections(importlib.import_module(f"configs.{spec['stage']}").get_config())
    config = config.updated({**spec["changes"], **mesh})
    mesh = sharding.training_mesh(config)
    parts = assembly.assemble(config)
    optimizer, rate = make_optimizer(config.optimizer, 20), schedule(config.optimizer, 20)
    step = make_step(parts.model, optimizer, rate, accumulate=config.accumulate, chunk=config.loss_chunk, mesh=mesh)
    losses = []
    for workdir, steps in jobs:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(workdir, keep=20)
        state, frozen, _ = starting_state(parts, optimizer, checkpoints, mesh)
        losses.append([])
        for _ in range(steps):
            batch = {name: array[int(state.step)] for name, array in batches.items()}
            mine = {name: np.split(array, jax.process_count())[jax.process_index()] for name, array in batch.items()}
            state, values = step(state, frozen, sharding.place_batch(mine, mesh))
            losses[-1].append(float(values["loss"]))
        checkpoints.save(state, {"process": jax.process_index()})
        checkpoints.close()
    shares = {path: leaf.addressable_shards[0].data.size / leaf.size for path, leaf in state.trainable.items()}
    return {"losses": losses, "shares": shares, "compilations": step._cache_size()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
