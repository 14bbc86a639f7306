"""Stores records in ArrayRecord files, in one TFDS schema for every source, and reads them in any order.

TFDS writes into a temporary folder and renames it after closing the last file, so a killed build is never mistaken for
a complete one. Nothing here uses the network: the builders have no bucket and no download.
"""

import contextlib
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tqdm import tqdm

from favchat_jax.data import vocabulary
from favchat_jax.data.record import Question, Record
from favchat_jax.errors import UserError, listed
from favchat_jax.files import lock_file, replace_file, write_errors

log = logging.getLogger("favchat_jax")

INFO = "dataset_info.json"  # TFDS writes it last
METADATA = "metadata.json"  # TFDS's name
MISSING_SHARE = 0.2  # default of `data.missing_share`
FEATURES = {
    "id": tfds.features.Text(),
    "clip": tfds.features.Scalar(dtype=np.bytes_),
    "attributes": tfds.features.Tensor(shape=(len(vocabulary.VOCABULARY),), dtype=np.uint8),
    "summary": tfds.features.Text(),
    "questions": tfds.features.Sequence(
        {"question": tfds.features.Text(), "answer": tfds.features.Text(), "kind": tfds.features.Text()}
    ),
    "targets": {name: tfds.features.Text() for name in ("attributes", "emotion", "action")},
    "source": tfds.features.Text(),
    "reasoning": tfds.features.Text(),
    "has_face": tfds.features.Scalar(dtype=np.bool_),
}


class LocalInfo(tfds.core.DatasetInfo):
    """A DatasetInfo that never looks for a published copy of the data set."""

    def initialize_from_bucket(self) -> None:
        """Does nothing: these data sets are made on this machine."""


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS has no types
    """The base class of all sources' builders.

    A source implements `counts()`, the number of clips of each split, and `records(split)`, which yields `Record`s. One
    that reads files also implements `digest()` and `clip_files()`.

    Args:
        missing_share: largest share of the clips that may be missing; unused if the source knows no missing clips.
        options: of TFDS.
    """

    VERSION = tfds.core.Version("1.1.0")
    LABELS: tuple[str, ...] = ()  # source-specific class labels, stored with each record
    VIEWS: dict[str, tuple[str, ...]] = {}  # split -> the splits whose union it is; some may be empty
    url_infos: dict[str, Any] = {}  # no checksum file, which needs a package that TFDS does not install

    def __init__(self, *, missing_share: float = MISSING_SHARE, **options):
        self._missing_share = missing_share
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = dict(FEATURES)
        if self.LABELS:
            features["labels"] = tfds.features.Tensor(shape=(len(self.LABELS),), dtype=np.int8)  # -1: unknown or absent
        return LocalInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(
                digest=self.digest(), clips=_stamp(self.clip_files()), missing=list(self.missing())
            ),
        )

    def download_config(self) -> tfds.download.DownloadConfig | None:
        """Returns TFDS's build settings; None for the defaults."""
        return None

    def digest(self) -> str:
        """Returns a hash of the source's labels and texts; a packed data set whose source has changed is refused."""
        return ""

    def clip_files(self) -> Mapping[str, Path]:
        """Returns the clips that exist, id -> file, if a change of a file makes the packed data set outdated."""
        return {}

    def missing(self) -> Sequence[str]:
        """Returns the ids of clips that have labels or texts, but no file; they are not packed."""
        return []

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split, count in self.counts().items() if count}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        title = f"{self.name}, {split}"
        with contextlib.closing(self.records(split)) as records:
            for record in tqdm(records, title, self.counts()[split], unit=" clips", mininterval=0.5):
                yield record.id, pack(record, self.LABELS)


def pack(record: Record, labels: tuple[str, ...] = ()) -> dict:
    """Converts a record to TFDS's format, with its source-specific class labels."""
    example = {name: getattr(record, name) for name in FEATURES if name != "questions"}
    example["questions"] = [vars(question) for question in record.questions]
    if labels:
        example["labels"] = np.array([record.labels.get(name, -1) for name in labels], np.int8)
    return example


def unpack(example: dict, labels: tuple[str, ...] = ()) -> Record:
    """Converts a stored example back to the record that `pack` was given."""
    text = {name: example[name].decode() for name in ("id", "summary", "source", "reasoning")}
    rows = zip(*(example["questions"][name] for name in ("question", "answer", "kind")), strict=True)
    classes = dict(zip(labels, map(int, example["labels"]), strict=True)) if labels else {}
    return Record(
        **text,
        clip=bytes(example["clip"]),
        attributes=np.asarray(example["attributes"], np.uint8),
        questions=tuple(Question(*(cell.decode() for cell in row)) for row in rows),
        targets={name: value.decode() for name, value in example["targets"].items()},
        has_face=bool(example["has_face"]),
        labels=classes if max(classes.values(), default=-1) >= 0 else {},
    )


