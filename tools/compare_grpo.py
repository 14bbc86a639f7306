"""Held-out reward of several reinforcement runs over rollouts and over iterations, in one picture.

python -m tools.compare_grpo --runs=runs/tiny-v1/grpo,runs/tiny-v1/grpo-plain --figure=docs/figures/grpo.png

It also prints how many rollouts each run needed for the last reward of the last one named.
"""

from pathlib import Path

import matplotlib
import numpy as np
from absl import flags

from favchat_jax import command_line
from favchat_jax.errors import UserError
from favchat_jax.rl.curves import read_lines

LAST = 3  # measurements whose mean is a run's last reward


def rollouts_to_reach(lines: list[dict[str, float]], reward: float) -> float | None:
    """Rollouts at which the held-out facial reward first reaches `reward`, between measurements in a straight line."""
    for before, after in zip([lines[0], *lines], lines, strict=False):
        if after["facial"] >= reward:
            rise = after["facial"] - before["facial"]
            share = (reward - before["facial"]) / rise if rise > 0 else 1.0
            return before["rollouts"] + share * (after["rollouts"] - before["rollouts"])
    return None


def draw(runs: dict[str, list[dict[str, float]]], path: str) -> None:
    """Both pictures side by side."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, constrained_layout=True)
    for axis, name in zip(axes, ("rollouts", "step"), strict=True):
        for label, lines in runs.items():
            axis.plot([line[name] for line in lines], [line["facial"] for line in lines], "o-", label=label)
        axis.set(xlabel={"step": "iterations"}.get(name, name))
        axis.legend()
    axes[0].set(ylabel="held-out facial reward")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Compares the runs that the flags name."""
    if not _RUNS.value:
        raise UserError("needed: --runs=WORKDIR,WORKDIR")
    runs = {Path(folder).name: read_lines(Path(folder) / "heldout.jsonl") for folder in _RUNS.value}
    for name, lines in runs.items():
        if not lines:
            raise UserError(f"{name} holds no heldout.jsonl: name workdirs of configs/grpo.py")
    goal = float(np.mean([line["facial"] for line in list(runs.values())[-1][-LAST:]]))
    for name, lines in runs.items():
        needed = rollouts_to_reach(lines, goal)
        reached = "not reached" if needed is None else f"{needed:.0f} rollouts"
        print(f"{name}: {lines[0]['facial']:.3f} -> {lines[-1]['facial']:.3f}; {goal:.3f}: {reached}")
    if _FIGURE.value:
        draw(runs, _FIGURE.value)


if __name__ == "__main__":
    _RUNS = flags.DEFINE_list("runs", None, "Workdirs of reinforcement runs")
    _FIGURE = flags.DEFINE_string("figure", None, "PNG file to write")
    command_line.start(main)
