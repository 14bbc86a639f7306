"""A folder that holds part of a model for good: a converted encoder, a run's frozen weights.

    DIR/weights/ (Orbax)   DIR/leaves.json (shape, dtype, checksum of each leaf)   DIR/config.json

Orbax restores flipped bits without an error, hence the checksums.
"""

import contextlib
import errno
import json
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from favchat_jax.errors import UserError

Weights = Mapping[str, jax.Array]


class DamagedError(Exception):
    """A checkpoint that does not read back as it was written."""


def whole(array: Any) -> np.ndarray:
    """All of an array in host memory, wherever its shards lie; all processes of a run have to ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def describe_leaves(tree: Any) -> dict[str, dict]:
    """Path -> shape, dtype and CRC-32 of each leaf's bytes."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(whole(leaf))
        crc = zlib.crc32(array.reshape(-1).view(np.uint8))
        leaves[jax.tree_util.keystr(path)] = {"shape": list(array.shape), "dtype": str(array.dtype), "crc32": crc}
    return leaves


def check_leaves(tree: Any, leaves: Mapping[str, dict]) -> None:
    """Raises DamagedError where a leaf of `tree` is not what `leaves` says was written."""
    found = describe_leaves(tree)
    wrong = [path for path in sorted(found.keys() | leaves.keys()) if found.get(path) != leaves.get(path)]
    if wrong:
        raise DamagedError(f"{len(wrong)} of {len(leaves)} arrays changed since they were written, first {wrong[0]}")


def draft_of(folder: Path) -> Path:
    """Where a folder is filled before it takes its place: hidden beside it, under a name that no person gives."""
    return folder.with_name(f".{folder.name}.draft-favchat")


def save_weights(folder: str | Path, weights: Weights, config: Mapping[str, Any]) -> None:
    """Writes a weights folder, beside its place first, so that a folder that is there is whole.

    Of several processes all have to call it, and the first one writes.
    """
    folder = Path(folder).absolute()
    draft = draft_of(folder)
    tree = unflatten_dict({path: whole(leaf) for path, leaf in weights.items()}, sep="/")
    if jax.process_index():
        return
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="alone")
    # Uncompressed: random bits hardly shrink, and trying takes twice the time.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    try:
        with (
            full_disk_told(folder),
            contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as checkpointer,
        ):
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
            draft.mkdir(parents=True)
            checkpointer.save(draft / "weights", args=ocp.args.PyTreeSave(tree))
            (draft / "leaves.json").write_text(json.dumps(describe_leaves(flatten_dict(tree, sep="/")), indent=1))
            (draft / "config.json").write_text(json.dumps(dict(config), indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
    finally:
        _remove(draft)


def _remove(folder: Path) -> None:
    """Removes a folder for good: after a write that failed, Orbax's threads go on with others for a moment."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)
        if not folder.exists():
            return


def weight_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Path -> shape of what a weights folder holds; raises UserError where it is missing or damaged."""
    return {path[2:-2]: tuple(leaf["shape"]) for path, leaf in _leaves(Path(folder)).items()}


def load_weights(folder: str | Path) -> dict[str, np.ndarray]:
    """Reads a weights folder as a flat dictionary in host memory; raises UserError where it is missing or damaged."""
    folder = Path(folder).absolute()
    leaves = _leaves(folder)
    try:
        with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
            tree = checkpointer.restore(folder / "weights", abstract(leaves))
        weights = flatten_dict(tree, sep="/")
        check_leaves(weights, leaves)
    except Exception as error:  # Orbax raises many kinds for a damaged file, none of them its own.
        raise UserError(f"{folder} is damaged ({one_line(error)}): make or copy it again") from None
    return weights


def _leaves(folder: Path) -> dict[str, dict]:
    try:
        return json.loads((folder / "leaves.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a weights folder: make it with tools.convert_weights, or name another"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({one_line(error)}): make or copy it again") from None


def abstract(leaves: Mapping[str, dict]) -> dict:
    """The nested tree that Orbax restores arrays of host memory like; keys of `leaves` read like ['umt/norm/scale']."""
    flat = {path[2:-2]: np.empty(leaf["shape"], jnp.dtype(leaf["dtype"])) for path, leaf in leaves.items()}
    return unflatten_dict(flat, sep="/")


@contextlib.contextmanager
def full_disk_told(folder: Path):
    """Turns the many ways in which a write fails into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        mend = place_mend(error) or "free disk space, then run the same command again"
        raise UserError(f"could not write {folder} ({one_line(error)}): {mend}") from None


def place_mend(error: Exception) -> str:
    """What mends a write that failed because of its place; nothing where it can have failed for another reason."""
    mends = {
        errno.ENOENT: "no folder can be made there, name another place",
        errno.ENOTDIR: "a file is in the way, name another place",
        errno.EACCES: "check the permissions, or name another place",
        errno.EPERM: "check the permissions, or name another place",
        errno.EROFS: "nothing can be written there, name another place",
        errno.ENAMETOOLONG: "name a shorter one",
    }
    return mends.get(getattr(error, "errno", None), "")


def one_line(error: Exception) -> str:
    """What an error says, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else text[:157] + "..."
