"""The benchmarks, one module each, looked up by the name in a config of `configs/eval`.

A module has `run(config, session) -> Result` and may have `table(result) -> str`, which formats its figures for a
terminal. To add a benchmark, write its module and add a line here.
"""

import importlib
from types import ModuleType

from favchat_jax.errors import UserError

BENCHMARKS = {
    **{
        name: f"favchat_jax.evaluation.benchmarks.{name}"
        for name in ("dfec", "dfew", "emer", "held_out_qa", "mafw", "youtube_faces")
    },
    "rendered": "favchat_jax.embedded.benchmark",
}


def benchmark_of(name: str) -> ModuleType:
    """Imports the module of a benchmark; raises UserError for an unknown name."""
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r} is unknown: choose one of {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[name])
