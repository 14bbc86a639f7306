"""Runs the baseline for the loader: processes that decode the same clips and do nothing else."""

import multiprocessing
import time
from collections.abc import Iterator

import numpy as np

from favchat_jax.data.video import decode
from tools.beside_pytorch import material
from tools.beside_pytorch.contest import Runs


def loop(folder: str, preset: str, workers: tuple[int, ...], sides: tuple[int, ...], seconds: float) -> Runs:
    """Measures seconds per clip of the bare loop, in as many processes as the loader has workers, by clips' size."""
    model = material.settings(folder, preset).model

    def run(count: int, side: int):
        def measured() -> tuple[float, float]:
            context = multiprocessing.get_context("spawn")
            together, counts = context.Barrier(count), context.Queue()
            arguments = (folder, side, model.frames, model.image_size, seconds, together, counts)
            processes = [context.Process(target=_decode, args=arguments) for _ in range(count)]
            for process in processes:
                process.start()
            clips = sum(counts.get() for _ in processes)
            for process in processes:
                process.join()
            return 1 / clips, clips

        return measured

    return {material.loader_setting(count, side): run(count, side) for count in workers for side in sides}


def _decode(folder, side, frames, size, seconds, together, counts) -> None:
    """Decodes for `seconds` and puts the clips per second into `counts`."""
    clips = [record.clip for record in material.footage(folder, side).records]
    rng = np.random.default_rng(0)

    def decoded() -> Iterator[None]:
        while True:
            for clip in clips:
                yield decode(clip, frames=frames, size=size, sampling="rand", rng=rng)

    stream = decoded()
    for _ in clips:  # warms up
        next(stream)
    together.wait()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(stream)
        done += 1
    counts.put(done / (time.perf_counter() - started))
