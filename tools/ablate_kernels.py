"""Measures how much time each tuning of models/kernels saves: python -m tools.ablate_kernels [--only=A,B] [--json=F]

Each tuning is replaced by its plain form in turn, in a process that alternates with one that has all tunings. A row is
a training step (activations kept) or an answer of 64 tokens, as `tools.benchmark` measures them.
"""

import dataclasses
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from configs.common import PRESETS
from favchat_jax import command_line
from favchat_jax.errors import RunError, UserError
from favchat_jax.models.kernels import attention, low_rank
from favchat_jax.models.kernels.linear import transposed_product
from favchat_jax.models.lora import merged
from tools.benchmark import SAME, agreement
from tools.beside_pytorch import material, ours
from tools.beside_pytorch.contest import Runs, Side, alternate

BATCH = 8  # questions that are answered at once
SETTINGS = {"train": "kept", "decode": "merged"}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A tuning and the plain form that replaces it.

    Attributes:
        work: the work that it speeds up, train or decode.
        plain: dotted name -> its replacement.
        compiles: whether it shortens compiling instead of the work.
    """

    work: str
    plain: dict[str, Any]
    compiles: bool = False


def _product(x, kernel):
    return x @ kernel


def _product_with_transposed(x, kernel, scale):
    assert scale is None, "kernels of the benchmark are full"
    return x @ kernel.T


def _any_attention_to_cache(query, keys, values, mask):
    keys, values = keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3)
    return attention.plain(query, keys, values, mask=mask[:, None, None])


def _apart(kernels, adapters, *, alpha, dtype, **options):
    full = [
        merged(kernel, of[1].T.reshape(*kernel.shape[:2], -1), of[0].T, alpha) if of else kernel
        for kernel, of in zip(kernels, adapters, strict=True)
    ]
    return {f"transposed_{i}": kernel.astype(dtype) for i, kernel in enumerate(full)}


def _products_apart(self, x):
    kernels, leading = self.variables["params"], x.shape[:-1]
    products = [
        transposed_product(x.astype(self.dtype), kernel.reshape(-1, x.shape[-1])).reshape(*leading, len(kernel), -1)
        for _, kernel in sorted(kernels.items())
    ]
    return jnp.concatenate(products, axis=-1).reshape(*leading, -1)


MODELS = "favchat_jax.models"
TUNINGS = {
    "low_rank gradient": Tuning("train", {f"{MODELS}.lora.low_rank": low_rank.plain}),
    "flattened products": Tuning(
        "train", {f"{MODELS}.kernels.linear.flat_product": _product, f"{MODELS}.lora.flat_product": _product}
    ),
    "old code generator": Tuning("train", {"favchat_jax.training.step.compiler_options": lambda *_: None}),
    "scanned layers": Tuning("train", {f"{MODELS}.kernels.scan._alike": lambda *_: 0}, compiles=True),
    "transposed kernels": Tuning("decode", {f"{MODELS}.mistral_decoding.transposed_product": _product_with_transposed}),
    "joined kernels": Tuning(
        "decode",
        {
            f"{MODELS}.mistral_decoding.joined": _apart,
            f"{MODELS}.mistral_decoding.DecodingLinear.__call__": _products_apart,
        },
    ),
    "cache read in place": Tuning("decode", {f"{MODELS}.cache.attention_to_cache": _any_attention_to_cache}),
}


def runs(without: str, work: str, folder: str, preset: str) -> Runs:
    """Builds the runs of `work` in a process without one tuning, or with all of them if `without` is empty."""
    for name, plain in TUNINGS[without].plain.items() if without else ():
        owner, attribute = _find(name)
        setattr(owner, attribute, plain)
    return getattr(ours, work)(folder, preset, *([BATCH] if work == "decode" else []))


def _find(name: str) -> tuple[Any, str]:
    """Returns the module or class that holds a dotted name, and the name's last part."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:-1]:
            owner = getattr(owner, part)
        getattr(owner, parts[-1])
        return owner, parts[-1]
    raise ModuleNotFoundError(name)


def measure(name: str, folder: str, preset: str, rounds: int) -> dict[str, Any]:
    """Measures the row of one tuning.

    Raises:
        RunError: the plain form computes other numbers.
    """
    tuning = TUNINGS[name]
    setting = SETTINGS[tuning.work]
    sides = [
        Side(without or "all", runs, without, tuning.work, folder, preset, only=[setting]) for without in ("", name)
    ]
    try:
        timings = [settings[setting] for settings in alternate(sides, rounds).values()]
    finally:
        for side in sides:
            side.close()
    first, second = (timing.results[0] for timing in timings)
    if tuning.work == "train" and abs(first["loss"] - second["loss"]) > SAME * first["loss"]:
        raise RunError(f"without {name} the loss is {second['loss']}, with it {first['loss']}")
    if tuning.work == "decode":
        agreement(first["tokens"], second["tokens"])
    seconds = [timing.first if tuning.compiles else timing.median for timing in timings]
    row = {"tuning": name, "work": "compiling" if tuning.compiles else tuning.work, "with": seconds[0]}
    return {**row, "without": seconds[1], "saves": 1 - seconds[0] / seconds[1]}


def main() -> None:
    """Measures the tunings that the flags name."""
    unknown = [name for name in _ONLY.value if name not in TUNINGS]
    if unknown:
        raise UserError(f"--only={unknown[0]} is unknown: choose from {', '.join(TUNINGS)}")
    if _JSON.value:
        command_line.check_output("--json", _JSON.value)
    jax.config.update("jax_platforms", "cpu")  # of this process: an accelerator belongs to the sides
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        material.make(folder, _PRESET.value)
        for name in _ONLY.value or TUNINGS:
            rows.append(measure(name, folder, _PRESET.value, _ROUNDS.value))
            row = rows[-1]
            print(
                f"{name:24} {row['work']:9} {row['with']:8.3f} s, without {row['without']:8.3f} s: "
                f"saves {row['saves']:.0%}",
                flush=True,
            )
            if _JSON.value:
                Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    _PRESET = flags.DEFINE_enum("preset", "base", PRESETS[:2], "Sizes of the model")
    _ONLY = flags.DEFINE_list("only", [], "Tunings to measure; all by default")
    _ROUNDS = flags.DEFINE_integer("rounds", 5, "Runs of each side that count", lower_bound=1)
    _JSON = flags.DEFINE_string("json", None, "File for the rows")
    command_line.start(main)
