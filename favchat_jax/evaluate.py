"""Runs a benchmark: python -m favchat_jax.evaluate --config=configs/eval/NAME.py --checkpoint=DIR --out=F.json"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from favchat_jax import command_line
from favchat_jax.errors import UserError
from favchat_jax.generation.sampler import Sampler
from favchat_jax.training.assembly import load_run


def evaluate(config: ml_collections.ConfigDict, checkpoint: str | Path) -> dict[str, Any]:
    """The result of the benchmark that `config.benchmark` names."""
    try:
        benchmark = importlib.import_module(f"favchat_jax.evaluation.benchmarks.{config.benchmark}")
    except ModuleNotFoundError:
        raise UserError(f"benchmark {config.benchmark!r} is unknown: see favchat_jax/evaluation/benchmarks") from None
    return {
        "benchmark": config.benchmark,
        "checkpoint": str(checkpoint),
        **benchmark.run(config, Sampler.of(load_run(checkpoint))),
    }


def table(result: dict[str, Any]) -> str:
    """The result by kind of question, for a terminal."""
    rows = [f"{'kind':<14}{'n':>6}{'accuracy':>10}{'majority':>10}"]
    rows += [
        f"{kind:<14}{row['n']:>6}{row['accuracy']:>10.3f}{row['majority_baseline']:>10.3f}"
        for kind, row in result["by_kind"].items()
    ]
    rows.append(f"{'all':<14}{result['n']:>6}{result['accuracy']:>10.3f}{result['majority_baseline']:>10.3f}")
    return "\n".join(rows)


def main() -> None:
    """Evaluates what the flags say."""
    if _CONFIG.value is None or not _CHECKPOINT.value or not _OUT.value:
        raise UserError("needed: --config=configs/eval/rendered.py --checkpoint=WORKDIR --out=FILE.json")
    command_line.check_kind(_CONFIG, "benchmark", "configs/eval")
    for field, least in (("batch", 1), ("questions", 1), ("max_new_tokens", 1), ("limit", 0)):
        if _CONFIG.value[field] < least:
            raise UserError(f"{field}={_CONFIG.value[field]} is too small: give at least {least}")
    out = Path(_OUT.value)
    parent = out.absolute().parent
    if out.is_dir() or not (parent.is_dir() and os.access(parent, os.W_OK)):  # told now, not after all the work
        raise UserError(f"--out={out} cannot be written: name a file in a folder that exists")
    result = evaluate(_CONFIG.value, _CHECKPOINT.value)
    out.write_text(json.dumps(result, indent=1))
    print(table(result))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the benchmark")
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _OUT = flags.DEFINE_string("out", None, "JSON file to write")
    command_line.start(main)
