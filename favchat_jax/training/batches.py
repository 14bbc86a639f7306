"""A stage's clips as batches on this host's devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from favchat_jax import sharding, stages
from favchat_jax.checkpoints.run import Assembly
from favchat_jax.config import Config
from favchat_jax.data.conversation import Conversation, PromptEncoder
from favchat_jax.data.loader import Batch, BatchIterator, training_batches
from favchat_jax.data.sources import open_dataset, prepare, training_split
from favchat_jax.data.video import Augment
from favchat_jax.models.favchat import FaVChat
from favchat_jax.processes import first_alone
from favchat_jax.training.features import KeptFeatures


def open_batches(config: Config, parts: Assembly) -> BatchIterator:
    """The stage's training stream on this host, from its data set, which is packed first where it is not yet."""
    data, qformer, hosts = config.data, config.model.qformer, jax.process_count()
    first_alone(lambda: prepare(data.name, data.root or None, data.packed))
    augment = Augment(scale=(0.5, 1.0) if data.random_crop else (1.0, 1.0), flip=data.flip)
    return training_batches(
        open_dataset(data.name, data.packed, training_split(data.name, config.stage)),
        Conversation(parts.tokenizer, qformer.queries + qformer.extra_queries),
        PromptEncoder(parts.prompt_tokenizer, data.prompt_length),
        text=stages.STAGES[config.stage].text,
        frames=config.model.frames,
        size=config.model.image_size,
        batch=config.batch // hosts,
        buckets=data.buckets,
        questions=data.questions,
        sampling=data.sampling,
        augment=augment if data.random_crop or data.flip else None,
        workers=data.workers,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=hosts,
    )


def placement(
    config: Config, workdir: Path, model: FaVChat, frozen: dict[str, jax.Array], mesh: Mesh
) -> Callable[[Batch], dict[str, Any]]:
    """What a step takes of a batch, on its devices: all arrays, or kept features in place of the frames."""
    size = config.model.image_size
    frames = (config.batch, config.model.frames, size, size, 3)
    kept = KeptFeatures(workdir / "features", model, frozen, mesh, frames) if config.data.keep_features else None

    def place(batch: Batch) -> dict[str, Any]:
        left_out = ("length", "frames") if kept else ("length",)
        arrays = {name: array for name, array in batch.arrays.items() if name not in left_out}
        return sharding.place_batch({**arrays, "features": kept.of(batch)} if kept else arrays, mesh)

    return place
