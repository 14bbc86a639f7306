"""The frozen encoders' features of each clip, kept beside the run, so that later epochs do not run the encoders.

From stage 3 on nothing in the encoders and in v1's fusion learns, so that the same frames of a clip have the same
features in every epoch. Q-Formers, which read the question and have dropout, still run in each step.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from favchat_jax import sharding
from favchat_jax.checkpoints.weights_folder import Weights
from favchat_jax.config import Config
from favchat_jax.data.loader import Batch
from favchat_jax.files import draft_file
from favchat_jax.models.favchat import ClipFeatures, FaVChat
from favchat_jax.stages import ENCODING, group_of


class KeptFeatures:
    """A folder with a file of features for every clip that a run has seen.

    Args:
        folder: where they lie; made where it is missing.
        model: whose `encode` makes them, of `frozen`, its weights by path, on `mesh`.
        frames: shape of a batch's frames, [B, T, H, W, 3].
    """

    def __init__(self, folder: Path, model: FaVChat, frozen: Weights, mesh: Mesh, frames: tuple[int, ...]):
        folder.mkdir(exist_ok=True)
        self._folder, self._mesh = folder, mesh
        weights = {path: leaf for path, leaf in frozen.items() if group_of(path) in ENCODING}
        self._params = unflatten_dict(weights, sep="/")
        self._encode = jax.jit(lambda params, frames: model.apply({"params": params}, frames, method="encode"))
        shapes = jax.eval_shape(self._encode, self._params, jax.ShapeDtypeStruct(frames, jnp.uint8))
        self._tree = jax.tree.structure(shapes)

    def of(self, batch: Batch) -> ClipFeatures:
        """A batch's features in host memory; where a clip has none yet, all of its frames are encoded."""
        rows = [row for name in batch.ids if (row := self._read(name)) is not None]
        if len(rows) < len(batch.ids):
            frames = sharding.place_batch({"frames": batch.arrays["frames"]}, self._mesh)["frames"]
            encoded = jax.tree.leaves(jax.device_get(self._encode(self._params, frames)))
            rows = [[leaf[i] for leaf in encoded] for i in range(len(batch.ids))]
            for name, row in zip(batch.ids, rows, strict=True):
                self._write(name, row)
        return jax.tree.unflatten(self._tree, [np.stack(leaves) for leaves in zip(*rows, strict=True)])

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def _read(self, name: str) -> list[np.ndarray] | None:
        try:
            stored = load_file(self._file(name))
        except (FileNotFoundError, SafetensorError):  # not seen yet, or damaged
            return None
        return [stored[key] for key in sorted(stored, key=int)]

    def _write(self, name: str, row: list[np.ndarray]) -> None:
        with draft_file(self._file(name), sync=False) as draft:  # a damaged file is made again
            save_file({str(i): np.ascontiguousarray(leaf) for i, leaf in enumerate(row)}, draft)


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
