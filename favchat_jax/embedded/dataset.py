"""Builds the embedded data set of rendered talking heads and general clips, drawn on all cores."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import av
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8
from tqdm import tqdm

from favchat_jax.data.picture import Squares
from favchat_jax.data.record import Record
from favchat_jax.data.storage import RecordBuilder
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.signals import end_with_parent


@dataclass(eq=False)
class Size(tfds.core.BuilderConfig):
    """Holds the number of clips of each split, the seed of all clips, and whether faces lie in larger pictures."""

    train: int = 0
    heldout: int = 0
    seed: int = 0
    far: bool = False


class RenderedFaces(RecordBuilder, skip_registration=True):
    """The data set of drawn face clips in CelebV-HQ's vocabulary; one clip in six is a general one without a face."""

    name = "rendered_faces"
    VERSION = tfds.core.Version("1.5.0")  # increased whenever clips are drawn or stored differently
    BUILDER_CONFIGS = [
        Size(name="full", description="The demo's clips.", train=3000, heldout=480),
        Size(name="smoke", description="A few clips, for tests.", train=36, heldout=18),
        Size(name="far", description="Clips with faces in larger pictures.", train=3000, heldout=480, far=True),
    ]

    LABELS = tuple(rendered_faces.LABELS)

    def __init__(self, *, root: str | None = None, **options):
        del root  # clips are drawn, not read
        super().__init__(**options)

    def counts(self) -> dict[str, int]:
        """Returns the number of clips of each split."""
        return {"train": self.builder_config.train, "heldout": self.builder_config.heldout}

    def records(self, split: str) -> Iterator[Record]:
        """Draws the split's clips in order."""
        draw = rendered_faces.render_far if self.builder_config.far else rendered_faces.render
        render = partial(draw, self.builder_config.seed, split)
        with _pool() as pool:
            yield from pool.map(render, range(self.counts()[split]), chunksize=4)


def draw_stills(
    count: int, seed: int, size: int
) -> tuple[UInt8[np.ndarray, "N 1 size size 3"], dict[str, Int[np.ndarray, " N"]]]:
    """Draws `count` single frames of faces, in no split, at `size` x `size` pixels, and their classes by label."""
    return _draw(rendered_faces.render_still, "stills", count, seed, size)


def draw_general_clips(
    count: int, seed: int, size: int
) -> tuple[UInt8[np.ndarray, "N T size size 3"], dict[str, Int[np.ndarray, " N"]]]:
    """Draws `count` clips without a face, in no split, at `size` x `size` pixels, and their classes by label."""
    return _draw(rendered_faces.render_shapes, "general clips", count, seed, size)


def _draw(render: Callable[..., tuple], kind: str, count: int, seed: int, size: int) -> tuple:
    with _pool() as pool:
        drawn = pool.map(partial(_resized, render, kind, seed, size), range(count), chunksize=32)
        drawn = tqdm(drawn, total=count, desc=f"drawing {kind}", unit="", mininterval=1)
        frames, classes = zip(*drawn, strict=True)
    return np.stack(frames), {label: np.array([c[label] for c in classes], np.int32) for label in classes[0]}


def _resized(render: Callable[..., tuple], kind: str, seed: int, size: int, index: int) -> tuple:
    frames, classes = render(seed, kind, index)
    square = Squares(size)
    return np.stack([square(av.VideoFrame.from_ndarray(frame, format="rgb24")) for frame in frames]), classes


def _pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork would break jax's threads in the parent
    return ProcessPoolExecutor(os.cpu_count(), context, initializer=_start_worker)


def _start_worker() -> None:
    """Limits the worker to one core, and ends it when its parent ends."""
    import cv2

    cv2.setNumThreads(1)
    end_with_parent()
