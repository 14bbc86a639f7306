"""Runs our side of the benchmark: the training step, the sampler and the loader, each measuring itself."""

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from favchat_jax import sharding, stages
from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.initial import new_state
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.kept_tracks import KeptTracks, file_of, find_all
from favchat_jax.data.loader import training_batches
from favchat_jax.generation.sampler import Sampler, Sampling
from favchat_jax.generation.weights import from_training
from favchat_jax.training.optimizer import make_optimizer, schedule
from favchat_jax.training.step import make_step
from tools.beside_pytorch import material
from tools.beside_pytorch.contest import Runs

BLOCK = 21  # tokens: the first comes from the prompt, three blocks follow
TOKENS = 1 + 3 * BLOCK
READ = 2**29  # bytes whose reading measures the memory's bandwidth


def train(folder: str, preset: str) -> Runs:
    """Returns runs of stage 2's step, with all activations kept and with rematerialisation."""
    config = material.settings(folder, preset)
    batch = material.batch(config)
    weights = {path: jnp.asarray(leaf) for path, leaf in material.weights(folder).items()}
    trainable, frozen = stages.split(weights, config.variant, config.stage)
    # Committed to their devices, as in a run; otherwise the second step compiles again.
    mesh = sharding.one_device()
    frozen = {path: sharding.place(path, leaf, mesh, config.model.dtype) for path, leaf in frozen.items()}
    optimizer = make_optimizer(config.optimizer, 1000)

    def steps(remat: str):
        model = assembly.assemble(config.updated({"model.remat": remat})).model
        rate = schedule(config.optimizer, 1000)
        update = make_step(model, optimizer, rate, accumulate=1, chunk=config.loss_chunk)
        fresh = new_state(jax.tree.map(jnp.copy, trainable), optimizer, 0)
        state = [jax.device_put(fresh, sharding.state_partitions(fresh, mesh))]

        def run() -> tuple[float, dict[str, float]]:
            started = time.perf_counter()
            state[0], metrics = update(state[0], frozen, batch)
            loss = float(jax.block_until_ready((state[0], metrics))[1]["loss"])
            return time.perf_counter() - started, {"loss": loss}

        return run

    return {"kept": steps(""), "rematerialised": steps("block")}


def decode(folder: str, preset: str, batch: int) -> Runs:
    """Returns runs that answer one question about each of `batch` encoded clips with `TOKENS` tokens."""
    sampler, features, weights = _asked(folder, preset, batch)
    conversations = [[[(material.QUESTION, None)]]] * batch
    read = sum(leaf.nbytes for path, leaf in weights.items() if path.startswith("llm/") and path.endswith("kernel"))

    def answer() -> tuple[float, dict[str, Any]]:
        started = time.perf_counter()
        written, marks = [], [started]
        for block in sampler.blocks(features, conversations, Sampling(TOKENS), BLOCK):
            written.append(block)
            marks.append(time.perf_counter())
        tokens = np.concatenate(written, axis=1)
        blocks = np.diff(marks)[1:] / BLOCK
        return marks[-1] - started, {"tokens": tokens.tolist(), "per_token": blocks.tolist(), "bytes": read}

    return {"merged": answer, "memory": memory()}


def rollout(folder: str, preset: str, group: int) -> Runs:
    """Returns a run that samples a group of responses of `TOKENS` tokens to one question about an encoded clip."""
    sampler, features, _ = _asked(folder, preset, 1)
    seeds = itertools.count()

    def respond() -> tuple[float, None]:
        sampling = Sampling(TOKENS, temperature=1.0, seed=next(seeds))
        started = time.perf_counter()
        sampler.responses(features, [material.QUESTION], group, sampling)
        return time.perf_counter() - started, None

    return {"group": respond}


def _asked(folder: str, preset: str, clips: int):
    """Returns the sampler, the features of `clips` clips, and the weights."""
    config = material.settings(folder, preset)
    parts = assembly.assemble(config)
    weights = {path: jnp.asarray(leaf, config.model.dtype) for path, leaf in material.weights(folder).items()}
    sampler = Sampler(parts, from_training(weights, config, parts.llm))
    return sampler, sampler.encode(material.frames(config, clips)), weights


def memory() -> Callable[[], tuple[float, float]]:
    """Returns a run that reads a large array with all cores; its result is the best bytes a second of several reads."""
    array = jnp.ones((READ // 4096, 1024))
    read = jax.jit(lambda array: array.sum(axis=1))
    read(array).block_until_ready()

    def run() -> tuple[float, float]:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            read(array).block_until_ready()
            seconds.append(time.perf_counter() - started)
        return min(seconds), READ / min(seconds)

    return run


def loader(folder: str, preset: str, workers: tuple[int, ...], sides: tuple[int, ...], seconds: float) -> Runs:
    """Returns runs that measure the training stream's seconds per clip, by worker processes and clips' size.

    Large clips are also measured with a face crop: with faces that are found in the run, and with tracks kept before.
    """
    config = material.settings(folder, preset)
    parts = assembly.assemble(config)
    crop, large = FaceCrop(), material.packed(folder, material.LARGE)
    find_all(large, crop, frames=config.model.frames, size=config.model.image_size, processes=0)
    kept = KeptTracks(file_of(large, crop, config.model.frames))

    def stream(count: int, side: int, crop: FaceCrop | None = None, tracks: KeptTracks | None = None):
        def run() -> tuple[float, float]:
            batches = training_batches(
                material.footage(folder, side),
                parts.conversation,
                parts.prompt,
                text="qa",
                frames=config.model.frames,
                size=config.model.image_size,
                batch=material.CLIPS,
                buckets=config.data.buckets,
                face_crop=crop,
                tracks=tracks,
                workers=count,
            )
            with contextlib.closing(batches):
                return seconds_a_clip((len(batch.ids) for batch in batches), seconds)

        return run

    runs = {material.loader_setting(count, side): stream(count, side) for count in workers for side in sides}
    for count in workers:
        name = material.loader_setting(count, material.LARGE)
        runs[f"{name}, face crop"] = stream(count, material.LARGE, crop)
        runs[f"{name}, kept tracks"] = stream(count, material.LARGE, crop, kept)
    return runs


def seconds_a_clip(batches: Any, seconds: float) -> tuple[float, float]:
    """Measures a stream of batch sizes, after its first batches, for at least `seconds`.

    Returns:
        Seconds per clip, and clips per second.
    """
    list(itertools.islice(batches, 8))
    started, clips = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        clips += next(batches)
    taken = time.perf_counter() - started
    return taken / clips, clips / taken
