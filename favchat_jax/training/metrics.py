"""Records a run's measurements: each step's values, averaged to lines of metrics.jsonl and to TensorBoard."""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Self

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from favchat_jax.data.loader import Batch
from favchat_jax.errors import RunError
from favchat_jax.files import replace_file
from favchat_jax.processes import is_first


class Metrics:
    """Averages over `every` steps, written by the first process; a context manager that writes the rest at its end.

    Args:
        workdir: of the run.
        resumed_at: step that the run resumes from; later lines of an earlier attempt are removed.
        every: number of steps of a line.

    Attributes:
        latest: last written line.
    """

    def __init__(self, workdir: Path, resumed_at: int, every: int):
        self.latest: dict[str, float] = {}
        self._path, self._every, self._step = workdir / "metrics.jsonl", every, resumed_at
        self._window: list[dict[str, float]] = []
        self._since = time.perf_counter()
        self._board: EventsWriter | None = None
        if is_first():
            cut_lines(self._path, resumed_at)
            (workdir / "tensorboard").mkdir(exist_ok=True)
            # tensorboardX's SummaryWriter would hang on a full disk: its thread dies and the run waits for it.
            self._board = EventsWriter(str(workdir / "tensorboard" / "events"))
            self._board.write_event(Event(step=resumed_at + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # the first error is reported
            self._write_line()
        with contextlib.suppress(OSError):  # every line was flushed when it was written
            if self._board:
                self._board.close()

    def add(self, step: int, values: dict[str, float], clips: int, waited: float = 0.0) -> None:
        """Adds the metrics of one step; writes a line if a window is full.

        Args:
            step: its number.
            values: measurements by name; `tokens` is one of them.
            clips: size of the step's batch.
            waited: seconds for which the device waited for that batch.
        """
        self._step = step
        if self._board:
            self._window.append({**values, "clips": clips, "waited": waited})
        if step % self._every == 0:
            self._write_line()

    def _write_line(self) -> None:
        """Writes the line of the last step, unless no step was added since the line before."""
        if not self._board or not self._window:
            return
        elapsed = time.perf_counter() - self._since
        total = {name: sum(row[name] for row in self._window) for name in self._window[0]}
        rates = {
            "clips_per_second": total.pop("clips") / elapsed,
            "tokens_per_second": total.pop("tokens") / elapsed,
            # The wait for a batch may have begun before its window.
            "input_wait": min(1.0, total.pop("waited") / elapsed),
        }
        line = {"step": self._step, **{name: value / len(self._window) for name, value in total.items()}, **rates}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in line.items() if name != "step"]
        self._board.write_event(Event(wall_time=time.time(), step=self._step, summary=Summary(value=scalars)))
        self._board.flush()
        self.latest, self._window, self._since = line, [], time.perf_counter()


def cut_lines(path: Path, step: int) -> None:
    """Removes the lines after those of `step` from a file of JSON objects, and a line that a kill left unfinished."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    replace_file(path, "".join(line + "\n" for line in kept))


@dataclasses.dataclass(frozen=True)
class Pending:
    """A dispatched step whose metrics were not read yet."""

    step: int
    values: dict[str, jax.Array]
    batch: Batch
    waited: float

    def read(self, metrics: Metrics) -> None:
        """Waits for the step; raises RunError if its loss or its gradient (and so the new weights) is not finite."""
        values = {name: float(value) for name, value in jax.device_get(self.values).items()}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise RunError(
                    f"the {name} of step {self.step} is {values[name]}, clips {', '.join(self.batch.ids)}; "
                    "the last checkpoint is intact: lower optimizer.learning_rate or remove the clips"
                )
        # Every process has its share of a batch; that of the first stands for all.
        values["tokens"] = float(self.batch.arrays["length"].sum()) * jax.process_count()
        metrics.add(self.step, values, len(self.batch.ids) * jax.process_count(), self.waited)
