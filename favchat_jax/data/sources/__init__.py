"""Provides the data sets of clips with text, one module per source; `SOURCES` lists them by name.

Every source yields the same `Record`: an encoded clip, the 83 labels of CelebV-HQ, a summary, question-answer pairs
(paper, Section 3.2) and the target strings of the facial reward. `prepare` packs a source, `open_dataset` reads it.
To add a source, write a `storage.RecordBuilder` and add a line here.
"""

import importlib
from typing import Any

from favchat_jax.data import storage
from favchat_jax.errors import UserError

# Name -> module:class of its builder, imported on demand.
SOURCES = {
    "rendered_faces": "favchat_jax.embedded.dataset:RenderedFaces",
    "celebvhq": "favchat_jax.data.sources.celebvhq:CelebVHQ",
    "corpus": "favchat_jax.data.sources.corpus:Corpus",
}


def builder_of(name: str) -> tuple[type[storage.RecordBuilder], str | None]:
    """Returns the builder class and the size for a name: a source, or `source/size` if it has several sizes.

    Raises:
        UserError: the source or size is unknown.
    """
    name, _, size = name.partition("/")
    if name not in SOURCES:
        raise UserError(f"data set '{name}' is unknown: choose one of {', '.join(SOURCES)}")
    module, _, cls = SOURCES[name].partition(":")
    builder = getattr(importlib.import_module(module), cls)
    known = [config.name for config in builder.BUILDER_CONFIGS]
    if size and size not in known:
        raise UserError(f"data set '{name}' has no size '{size}'; its sizes: {', '.join(known) or 'none'}")
    return builder, size or (known[0] if known else None)


def prepare(name: str, root: str | None, data_dir: str, **options: Any) -> str:
    """Packs the data set `name` under `data_dir` unless it is packed already, and returns its folder.

    An interrupted build is never mistaken for a complete one.

    Args:
        name: one of SOURCES, or NAME/SIZE for a source with several sizes.
        root: folder of the source's files; unused if clips are drawn.
        data_dir: folder of packed data sets.
        options: options of the builder, such as `missing_share`, the largest share of clips that may be missing.

    Raises:
        UserError: the name is unknown, or files in `root` are missing or malformed.
    """
    builder, size = builder_of(name)
    folder = storage.folder_of(builder, size, data_dir)
    if storage.is_packed(folder) and not root:
        return str(folder)
    return storage.build(builder, size, root, data_dir, **options)


def open_dataset(name: str, data_dir: str, split: str) -> storage.RecordSource:
    """Opens split "train", "heldout" or another split of a prepared data set, such as "rl" of a corpus.

    Raises:
        UserError: the data set is not prepared, or the split does not exist.
    """
    return storage.RecordSource(*builder_of(name), data_dir, split)


def training_split(name: str, stage: str) -> str:
    """Returns a stage's training split: the split of its name if the data set has one, else "train"."""
    return stage if stage in builder_of(name)[0].VIEWS else "train"


def stored_digest(name: str, data_dir: str) -> str | None:
    """Returns the digest of a packed data set's source files; None before it is packed."""
    return storage.stored_digest(storage.folder_of(*builder_of(name), data_dir))
