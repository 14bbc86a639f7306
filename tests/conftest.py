"""What the tests share: cheap compiles, and a world so small that a whole stage trains in seconds."""

import atexit
import dataclasses
import gc
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before jax is imported. Tests run each program briefly, so the time of compiling it counts. It is next to none where
# a test, or a process that one started, compiled the program before.
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers share what the process that started them made
    COMPILED = tempfile.mkdtemp(prefix="favchat-tests-")
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
gc.set_threshold(50_000, 20, 100)  # searching the objects of imports and traces for garbage takes an eighth of the time

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Shapes in signatures are checked in every call of the modules that are imported from here on. Functions of JAX take
# NumPy's arrays too.
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook(("favchat_jax.models", "favchat_jax.generation"), "beartype.beartype")

from favchat_jax.checkpoints.store import Checkpoints  # noqa: E402
from favchat_jax.config import Config  # noqa: E402
from favchat_jax.data.sources import open_dataset, prepare  # noqa: E402
from favchat_jax.embedded.language_model import make_language_model  # noqa: E402
from favchat_jax.sharding import training_mesh  # noqa: E402
from favchat_jax.train import train  # noqa: E402
from favchat_jax.training.progress import Outcome  # noqa: E402
from favchat_jax.training.step import compiler_options  # noqa: E402

# Compiling takes a third of the time without optimisation and fusion emitters. XLA reads its flags with the first
# device, which no import asks for.
CHEAP_COMPILES = {"xla_backend_optimization_level": 0, **(compiler_options("cpu") or {})}
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), *(f"--{option}={str(value).lower()}" for option, value in CHEAP_COMPILES.items())]
).strip()

ROOT = Path(__file__).parents[1]
DATA = "rendered_faces/smoke"
STAGES = ("stage1", "stage2", "stage3")

SHRUNKEN = {
    "data.name": DATA,
    "data.workers": 0,
    "data.questions": 2,
    "data.buckets": (160,),
    "init.umt": "",
    "init.facexformer": "",
    "init.qformer": "",
    "init.from_run": "",
    "model.image_size": 32,
    "model.frames": 2,
    "model.umt.width": 16,
    "model.umt.depth": 3,
    "model.umt.layers_run": 2,
    "model.umt.heads": 2,
    "model.umt.checkpoint_size": 32,
    "model.no_face_taps": (1, 2),
    "model.facexformer.width": 8,
    "model.facexformer.depths": (1, 1, 1, 1),
    "model.facexformer.heads": (1, 1, 2, 2),
    "model.fusion.heads": 2,
    "model.qformer.width": 16,
    "model.qformer.depth": 1,
    "model.qformer.heads": 2,
    "model.qformer.mlp": 32,
    "model.qformer.queries": 2,
    "model.qformer.extra_queries": 2,
    "model.adapter.hidden": 16,
    "model.lora.rank": 2,
    "pretrain.llm.width": 32,
    "pretrain.llm.layers": 2,
    "pretrain.llm.heads": 2,
    "pretrain.llm.kv_heads": 1,
    "pretrain.llm.mlp": 48,
    "pretrain.llm_steps": 2,
    "pretrain.facial_steps": 2,
    "pretrain.general_steps": 2,
    "pretrain.stills": 8,
    "pretrain.general_clips": 4,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3,
    "steps": 20,  # the same everywhere, since the schedule is part of the compiled step
    "batch": 4,
    "log_every": 1,
    "checkpoint_every": 6,
}


