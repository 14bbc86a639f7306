"""The training loop: batches in, checkpoints and metrics out, resumable to the bit.

Order within a step: the step is dispatched, the metrics of the step before are read (the device is never waited for
while it has nothing to do), a checkpoint is written if one is due, and only then the next batch is fetched, so that a
saved iterator stands exactly after the last trained batch.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from favchat_jax import sharding, stages
from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.mistral_folder import fingerprint
from favchat_jax.checkpoints.store import Checkpoints, load_config
from favchat_jax.checkpoints.weights_folder import save_weights
from favchat_jax.data.conversation import Conversation, PromptEncoder
from favchat_jax.data.loader import Batch, BatchIterator, training_batches
from favchat_jax.data.sources import open_dataset, prepare, training_split
from favchat_jax.data.video import Augment
from favchat_jax.errors import RunError, UserError
from favchat_jax.files import replace_file
from favchat_jax.models.kernels.quantized import store
from favchat_jax.processes import anyone, first_alone, is_first
from favchat_jax.signals import termination
from favchat_jax.training.checks import check, claim
from favchat_jax.training.features import KeptFeatures
from favchat_jax.training.optimizer import make_optimizer, schedule
from favchat_jax.training.programs import keep_programs, tracing
from favchat_jax.training.step import TrainState, make_step, new_state

log = logging.getLogger("favchat_jax")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        step: the step that the workdir stands at.
        steps: the step at which the run is finished.
        resumed_at: the step that this call started from.
    """

    step: int
    steps: int
    resumed_at: int

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.steps


def train(config: ml_collections.ConfigDict, workdir: str | Path, profile: int = 0) -> Outcome:
    """Trains one stage in `workdir`, from its newest checkpoint if there is one.

    Args:
        config: of the stage.
        workdir: holds all that the run leaves.
        profile: steps of which a trace is written to `workdir/profile`.

    Raises:
        UserError: the workdir belongs to another config, a source of weights or data is missing, the disk is full.
        RunError: the loss became NaN or infinite.
    """
    workdir = Path(workdir)
    check(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch, config.accumulate, mesh)
    claim(workdir, config)
    keep_programs(workdir)
    first_alone(lambda: prepare(config.data.name, config.data.root or None, config.data.packed))
    parts = assembly.assemble(config)
    with contextlib.closing(open_batches(config, parts)) as batches:
        steps = total_steps(config)
        optimizer = make_optimizer(config.optimizer, steps)
        checkpoints = Checkpoints(workdir, config.checkpoints_kept)
        try:
            state, frozen = start(config, workdir, parts, optimizer, checkpoints, batches, mesh)
            resumed_at = int(state.step)
            if resumed_at < steps:
                rate = schedule(config.optimizer, steps)
                update = make_step(
                    parts.model, optimizer, rate, accumulate=config.accumulate, chunk=config.loss_chunk, mesh=mesh
                )
                with (
                    Metrics(workdir, resumed_at, config.log_every) if is_first() else NoMetrics() as metrics,
                    tracing(workdir, profile, resumed_at) as trace,
                ):
                    place = _placement(config, workdir, parts.model, frozen, mesh)
                    state = _run(config, steps, state, frozen, update, batches, checkpoints, metrics, trace, place)
        finally:
            checkpoints.close()
    return Outcome(int(state.step), steps, resumed_at)


def total_steps(config: ml_collections.ConfigDict) -> int:
    """Length of the run in steps: `config.steps`, or that of `config.epochs` over the training split."""
    if config.steps:
        return config.steps
    split = training_split(config.data.name, config.stage)
    records = len(open_dataset(config.data.name, config.data.packed, split))
    return max(1, math.ceil(config.epochs * records / config.batch))


def is_finished(workdir: str | Path) -> bool:
    """Whether the run in a workdir has made its last step; False where there is none."""
    latest = Checkpoints(workdir).latest()
    return latest is not None and latest >= total_steps(ml_collections.ConfigDict(load_config(workdir)))


