"""Answers with a drawn model on several meshes, in a process of its own, since a process has one number of devices.

python many_meshes.py FOLDER JOBS, where FOLDER is for the language model and JOBS is JSON: a list of jobs, each a mesh
(three sizes), a number of clips and a storage. Prints a list with what `answers` returns for each job.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from favchat_jax import sharding
from favchat_jax.checkpoints.run import Run
from favchat_jax.config import MeshConfig
from favchat_jax.generation.sampler import Sampler, Sampling
from favchat_jax.generation.weights import from_run
from favchat_jax.stages import group_of
from tests.generation.test_sampler import QUESTIONS, Setting, asked
from tests.models.tiny_parts import MISTRAL

HEADS = dataclasses.replace(MISTRAL, num_attention_heads=16, num_key_value_heads=8, intermediate_size=48)
TOKENS = 12


def answers(setting: Setting, sizes: list[int], clips: int, storage: str) -> dict[str, Any]:
    """Returns greedy and drawn tokens of answers, log-probabilities, and shares of weights on a device."""
    given = MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True)))
    mesh = sharding.answering_mesh(given, heads=HEADS.num_key_value_heads)
    parts = setting.parts(setting.tokenizer)
    own = {path: np.asarray(leaf) for path, leaf in setting.weights.items() if group_of(path) != "llm"}
    weights = from_run(Run(parts, own), mesh, storage)
    shares = {path: leaf.addressable_shards[0].data.size / leaf.size for path, leaf in weights.items()}
    sampler = Sampler(parts, weights, storage, mesh)
    features = sampler.encode(np.random.default_rng(1).integers(0, 256, (clips, 2, 32, 32, 3), np.uint8))
    both = [[asked(QUESTIONS[i % 4]), asked(QUESTIONS[(i + 1) % 4])] for i in range(clips)]
    how = Sampling(TOKENS), Sampling(TOKENS, temperature=0.8, seed=3)
    drawn = [np.concatenate(list(sampler.blocks(features, both, one, 4)), axis=1).tolist() for one in how]
    log_p = sampler.log_likelihoods(features, [rows[0] for rows in both], ["The hat", "glasses nod", "hair"])
    return {"shares": shares, "tokens": drawn, "log_p": log_p.tolist()}


if __name__ == "__main__":
    folder, jobs = sys.argv[1:]
    setting = Setting(Path(folder), sizes=HEADS)
    print(json.dumps([answers(setting, *job) for job in json.loads(jobs)]))
