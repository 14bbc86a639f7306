"""A stage's clips as batches on this host's devices."""

import jax

from favchat_jax import stages
from favchat_jax.checkpoints.run import Assembly
from favchat_jax.config import Config
from favchat_jax.data.conversation import Conversation, PromptEncoder
from favchat_jax.data.loader import BatchIterator, training_batches
from favchat_jax.data.sources import open_dataset, prepare, training_split
from favchat_jax.data.video import Augment
from favchat_jax.processes import first_alone


def open_batches(config: Config, parts: Assembly) -> BatchIterator:
    """The stage's training stream on this host, from its data set, which is packed first where it is not yet."""
    data, qformer, hosts = config.data, config.model.qformer, jax.process_count()
    text = stages.STAGES[config.stage].text
    assert text is not None, "stage grpo draws its own text"
    first_alone(lambda: prepare(data.name, data.root or None, data.packed))
    augment = Augment(scale=(0.5, 1.0) if data.random_crop else (1.0, 1.0), flip=data.flip)
    return training_batches(
        open_dataset(data.name, data.packed, training_split(data.name, config.stage)),
        Conversation(parts.tokenizer, qformer.queries + qformer.extra_queries),
        PromptEncoder(parts.prompt_tokenizer, data.prompt_length),
        text=text,
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
