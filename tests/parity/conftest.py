"""Parity with reference implementations: the same weights in, the same numbers out, in float32.

Weights come from the reference's own initialiser (with vectors moved off their zeros and ones). They are saved as
the published file, converted to a weights folder and loaded from there. The table of errors is printed at the end.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict

from favchat_jax.checkpoints.table import Table, read
from favchat_jax.checkpoints.tensors import open_tensors
from favchat_jax.checkpoints.weights_folder import load_weights, save_weights

SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)))
BOUND = 1e-5
_ERRORS: list[tuple[str, int, float]] = []


@pytest.fixture
def same() -> Callable[[str, int, Any, Any], None]:
    """Asserts that our result is within BOUND of the reference's largest value, and keeps the error for the table."""

    def check(what: str, seed: int, ours: Any, reference: Any) -> None:
        ours, reference = np.asarray(ours), np.asarray(reference)
        assert ours.shape == reference.shape
        error = float(np.abs(ours - reference).max() / np.abs(reference).max())
        _ERRORS.append((what, seed, error))
        assert error <= BOUND, f"{what}, seed {seed}: {error:.1e}"

    return check


def pytest_terminal_summary(terminalreporter) -> None:
    if not _ERRORS:
        return
    terminalreporter.section("largest error over largest value, by seed")
    for what in dict.fromkeys(name for name, _, _ in _ERRORS):
        seeds = {seed: max(e for n, s, e in _ERRORS if (n, s) == (what, seed)) for n, seed, _ in _ERRORS if n == what}
        terminalreporter.write_line(f"{what:<60}" + "".join(f"  {error:.1e}" for error in seeds.values()))


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """Moves a module's vectors (biases, norms) at random, since initialisers leave them at zero and one."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return module.eval()


def converted(table: Table, file: Path, shapes: dict, folder: Path) -> dict:
    """Converts a published file's weights to a weights folder, and loads them as a nested tree."""
    save_weights(folder, read(table, open_tensors(file).items(), shapes, file), {})
    return unflatten_dict(load_weights(folder), sep="/")


def saved(state: Iterable[tuple[str, torch.Tensor]] | dict, file: Path, key: str | None = None) -> Path:
    """Saves a state dict in its published form, below `key` if given; returns the file."""
    state = {name: tensor.detach().clone() for name, tensor in dict(state).items()}
    torch.save({key: state, "epoch": 3} if key else state, file)
    return file
