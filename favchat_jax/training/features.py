"""Keeps the frozen encoders' features of each clip beside the run, so that later epochs do not run the encoders.

From stage 3 on, the encoders and the fusion are frozen, so a clip's frames have the same features in every epoch. The
Q-Formers read the question and have dropout, so they still run in each step.
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
from safetensors.numpy import load_file

from favchat_jax import sharding
from favchat_jax.checkpoints.run import Assembly
from favchat_jax.checkpoints.tensors import save_tensors
from favchat_jax.checkpoints.weights_folder import Weights
from favchat_jax.data.loader import Batch
from favchat_jax.files import draft_file
from favchat_jax.models.favchat import ClipFeatures, FaVChat
from favchat_jax.stages import ENCODING, group_of


class KeptFeatures:
    """A folder with one file of features for the frames of every clip that a run has seen.

    Args:
        folder: place of the files; made if it is missing.
        model: its `encode` computes the features.
        frozen: its frozen weights by path.
        mesh: devices that encode.
        frames: shape of a batch's frames, [B, T, H, W, C].
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
        """Returns a batch's features in host memory; encodes the batch if a clip has none yet."""
        # By content, so that a clip which was mended and packed again is encoded again.
        names = [hashlib.sha256(frames.tobytes()).hexdigest() for frames in batch.arrays["frames"]]
        rows = [row for name in names if (row := self._read(name)) is not None]
        if len(rows) < len(names):
            frames = sharding.place_batch({"frames": batch.arrays["frames"]}, self._mesh)["frames"]
            encoded = jax.tree.leaves(jax.device_get(self._encode(self._params, frames)))
            rows = [[leaf[i] for leaf in encoded] for i in range(len(names))]
            for name, row in zip(names, rows, strict=True):
                self._write(name, row)
        return jax.tree.unflatten(self._tree, [np.stack(leaves) for leaves in zip(*rows, strict=True)])

    def _file(self, name: str) -> Path:
        return self._folder / f"{name[:32]}.safetensors"

    def _read(self, name: str) -> list[np.ndarray] | None:
        try:
            stored = load_file(self._file(name))
        except (FileNotFoundError, SafetensorError):  # not seen yet, or damaged
            return None
        return [stored[key] for key in sorted(stored, key=int)]

    def _write(self, name: str, row: list[np.ndarray]) -> None:
        with draft_file(self._file(name), sync=False) as draft:  # a damaged file is written again
            save_tensors({str(i): np.ascontiguousarray(leaf) for i, leaf in enumerate(row)}, draft)


def placement(
    parts: Assembly, workdir: Path, frozen: dict[str, jax.Array], mesh: Mesh
) -> Callable[[Batch], dict[str, Any]]:
    """Returns a function that places a batch on its devices, with kept features instead of frames if so configured."""
    config, kept = parts.config, None
    if config.data.keep_features:
        frames = (config.batch, *config.frames_shape)
        kept = KeptFeatures(workdir / "features", parts.model, frozen, mesh, frames)

    def place(batch: Batch) -> dict[str, Any]:
        arrays: dict[str, Any] = {name: array for name, array in batch.arrays.items() if name != "length"}
        if kept:
            del arrays["frames"]
            arrays["features"] = kept.of(batch)
        return sharding.place_batch(arrays, mesh)

    return place
