"""Keeps compiled programs and what leads to them, so that a second start of a command is quick.

JAX keeps compiled programs itself. Before it can look one up, Python has to trace the model's functions once more,
which takes seconds. `kept` saves that: it keeps the traced program in JAX's exchange format (`jax.export`).
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
from jax.experimental.compilation_cache import compilation_cache

from favchat_jax.errors import RunError, UserError, one_line
from favchat_jax.files import replace_file

log = logging.getLogger("favchat_jax")

NUMBERS = ("jax_enable_x64", "jax_default_matmul_precision")  # options of JAX that change what is traced
MOST = 200  # traces that a folder keeps, the last used ones


def keep_programs(folder: Path, seconds: float = 1.0) -> None:
    """Keeps programs compiled from now on in `folder/compiled`, unless JAX_COMPILATION_CACHE_DIR names another place.

    CPU programs contain instructions of that processor, so each type of processor has its own folder.

    Args:
        folder: the workdir in training, the user's cache in answering.
        seconds: shortest compilation whose program is kept.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled" / _machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()  # an earlier stage of this process used another folder


def user_cache() -> Path | None:
    """Makes the user's cache of this package, `~/.cache/favchat_jax`; returns None if it cannot be written."""
    with contextlib.suppress(OSError, RuntimeError):  # read-only, or a user without a home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "favchat_jax"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None


def _machine() -> str:
    if jax.default_backend() != "cpu":
        return jax.default_backend()
    with contextlib.suppress(OSError):
        flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))]
        return f"cpu-{hashlib.sha256(''.join(flags[:1]).encode()).hexdigest()[:12]}"
    return "cpu"


class Traces:
    """A folder of traces for one model, whose files later processes read.

    A trace is only read by the code, the libraries and the kind of processor that wrote it.

    Args:
        folder: made if it is missing; nothing is kept if it cannot be written.
        model: text of everything that the traces depend on beside the code.
    """

    def __init__(self, folder: Path, model: str):
        self._folder = folder / "traces"
        numbers = repr([getattr(jax.config, option) for option in NUMBERS])
        self._key = _digest(_code(), jax.__version__, flax.__version__, _machine(), numbers, model)

    def read(self, name: str) -> bytes | None:
        """Returns the content that was kept under a name; None if there is none, or if it is damaged."""
        with contextlib.suppress(OSError):
            path = self._path(name)
            digest, _, content = path.read_bytes().partition(b"\n")
            if digest == hashlib.sha256(content).hexdigest().encode():
                with contextlib.suppress(OSError):  # a folder that is only read
                    path.touch()
                return content
        return None

    def write(self, name: str, content: bytes) -> None:
        """Keeps content under a name, and drops what was not used for longest."""
        with contextlib.suppress(OSError, UserError, RunError):  # a cache is a convenience
            self._folder.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(content).hexdigest().encode()
            replace_file(self._path(name), digest + b"\n" + content, sync=False)
            oldest_first = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in oldest_first[:-MOST]:
                path.unlink()

    def _path(self, name: str) -> Path:
        return self._folder / _digest(self._key, name)


def kept(
    compiled: jax.stages.Wrapped, name: str, traces: Traces | None, donated: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Returns a compiled function that is not traced again where an earlier process has kept its trace.

    Args:
        compiled: the jitted function. Named tuples in its arguments and results must be registered with `jax.export`;
            arguments by name are static.
        name: of the function, unique among those of its model.
        traces: where its traces are; None returns `compiled`.
        donated: numbers of the arguments whose memory the results may take, the same as those of `compiled`.
    """
    return compiled if traces is None else _Kept(compiled, name, traces, donated)


class _Kept:
    def __init__(self, compiled: jax.stages.Wrapped, name: str, traces: Traces, donated: tuple[int, ...]):
        self._compiled, self._name, self._traces, self._donated = compiled, name, traces, donated
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        signature = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves), tuple(sorted(static.items()))
        if signature not in self._programs:
            self._programs[signature] = self._program(f"{self._name} {signature}", arguments, static)
        return self._programs[signature](*arguments)

    def _program(self, name: str, arguments: tuple, static: dict[str, Any]) -> Callable[..., Any]:
        content = self._traces.read(name)
        if content is not None:
            return self._compile(jax.export.deserialize(bytearray(content)))
        try:
            exported = jax.export.export(self._compiled)(*arguments, **static)
        except (ValueError, NotImplementedError) as error:
            # JAX exports no kernel without a stable format, such as a GPU's attention. The function itself works, and
            # a mistake in it is raised again when it is called.
            log.info("%s is traced anew at each start, since JAX cannot export it: %s", self._name, one_line(error))
            return functools.partial(self._compiled, **static)
        self._traces.write(name, bytes(exported.serialize()))
        return self._compile(exported)

    def _compile(self, exported: jax.export.Exported) -> Callable[..., Any]:
        return jax.jit(exported.call, donate_argnums=self._donated)


def _code() -> str:
    """Returns a text that changes with the package's files."""
    root = Path(__file__).parent
    stats = ((path, path.stat()) for path in sorted(root.rglob("*.py")))
    return " ".join(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