class RecordSource:
    """Reads the records of one split in any order: `len(source)`, `source[i]`.

    Each process opens the files at its first use, so that the source can be pickled to spawned workers.

    Attributes:
        folder: of the packed data set.
        split: name of the split.
    """

    def __init__(self, builder: type[RecordBuilder], size: str | None, data_dir: str, split: str):
        self.folder, self.split = folder_of(builder, size, data_dir), split
        self._labels = builder.LABELS
        self._opened: Sequence[dict] | None = None
        if not is_packed(self.folder):
            where = f"{self.folder}: data set {builder.name}"
            raise UserError(f"{where} is not packed yet: pack it with `sources.prepare`")
        with _quiet():
            info = tfds.builder_from_directory(self.folder).info
        self._parts = [part for part in builder.VIEWS.get(split, (split,)) if part in info.splits]
        if not self._parts:
            splits = ", ".join(sorted(info.splits))
            raise UserError(f"data set {builder.name} has no split '{split}': choose one of {splits}")
        self._length = sum(info.splits[part].num_examples for part in self._parts)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if self._opened is None:
            self._opened = tfds.builder_from_directory(self.folder).as_data_source(split="+".join(self._parts))
        return unpack(self._opened[index], self._labels)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}


def folder_of(builder: type[RecordBuilder], size: str | None, data_dir: str) -> Path:
    """Returns the folder of a packed data set."""
    return Path(data_dir).expanduser() / builder.name / (size or "") / str(builder.VERSION)


def is_packed(folder: Path) -> bool:
    """Returns whether `folder` holds a completely packed data set."""
    return (folder / INFO).exists()


def build(builder_class: type[RecordBuilder], size: str | None, root: str | None, data_dir: str, **options: Any) -> str:
    """Packs a source unless it is packed, and returns its folder; see `sources.prepare`."""
    folder = folder_of(builder_class, size, data_dir)
    with _quiet():
        builder = builder_class(root=root, config=size, data_dir=data_dir, file_format="array_record", **options)
        if not is_packed(folder):
            builder.counts()  # reports missing files before anything is written
            with _alone(folder.parent) as locked:
                if not is_packed(folder):  # another process may have packed it while this one waited
                    _build(builder, folder, clear=locked)
    _check_source(builder, folder, root)
    return str(folder)


def stored_digest(folder: Path) -> str | None:
    """Returns the digest of a packed data set's source; None before it is packed."""
    return _metadata(folder)["digest"] if is_packed(folder) else None


def _metadata(folder: Path) -> dict[str, Any]:
    with _quiet():
        return dict(tfds.builder_from_directory(folder).info.metadata)


def _check_source(builder: RecordBuilder, folder: Path, root: str | None) -> None:
    """Raises UserError if a packed data set is not of the labels, texts and clips that are now in `root`.

    Clips that are no longer there are not asked for. If files have other dates or sizes than at the last check, their
    bytes are compared with the packed ones. Data sets of older versions hold nothing to check the clips by.
    """
    stored, files = _metadata(folder), builder.clip_files()
    outdated = f"{folder} was packed from other files than those now in {root}"
    if stored["digest"] != builder.digest():
        raise UserError(f"{outdated}: delete it to pack again")
    if stored.get("clips") in (None, stamp := _stamp(files)):
        return
    if changed := _changed(folder, files):
        raise UserError(f"{outdated} ({len(changed)} clips: {listed(changed)}): delete it to pack again")
    with contextlib.suppress(UserError):  # a read-only folder is compared again
        replace_file(folder / METADATA, json.dumps({**stored, "clips": stamp}))


def _stamp(files: Mapping[str, Path]) -> str:
    """Returns a hash of the clips' sizes and times of change; "" without clips."""
    digest = hashlib.sha256()
    for clip, path in sorted(files.items()):
        facts = path.stat()
        digest.update(f"{clip}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest() if files else ""


def _changed(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """Returns the clips whose file is not the packed one, or that are not packed."""
    left, changed = dict(files), []
    with _quiet():
        packed = tfds.builder_from_directory(folder)
    for split in packed.info.splits:
        title = f"comparing clips, {split}"
        for example in tqdm(packed.as_data_source(split=split), title, unit=" clips", mininterval=0.5):
            clip = example["id"].decode()
            if clip in left and left.pop(clip).read_bytes() != example["clip"]:
                changed.append(clip)
    return sorted([*changed, *left])


def _build(builder: RecordBuilder, folder: Path, clear: bool) -> None:
    if clear:  # no other process is packing, so these are of a killed build
        for leftover in folder.parent.glob("incomplete.*"):
            shutil.rmtree(leftover)
    if missing := builder.missing():
        log.warning("%s: %d clips are missing and left out: %s", builder.name, len(missing), listed(missing))
    tfds.disable_progress_bar()  # the builders show their own
    with write_errors(folder):
        builder.download_and_prepare(download_config=builder.download_config())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides TFDS's messages about folders and downloads, since stdout is for answers."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Lets one process at a time build below `folder`, until it ends; yields whether the folder could be locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}: choose a writable folder for packed data sets with --config.data.packed=DIR"
        ) from None
    with lock:
        yield lock_file(lock.fileno())