@dataclasses.dataclass(frozen=True)
class SmallWorld:
    """A packed data set of 36 + 18 clips, a language model that has learned next to nothing, and configs for both.

    Attributes:
        packed: where the data set lies.
        llm: the language model's folder.
    """

    packed: str
    llm: str

    def config(self, stage: str, argument: str = "", /, **changes: Any) -> Config:
        """The config of a stage of the tiny preset, shrunken; `changes` by path, dots written as double underscores."""
        config = importlib.import_module(f"configs.{stage}").get_config(argument)
        return Config.from_ml_collections(config).updated(self._values(changes))

    def flags(self, stage: str, argument: str = "", /, **changes: Any) -> list[str]:
        """The command line of the same config."""
        values = [f"--config.{path}={value}" for path, value in self._values(changes).items()]
        return [f"--config=configs/{stage}.py" + (f":{argument}" if argument else ""), *values]

    @property
    def changes(self) -> dict[str, Any]:
        """What every config here has changed, by path."""
        return self._values({})

    def _values(self, changes: dict[str, Any]) -> dict[str, Any]:
        ours = {path.replace("__", "."): value for path, value in changes.items()}
        return {**SHRUNKEN, "data.packed": self.packed, "llm.path": self.llm, **ours}


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> SmallWorld:
    """See `SmallWorld`. Its files are shared by all tests and must not be changed."""
    folder = tmp_path_factory.mktemp("world")
    world = SmallWorld(packed=str(folder / "data"), llm=str(folder / "mistral"))
    prepare(DATA, None, world.packed)
    source = open_dataset(DATA, world.packed, "train")
    Path(world.llm).mkdir()
    make_language_model(
        world.config("stage1"), [source[i] for i in range(len(source))], frames=None, folder=Path(world.llm)
    )
    return world


@dataclasses.dataclass(frozen=True)
class Trained:
    """Three finished stages, each started from the one before; copy a workdir before changing it."""

    folder: Path
    outcomes: dict[str, Outcome]

    def copy(self, stage: str, into: Path) -> Path:
        """A copy of a stage's workdir that a test may change."""
        return Path(shutil.copytree(self.folder / stage, into / stage))


def train_alone(config: Config, workdir: Path) -> Outcome:
    """Trains one stage on the devices that are here, without asking whether the one before is finished."""
    return train(config, workdir, training_mesh(config))


@pytest.fixture(scope="session")
def trained(small_world, tmp_path_factory) -> Trained:
    """See `Trained`."""
    folder = tmp_path_factory.mktemp("trained")
    outcomes, before = {}, ""
    for stage in STAGES:
        outcomes[stage] = train_alone(small_world.config(stage, init__from_run=before), folder / stage)
        before = str(folder / stage)
    return Trained(folder, outcomes)


def newest(workdir: Path) -> dict[str, np.ndarray]:
    """The trainable weights of a workdir's newest whole checkpoint."""
    with Checkpoints(workdir) as checkpoints:
        return {path: np.asarray(leaf) for path, leaf in checkpoints.load_trainable()[1].items()}


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two flat dictionaries hold the same bits."""
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


def damage(item: Path) -> Path:
    """Inverts 64 bytes in the middle of the largest data file below a checkpoint's item; returns that file."""
    files = [path for path in item.rglob("*") if path.is_file() and "d" in path.relative_to(item).parts[:-1]]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    largest.write_bytes(content)
    return largest


def start_module(module: str, *arguments: str, cwd: Path = ROOT, **options: Any) -> subprocess.Popen:
    """Starts `python -m module` as a person does, in the repository's root, with both outputs read as text."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def places_of(processes: int) -> list[str]:
    """What each of several processes on this machine takes as --processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return [f"localhost:{free.getsockname()[1]},{processes},{index}" for index in range(processes)]


def on_devices(script: str, arguments: Callable[[str], list[str]], processes: int = 1) -> str:
    """Runs a script of the tests on eight devices of a CPU; returns what the first process printed.

    Args:
        script: its path in the repository.
        arguments: returns its command line, given what `processes.joined` takes: nothing for a single process.
        processes: number of processes that share the devices.
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // processes}"
    places = places_of(processes) if processes > 1 else [""]
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments(place)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places
    ]
    outputs = [process.communicate() for process in started]
    codes = [process.returncode for process in started]
    assert codes == [0] * processes, "\n".join(errors[-2000:] for _, errors in outputs)
    return outputs[0][0]


def check_refusals(module: str, refused: dict[str, tuple[str, ...]]) -> None:
    """Each of the command lines, started at once, ends with exit code 2 and one line that holds what it is under."""
    processes = {expected: start_module(module, *arguments) for expected, arguments in refused.items()}
    for expected, process in processes.items():
        stdout, stderr = process.communicate(timeout=200)
        assert (process.returncode, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert expected in stderr


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MiB of its own, to be filled."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C as a process in the foreground has it, however the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fill(disk: Path) -> Path:
    """Writes a file that leaves no room on a disk; returns it."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return ballast
    raise AssertionError("unreachable: a file system without an end")


@pytest.fixture(scope="session", autouse=True)
def one_device() -> None:
    """The tests count on a single CPU device."""
    assert jax.device_count() == 1
