"""The checkpoints of a run, exactly resumable, each leaf with a checksum.

They lie in WORKDIR/checkpoints/STEP, with the trainable weights apart from the optimiser's moments, so that answering
questions reads the weights alone. What never changes in a run is in a weights folder (`weights_folder.py`).
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Int

from favchat_jax.checkpoints.weights_folder import (
    ORBAX_ERRORS,
    RESTORE,
    Weights,
    abstract,
    check_leaves,
    describe_leaves,
    is_weights_folder,
    load_weights,
)
from favchat_jax.errors import UserError, one_line
from favchat_jax.files import write_errors
from favchat_jax.processes import first_alone, gathered
from favchat_jax.stages import group_of

log = logging.getLogger("favchat_jax")


@struct.dataclass
class TrainState:
    """All that an update changes; with the data iterator's state, all that a checkpoint holds."""

    step: Int[jax.Array, ""]
    trainable: Weights
    moments: optax.OptState
    key: jax.Array


class Checkpoints:
    """The checkpoints of one run; as a context manager, it waits at its end for the last write.

    Args:
        workdir: the run's folder.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, workdir: str | Path, keep: int = 2):
        self.workdir = Path(workdir).absolute()
        self._folder, self._keep = self.workdir / "checkpoints", keep
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def latest(self) -> int | None:
        """The newest step that was saved."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """All steps that were saved, oldest first."""
        return sorted(int(entry.name) for entry in self._folder.glob("*") if entry.name.isdigit())

    def save(self, state: TrainState, iterator_state: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint of `state` and of the data iterator; the device goes on meanwhile.

        Raises:
            UserError: this or the write before it failed (full disk); the checkpoints before stay.
        """
        step = int(state.step)
        # What this process holds whole is copied, since the next step gives the state's memory away.
        state = jax.tree.map(lambda leaf: np.asarray(leaf) if leaf.is_fully_addressable else leaf, state)
        weights, optimizer = dict(state.trainable), _optimizer_part(state)
        hosts = gathered(dict(iterator_state))
        with write_errors(self._folder, *ORBAX_ERRORS):
            manager = self._open()
            manager.wait_until_finished()
            manager.save(
                step,
                args=ocp.args.Composite(
                    weights=ocp.args.StandardSave(unflatten_dict(weights, sep="/")),
                    optimizer=ocp.args.StandardSave(optimizer),
                    data=ocp.args.JsonSave({"hosts": hosts} if len(hosts) > 1 else hosts[0]),
                    leaves=ocp.args.JsonSave(
                        {"weights": describe_leaves(weights), "optimizer": describe_leaves(optimizer)}
                    ),
                ),
            )

    def wait(self) -> None:
        """Waits for a write to end; raises UserError where it failed."""
        if self._manager is not None:
            with write_errors(self._folder, *ORBAX_ERRORS):
                self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any] | None] | None:
        """Restores the newest intact checkpoint: (state with the shapes and shards of `like`, iterator state).

        A damaged checkpoint is logged and moved to WORKDIR/damaged, and the one before it is taken.

        Returns:
            None where nothing was ever saved. The iterator state is None where another number of processes saved it.

        Raises:
            UserError: there are checkpoints but all are damaged.
        """

        def read(step: int, leaves: Mapping) -> tuple[TrainState, dict[str, Any] | None]:
            item = ocp.args.Composite(
                weights=ocp.args.StandardRestore(_abstract(unflatten_dict(dict(like.trainable), sep="/"))),
                optimizer=ocp.args.StandardRestore(_abstract(_optimizer_part(like))),
                data=ocp.args.JsonRestore(),
            )
            restored = self._open().restore(step, args=item)
            weights, part = flatten_dict(restored.weights, sep="/"), restored.optimizer
            check_leaves(weights, leaves["weights"])
            check_leaves(part, leaves["optimizer"])
            hosts = restored.data.get("hosts", [restored.data])
            data = hosts[jax.process_index()] if len(hosts) == jax.process_count() else None
            return TrainState(part["step"], weights, part["moments"], part["key"]), data

        return self._newest(read, move_damaged=True)

    def load_trainable(self) -> dict[str, jax.Array]:
        """Reads the trainable weights of the newest intact checkpoint; the folder is not changed.

        Raises:
            UserError: there is no checkpoint, or all are damaged.
        """

        def read(step: int, leaves: Mapping) -> dict[str, jax.Array]:
            item = ocp.args.Composite(weights=ocp.args.StandardRestore(abstract(leaves["weights"])))
            weights = flatten_dict(self._open().restore(step, args=item).weights, sep="/")
            check_leaves(weights, leaves["weights"])
            return weights

        weights = self._newest(read, move_damaged=False)
        if weights is None:
            raise UserError(f"{self.workdir} holds no checkpoint: train it first")
        return weights

    def close(self) -> None:
        """Waits for the last write and releases the folder."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with write_errors(self._folder, *ORBAX_ERRORS):
                manager.close()

    def _newest(self, read: Callable[[int, Mapping], Any], move_damaged: bool) -> Any:
        steps = self.steps()
        for step in reversed(steps):
            try:
                return read(step, json.loads((self._folder / str(step) / "leaves" / "metadata").read_text()))
            except Exception as error:  # Orbax raises many kinds for a damaged file, none of them its own.
                instead = ": taking the one before" if step != steps[0] else ""
                log.warning("checkpoint %s of %s is damaged (%s)%s", step, self.workdir, one_line(error), instead)
                if move_damaged:
                    self._move_away(step)
        if steps:
            raise UserError(f"every checkpoint in {self._folder} is damaged: delete the workdir and train again")
        return None

    def _move_away(self, step: int) -> None:
        self.close()
        damaged = self.workdir / "damaged"

        def move() -> None:
            damaged.mkdir(exist_ok=True)
            shutil.rmtree(damaged / str(step), ignore_errors=True)
            (self._folder / str(step)).rename(damaged / str(step))

        first_alone(move)

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        return self._manager


def load_run_weights(workdir: str | Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """All weights of a run but the language model's base: frozen ones, and the trained ones of its newest step.

    Raises:
        UserError: there is no intact checkpoint, or one of the paths `needed` is missing, the language model's aside.
    """
    workdir = Path(workdir)
    weights = frozen_weights(workdir)
    if not is_weights_folder(workdir):
        with Checkpoints(workdir) as checkpoints:
            weights |= checkpoints.load_trainable()
    missing = sorted(path for path in needed if path not in weights and group_of(path) != "llm")
    if missing:
        where = "" if is_weights_folder(workdir) or (workdir / "frozen").exists() else ", for it has no frozen/"
        count = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        raise UserError(f"{workdir} lacks {missing[0]}{count}{where}: {RESTORE}")
    return weights


def frozen_weights(workdir: Path) -> dict[str, Any]:
    """The weights that a run saved at its start since they never change; of a self-contained folder, all.

    Stage 1 has none but the language model's, which are in its own folder.
    """
    folder = workdir if is_weights_folder(workdir) else workdir / "frozen"
    if folder.exists() and not is_weights_folder(folder):
        raise UserError(f"{folder}/leaves.json is missing: {RESTORE}")
    return load_weights(folder) if folder.exists() else {}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _optimizer_part(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "moments": state.moments, "key": state.key}
