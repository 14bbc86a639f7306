"""Lists the benchmarks, one module each, by the names that `configs/eval` uses.

A module has `run(config, session) -> Result` and may have `table(result) -> str`, which formats its figures for a
terminal. To add a benchmark, write its module and add a line here.
"""

import importlib
from types import ModuleType

from favchat_jax.errors import UserError

# Name -> the module, which is imported on demand, and its title in reports.
BENCHMARKS = {
    "dfec": ("favchat_jax.evaluation.benchmarks.dfec", "DFEC, expressions described (Table 1)"),
    "dfew": ("favchat_jax.evaluation.benchmarks.dfew", "DFEW, emotions (Table 3)"),
    "mafw": ("favchat_jax.evaluation.benchmarks.mafw", "MAFW, emotions (Table 3)"),
    "emer": ("favchat_jax.evaluation.benchmarks.emer", "EMER, emotions explained (Table 4)"),
    "youtube_faces": ("favchat_jax.evaluation.benchmarks.youtube_faces", "YouTube Faces, the same person (Table 5)"),
    "held_out_qa": ("favchat_jax.evaluation.benchmarks.held_out_qa", "Held-out questions of v2"),
    "rendered": ("favchat_jax.embedded.benchmark", "Rendered faces, held-out"),
}


def benchmark_of(name: str) -> ModuleType:
    """Imports the module of a benchmark; raises UserError for an unknown name."""
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r} is unknown: choose one of {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[name][0])


def title_of(name: str) -> str:
    """Returns the title of a benchmark in reports, or its name if the benchmark is unknown."""
    return BENCHMARKS[name][1] if name in BENCHMARKS else name
