"""Saves and restores the checkpoints of a run, with a checksum for each leaf.

WORKDIR/checkpoints/STEP keeps the trainable weights separate from the optimiser's moments, because answering reads the
weights only. Weights that never change in a run are in a weights folder (`weights_folder.py`).
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
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
    Weights,
    abstract,
    check_leaves,
    describe_leaves,
)
from favchat_jax.errors import UserError, one_line
from favchat_jax.files import write_errors
from favchat_jax.processes import first_alone, gathered

log = logging.getLogger("favchat_jax")


@struct.dataclass
class TrainState:
    """Everything that an update changes. A checkpoint holds it and the data iterator's state."""

    step: Int[jax.Array, ""]
    trainable: Weights
    moments: optax.OptState
    key: jax.Array


class Checkpoints:
    """Saves and restores the checkpoints of one run. As a context manager, it waits at its end for the last write.

    Args:
        workdir: the run's folder.
        keep: number of newest checkpoints that are kept.
        alike: whether all processes have the same iterator state, which then serves any number of them.
    """

    def __init__(self, workdir: str | Path, keep: int = 2, *, alike: bool = False):
        self._alike = alike
        self.workdir = Path(workdir).absolute()
        self._folder, self._keep = self.workdir / "checkpoints", keep
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def latest(self) -> int | None:
        """Returns the newest saved step; None if nothing was saved."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns all saved steps, oldest first."""
        return sorted(int(entry.name) for entry in self._folder.glob("*") if entry.name.isdigit())

    def save(self, state: TrainState, iterator_state: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint of `state` and of the data iterator; the device works on in the meantime.

        Raises:
            UserError: this or the previous write failed (full disk); earlier checkpoints are intact.
        """
        step = int(state.step)
        # Copied if this process holds all of it, because the next step donates the state's memory.
        state = jax.tree.map(lambda leaf: np.asarray(leaf) if leaf.is_fully_addressable else leaf, state)
        weights, optimizer = dict(state.trainable), _optimizer_part(state)
        hosts = [dict(iterator_state)] if self._alike else gathered(dict(iterator_state))
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
        """Waits for a write to end; raises UserError if it failed."""
        if self._manager is not None:
            with write_errors(self._folder, *ORBAX_ERRORS):
                self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any] | None] | None:
        """Restores the newest intact checkpoint: (state with the shapes and shards of `like`, iterator state).

        Damaged checkpoints are logged and moved to WORKDIR/damaged if the one before them is intact.

        Returns:
            None if nothing was saved. The iterator state is None if another number of processes saved it.

        Raises:
            UserError: all checkpoints are damaged, or they are of another model.
        """

        def read(step: int, leaves: Mapping) -> tuple[TrainState, dict[str, Any] | None]:
            for path, leaf in like.trainable.items():
                held = leaves["weights"].get(f"['{path}']", {}).get("shape", "none")
                if held != list(leaf.shape):
                    raise UserError(
                        f"checkpoint {step} of {self.workdir} is of another model: {path} has shape {held}, expected "
                        f"{list(leaf.shape)}: train with another --workdir"
                    )
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
            own = hosts[jax.process_index()] if len(hosts) == jax.process_count() else None
            data = hosts[0] if self._alike else own
            return TrainState(part["step"], weights, part["moments"], part["key"]), data

        return self._newest(read, move_damaged=True)

    def load_trainable(self) -> tuple[int, dict[str, jax.Array]]:
        """Reads the newest intact checkpoint's step and trainable weights; leaves the folder unchanged.

        Raises:
            UserError: there is no checkpoint, or all are damaged.
        """

        def read(step: int, leaves: Mapping) -> tuple[int, dict[str, jax.Array]]:
            item = ocp.args.Composite(weights=ocp.args.StandardRestore(abstract(leaves["weights"])))
            weights = flatten_dict(self._open(read_only=True).restore(step, args=item).weights, sep="/")
            check_leaves(weights, leaves["weights"])
            return step, weights

        found = self._newest(read, move_damaged=False)
        if found is None:
            raise UserError(f"{self.workdir} holds no checkpoint: train it first")
        return found

    def close(self) -> None:
        """Waits for the last write and releases the folder."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with write_errors(self._folder, *ORBAX_ERRORS):
                manager.close()

    def _newest(self, read: Callable[[int, Mapping], Any], move_damaged: bool) -> Any:
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            try:
                found = read(step, json.loads((self._folder / str(step) / "leaves" / "metadata").read_text()))
            except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # the file is not the cause
                raise
            except Exception as error:  # Orbax raises many types for a damaged file.
                instead = "; the one before it is read instead" if step != steps[0] else ""
                log.warning("checkpoint %s of %s is damaged (%s)%s", step, self.workdir, one_line(error), instead)
                damaged.append(step)
            else:
                if move_damaged and damaged:
                    self._move_away(damaged)
                return found
        if steps:
            raise UserError(f"every checkpoint in {self._folder} is damaged: delete the workdir and train again")
        return None

    def _move_away(self, steps: list[int]) -> None:
        self.close()
        damaged = self.workdir / "damaged"

        def move() -> None:
            damaged.mkdir(exist_ok=True)
            for step in map(str, steps):
                shutil.rmtree(damaged / step, ignore_errors=True)
                (self._folder / step).rename(damaged / step)

        first_alone(move)

    def _open(self, read_only: bool = False) -> ocp.CheckpointManager:
        """Returns Orbax' manager, made at its first use. One that writes removes what an interrupted run left."""
        if self._manager is None:
            with _without_notes():
                options = ocp.CheckpointManagerOptions(
                    max_to_keep=None if read_only else self._keep,
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    create=not read_only,
                )
                self._manager = ocp.CheckpointManager(self._folder, options=options)
        return self._manager


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Keeps Orbax from noting that a folder is only read, which is meant so."""
    notes = logging.getLogger("absl")
    level = notes.level
    notes.setLevel(logging.ERROR)
    try:
        yield
    finally:
        notes.setLevel(level)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _optimizer_part(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "moments": state.moments, "key": state.key}