def open_batches(config: ml_collections.ConfigDict, parts: assembly.Assembly) -> BatchIterator:
    """The stage's training stream on this host."""
    data, hosts = config.data, jax.process_count()
    qformer = config.model.qformer
    return training_batches(
        open_dataset(data.name, data.packed, training_split(data.name, config.stage)),
        Conversation(parts.tokenizer, qformer.queries + qformer.extra_queries),
        PromptEncoder(parts.prompt_tokenizer, data.prompt_length),
        text=stages.STAGES[config.stage].text,
        frames=config.model.frames,
        size=config.model.image_size,
        batch=config.batch // hosts,
        buckets=data.buckets,
        questions=data.questions,
        sampling=data.sampling,
        augment=Augment(scale=(0.5, 1.0) if data.random_crop else (1.0, 1.0), flip=data.flip)
        if data.random_crop or data.flip
        else None,
        workers=data.workers,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=hosts,
    )


class Metrics:
    """Averages of each `every` steps, to metrics.jsonl and TensorBoard; lines after `resumed_at` are cut off."""

    def __init__(self, workdir: Path, resumed_at: int, every: int):
        self._path, self._every = workdir / "metrics.jsonl", every
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resumed_at]
        replace_file(self._path, "".join(line + "\n" for line in kept))
        (workdir / "tensorboard").mkdir(exist_ok=True)
        # Not tensorboardX's SummaryWriter, whose thread dies on a full disk and leaves the run waiting for it.
        self._board = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._board.write_event(Event(step=resumed_at + 1, session_log=SessionLog(status=SessionLog.START)))
        self._window: list[dict[str, float]] = []
        self._since = time.perf_counter()
        self.latest: dict[str, float] = {}

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # every line was flushed when it was written
            self._board.close()

    def add(self, step: int, values: dict[str, float], clips: int, waited: float) -> None:
        """Takes the metrics of one step; writes a line where a window is full."""
        self._window.append({**values, "clips": clips, "waited": waited})
        if step % self._every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Writes what was collected, if anything, as the line of `step`."""
        if not self._window:
            return
        elapsed = time.perf_counter() - self._since
        total = {name: sum(row[name] for row in self._window) for name in self._window[0]}
        rates = {
            "clips_per_second": total.pop("clips") / elapsed,
            "tokens_per_second": total.pop("tokens") / elapsed,
            # A batch may have been waited for before its window began.
            "input_wait": min(1.0, total.pop("waited") / elapsed),
        }
        line = {"step": step, **{name: value / len(self._window) for name, value in total.items()}, **rates}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in line.items() if name != "step"]
        self._board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._board.flush()
        self.latest, self._window, self._since = line, [], time.perf_counter()


class NoMetrics(contextlib.nullcontext):
    """In place of `Metrics` in the processes that write none."""

    latest: dict[str, float] = {}

    def __enter__(self) -> "NoMetrics":
        return self

    def add(self, step: int, values: dict[str, float], clips: int, waited: float) -> None:
        """Forgets the metrics of a step."""

    def flush(self, step: int) -> None:
        """Has nothing to write."""


def start(config, workdir, parts, optimizer, checkpoints, batches, mesh) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state and frozen weights to go on from, on their shards; `batches.set_state` gets what was saved beside."""
    shapes = assembly.weight_shapes(parts.model, config)
    trainable, frozen_shapes = stages.split(shapes, config.variant, config.stage)
    like = jax.eval_shape(
        lambda: new_state({p: jnp.zeros(s.shape, s.dtype) for p, s in trainable.items()}, optimizer, config.seed)
    )
    shards = sharding.state_partitions(like, mesh)
    dtype = jnp.dtype(config.model.dtype)
    restored = checkpoints.restore(sharding.as_placed(like, shards))
    if restored:
        state, iterator_state = restored
        if iterator_state is None:
            log.warning("another number of processes read the clips until here: their stream starts anew")
        else:
            batches.set_state(iterator_state)
        assembly.check_llm(workdir, config)
        loaded = itertools.chain(assembly.load_llm(config.llm.path, dtype), assembly.frozen_weights(workdir).items())
        frozen = {path: sharding.place(path, leaf, mesh, dtype) for path, leaf in loaded}
        log.info("resuming at step %d", int(state.step))
    else:
        trainable, frozen = stages.split(
            assembly.initial_weights(config, parts.model, mesh), config.variant, config.stage
        )
        kept = {path: leaf for path, leaf in frozen.items() if stages.group_of(path) != "llm"}
        if kept:
            save_weights(workdir / "frozen", kept, {"of": "frozen weights of a run"})
        first_alone(lambda: _bind(workdir, config))
        state = jax.jit(new_state, static_argnums=(1, 2), out_shardings=shards, donate_argnums=0)(
            trainable, optimizer, config.seed
        )
        frozen = {path: jnp.asarray(leaf, dtype) for path, leaf in frozen.items()}
    if set(frozen) != set(frozen_shapes):
        raise UserError(f"{workdir}/frozen is not of this config: delete the workdir and train again")
    frozen = store(frozen, config.llm.storage)
    return state, jax.device_put(frozen, sharding.partitions(frozen, mesh))


