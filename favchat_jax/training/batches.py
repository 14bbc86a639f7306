"""Opens a stage's clips as batches on this host, and fetches them."""

import time

import jax

from favchat_jax import stages
from favchat_jax.checkpoints.run import Assembly
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.kept_tracks import KeptTracks, file_of, find_all
from favchat_jax.data.loader import Batch, BatchIterator, training_batches
from favchat_jax.data.sources import open_dataset, prepare, training_split
from favchat_jax.data.video import Augment
from favchat_jax.processes import first_alone
from favchat_jax.training.metrics import Pending


def open_batches(parts: Assembly) -> BatchIterator:
    """Opens the training stream of a stage; first packs its data set and finds its faces, as far as needed."""
    config, data, hosts = parts.config, parts.config.data, jax.process_count()
    text = stages.STAGES[config.stage].text
    assert text is not None, "stage grpo draws its own text"
    first_alone(lambda: prepare(data.name, data.root or None, data.packed, missing_share=data.missing_share))
    source = open_dataset(data.name, data.packed, training_split(data.name, config.stage))
    frames, size = config.model.frames, config.model.image_size
    if crop := FaceCrop.of(data) if data.face_crop else None:
        first_alone(lambda: find_all(source, crop, frames=frames, size=size, processes=data.workers))
    augment = Augment(scale=(0.5, 1.0) if data.random_crop else (1.0, 1.0), flip=data.flip)
    return training_batches(
        source,
        parts.conversation,
        parts.prompt,
        text=text,
        frames=frames,
        size=size,
        batch=config.batch // hosts,
        buckets=data.buckets,
        questions=data.questions,
        sampling=data.sampling,
        augment=augment if data.random_crop or data.flip else None,
        face_crop=crop,
        tracks=KeptTracks(file_of(source, crop, frames)) if crop else None,
        workers=data.workers,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=hosts,
    )


def next_batch(batches: BatchIterator, pending: Pending | None) -> tuple[Batch, float]:
    """Returns the next batch, and an upper bound of the seconds that the device waited for it.

    The device is idle as soon as the pending step is done.
    """
    started = time.perf_counter()
    batch = next(batches)
    idle = pending is None or pending.values["loss"].is_ready()  # type: ignore[attr-defined]
    return batch, time.perf_counter() - started if idle else 0.0
