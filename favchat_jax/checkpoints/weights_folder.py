"""Reads and writes weights folders, which hold a converted encoder or a run's frozen weights.

    DIR/weights/ (Orbax)   DIR/leaves.json (shape, dtype, checksum of each leaf)   DIR/config.json

The checksums detect flipped bits, which Orbax restores without an error.
"""

import contextlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from favchat_jax.errors import UserError, one_line
from favchat_jax.files import replace_folder
from favchat_jax.processes import first_alone
from favchat_jax.sharding import to_host

Weights = Mapping[str, jax.Array]

ORBAX_ERRORS = (ValueError, RuntimeError)  # raised by Orbax, besides OSError, when it cannot write
RESTORE = "copy the complete workdir again, or train again"


class DamagedError(Exception):
    """A checkpoint does not read back as it was written."""


def describe_leaves(tree: Any) -> dict[str, dict]:
    """Computes path -> shape, dtype and CRC-32 of each leaf's bytes."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(to_host(leaf))
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data)
        leaves[jax.tree_util.keystr(path)] = {"shape": list(array.shape), "dtype": str(array.dtype), "crc32": crc}
    return leaves


def check_leaves(tree: Any, leaves: Mapping[str, dict]) -> None:
    """Raises DamagedError if a leaf of `tree` differs from its description in `leaves`."""
    found = describe_leaves(tree)
    wrong = [path for path in sorted(found.keys() | leaves.keys()) if found.get(path) != leaves.get(path)]
    if wrong:
        raise DamagedError(f"{len(wrong)} of {len(leaves)} arrays changed since they were written, first {wrong[0]}")


def save_weights(folder: str | Path, weights: Weights, config: Mapping[str, Any]) -> None:
    """Writes a weights folder completely or not at all. Every process of a run has to call it; the first one writes."""
    tree = unflatten_dict({path: to_host(leaf) for path, leaf in weights.items()}, sep="/")

    def write() -> None:
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="alone"
        )
        # Uncompressed, because weights hardly shrink and compression doubles the time.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
        with (
            replace_folder(folder, *ORBAX_ERRORS) as draft,
            contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as checkpointer,
        ):
            checkpointer.save(draft / "weights", args=ocp.args.PyTreeSave(tree))
            (draft / "leaves.json").write_text(json.dumps(describe_leaves(flatten_dict(tree, sep="/")), indent=1))
            (draft / "config.json").write_text(json.dumps(dict(config), indent=1))

    first_alone(write)


def load_weights(folder: str | Path) -> dict[str, np.ndarray]:
    """Reads a weights folder as a flat dictionary in host memory; raises UserError if it is missing or damaged."""
    folder = Path(folder).absolute()
    leaves = _leaves(folder)
    try:
        with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
            tree = checkpointer.restore(folder / "weights", abstract(leaves))
        weights = flatten_dict(tree, sep="/")
        check_leaves(weights, leaves)
    except Exception as error:  # Orbax raises many types for a damaged file.
        raise UserError(f"{folder} is damaged ({one_line(error)}): make or copy it again") from None
    return weights


def is_weights_folder(folder: str | Path) -> bool:
    """Returns whether a folder is a weights folder, such as a run that tools.export_orbax wrote."""
    return (Path(folder) / "leaves.json").exists()


def weight_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Reads path -> shape of a weights folder's leaves; raises UserError if it is missing or damaged."""
    return {path[2:-2]: tuple(leaf["shape"]) for path, leaf in _leaves(Path(folder)).items()}


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
    """Makes the nested tree of host arrays that Orbax restores into; keys of `leaves` look like ['umt/norm/scale']."""
    flat = {path[2:-2]: np.empty(leaf["shape"], jnp.dtype(leaf["dtype"])) for path, leaf in leaves.items()}
    return unflatten_dict(flat, sep="/")