def _bind(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes what a workdir is of: the language model and the config."""
    llm = {"path": config.llm.path, "fingerprint": fingerprint(config.llm.path)}
    replace_file(workdir / "llm.json", json.dumps(llm))
    # Last, so that a start that failed over a wrong path does not bind the workdir to that path.
    replace_file(workdir / "config.json", json.dumps(json.loads(config.to_json()), indent=1))


def _placement(config, workdir, model, frozen, mesh) -> Callable[[Batch], dict[str, Any]]:
    """What a step takes of a batch, on its devices: all arrays, or kept features in place of the frames."""
    size = config.model.image_size
    frames = (config.batch, config.model.frames, size, size, 3)
    kept = KeptFeatures(workdir / "features", model, frozen, mesh, frames) if config.data.keep_features else None

    def place(batch: Batch) -> dict[str, Any]:
        left_out = ("length", "frames") if kept else ("length",)
        arrays = {name: array for name, array in batch.arrays.items() if name not in left_out}
        return sharding.place_batch({**arrays, "features": kept.of(batch)} if kept else arrays, mesh)

    return place


def _run(config, steps, state, frozen, update, batches, checkpoints, metrics, trace, place) -> TrainState:
    """Steps until the end, SIGTERM or Ctrl-C, which save first."""
    step, stopping = int(state.step), False
    with (
        termination("this step is finished and saved, and the same command goes on") as stop,
        tqdm(total=steps, initial=step, desc=config.stage, unit="step", mininterval=1, disable=not is_first()) as bar,
    ):
        pending: _Pending | None = None
        while step < steps and not stopping:
            batch, waited = _next(batches, pending)
            trace(step, state)
            state, values = update(state, frozen, place(batch))
            step += 1
            if pending:
                pending.read(metrics)
            pending = _Pending(step, values, batch, waited)
            # Processes ask each other now and then alone, since the answer waits for the device.
            if jax.process_count() == 1 or step % config.log_every == 0:
                stopping = anyone(stop.is_set())
            if step % config.checkpoint_every == 0 or step == steps or stopping:
                pending.read(metrics)
                pending = None
                checkpoints.save(state, batches.get_state())
            bar.update()
            if metrics.latest:
                bar.set_postfix(
                    loss=f"{metrics.latest['loss']:.3f}", clips=f"{metrics.latest['clips_per_second']:.0f}/s"
                )
        metrics.flush(step)
        checkpoints.wait()
    return state


@dataclasses.dataclass
class _Pending:
    """A dispatched step whose metrics were not read yet."""

    step: int
    values: dict[str, jax.Array]
    batch: Batch
    waited: float

    def read(self, metrics: Metrics) -> None:
        """Waits for the step; raises RunError where its loss or its gradient (and so the new weights) is not finite."""
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

    def done(self) -> bool:
        """Whether the device has finished the step."""
        return self.values["loss"].is_ready()


def _next(batches: Iterator[Batch], pending: _Pending | None) -> tuple[Batch, float]:
    """The next batch, and the seconds for which the device had to wait for it (at most: it is idle if it is done)."""
    started = time.perf_counter()
    batch = next(batches)
    idle = pending is None or pending.done()
    return batch, time.perf_counter() - started if idle else 0.0
