"""The embedded data set: rendered talking heads and general clips, drawn by every core at once."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import tensorflow_datasets as tfds

from favchat_jax.data import rendered_faces
from favchat_jax.data.datasets import Record
from favchat_jax.data.datasets.packing import RecordBuilder


@dataclass(eq=False)
class Size(tfds.core.BuilderConfig):
    """How many clips each split has, and the seed that all of them follow from."""

    train: int = 0
    heldout: int = 0
    seed: int = 0


class RenderedFaces(RecordBuilder, skip_registration=True):
    """Procedurally drawn face clips in CelebV-HQ's vocabulary, one clip in six a general one without a face."""

    name = "rendered_faces"
    BUILDER_CONFIGS = [
        Size(name="full", description="The demo's clips.", train=2400, heldout=480),
        Size(name="smoke", description="A few clips, for tests.", train=36, heldout=18),
    ]

    def counts(self) -> dict[str, int]:
        """Clips of each split."""
        return {"train": self.builder_config.train, "heldout": self.builder_config.heldout}

    def records(self, split: str) -> Iterator[Record]:
        """Draws the split's clips, in order."""
        render = partial(rendered_faces.render, self.builder_config.seed, split)
        context = multiprocessing.get_context("spawn")  # the parent may hold jax's threads, which a fork would break
        with ProcessPoolExecutor(os.cpu_count(), context, initializer=_start_worker) as pool:
            yield from pool.map(render, range(self.counts()[split]), chunksize=4)


def _start_worker() -> None:
    """One core a worker, and no worker that outlives its parent."""
    import cv2

    cv2.setNumThreads(1)

    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
