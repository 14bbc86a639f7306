"""Data sets of clips with text, one file a source. A source is found by its name in `SOURCES`.

Every source gives the same `Record`: an encoded clip, the 83 labels of CelebV-HQ, a summary, question-answer pairs
(paper, Section 3.2) and the target strings of the facial reward. `prepare` packs a source, `open_dataset` reads it.
To add a source, write a `storage.RecordBuilder` and give it a line here.
"""

import importlib
from pathlib import Path
from typing import Any

from favchat_jax.data import storage
from favchat_jax.errors import UserError

# Name -> module:class of its builder, imported when the source is asked for.
SOURCES = {
    "rendered_faces": "favchat_jax.embedded.dataset:RenderedFaces",
    "celebvhq": "favchat_jax.data.sources.celebvhq:CelebVHQ",
    "corpus": "favchat_jax.data.sources.corpus:Corpus",
}


def builder_of(name: str) -> tuple[type[storage.RecordBuilder], str | None]:
    """The builder class and the size that `name` asks for: a source, or `source/size` where it has several.

    Raises:
        UserError: an unknown source or size.
    """
    name, _, size = name.partition("/")
    if name not in SOURCES:
        raise UserError(f"data set '{name}' is not known; there are {', '.join(SOURCES)}")
    module, _, cls = SOURCES[name].partition(":")
    builder = getattr(importlib.import_module(module), cls)
    known = [config.name for config in builder.BUILDER_CONFIGS]
    if size and size not in known:
        raise UserError(f"data set '{name}' has no size '{size}'; there are {', '.join(known) or 'none'}")
    return builder, size or (known[0] if known else None)


def prepare(name: str, root: str | None, data_dir: str, **options: Any) -> str:
    """Packs the data set `name` under `data_dir` unless it lies there already, and returns its folder.

    A build that was cut short leaves nothing that is taken for a complete one.

    Args:
        name: one of SOURCES, or NAME/SIZE where a source has several sizes.
        root: folder of the source's files, for one that is read and not drawn.
        data_dir: where packed data sets lie.
        options: of the builder.

    Raises:
        UserError: unknown name, or a `root` whose files are missing or malformed.
    """
    builder, size = builder_of(name)
    folder = storage.folder_of(builder, size, data_dir)
    if storage.is_packed(folder) and not root:
        return str(folder)
    return storage.build(builder, size, root, data_dir, **options)


def open_dataset(name: str, data_dir: str, split: str) -> storage.RecordSource:
    """Opens split "train" or "heldout" of a prepared data set, or another that it has, such as "rl" of a corpus.

    Raises:
        UserError: the data set is not prepared, or has no such split.
    """
    return storage.RecordSource(*builder_of(name), data_dir, split)


def training_split(name: str, stage: str) -> str:
    """The split that a stage trains on: its own where the data set has one, as a corpus does, else "train"."""
    return stage if stage in builder_of(name)[0].VIEWS else "train"


def stored_digest(name: str, data_dir: str) -> str | None:
    """The digest of the source that a packed data set was made from; None before it is packed."""
    return storage.stored_digest(Path(storage.folder_of(*builder_of(name), data_dir)))
