"""Draws the held-out reward of several reinforcement runs over rollouts and over iterations, in one picture.

python -m tools.compare_grpo --checkpoint=runs/tiny-v1/grpo,runs/tiny-v1/grpo-plain --figure=docs/figures/grpo.png

Runs whose configs differ only in the seed share one line, their mean, with thin lines for the single runs. The command
also prints how many rollouts each run needed to come within 0.005 of the last reward of the last kind of run.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from absl import flags

from favchat_jax import command_line
from favchat_jax.errors import UserError
from favchat_jax.rl.curves import read_lines

LAST = 3  # measurements whose mean is a run's last reward
MARGIN = 0.005  # tolerance below a reward that counts as reached: less than the held-out clips can resolve
COLORS = ("#d9635f", "#5b84b1", "#6a9a58", "#8d6cab")

Lines = Sequence[Mapping[str, float]]  # of one run's heldout.jsonl
Kinds = Mapping[str, Mapping[str, Lines]]  # kind of run -> workdir -> its lines


def read_runs(workdirs: Sequence[str]) -> Kinds:
    """Returns the measurements of each workdir, by kind of run.

    Raises:
        UserError: a folder holds no reinforcement run, or one without a facial reward, or the runs have different
            facial rewards, or those of a kind were measured at different iterations.
    """
    kinds: dict[str, dict[str, Lines]] = {}
    names: dict[str, str] = {}
    rewards: dict[str, str] = {}
    for folder in workdirs:
        lines = read_lines(Path(folder) / "heldout.jsonl")
        if not lines or not (Path(folder) / "config.json").exists():
            raise UserError(f"{folder} holds no heldout.jsonl and config.json: name workdirs of configs/grpo.py")
        if "facial" not in lines[0]:
            raise UserError(f"{folder} has no reward named facial in rl.rewards, which this command compares")
        config = json.loads((Path(folder) / "config.json").read_text())
        config.pop("seed")
        rewards[folder] = config["rl"]["rewards"]["facial"]["path"]
        if rewards[folder] != rewards[workdirs[0]]:
            differing = f"{workdirs[0]} has {rewards[workdirs[0]]}, {folder} {rewards[folder]}"
            raise UserError(f"the facial rewards cannot be compared: {differing}")
        alike = json.dumps(config, sort_keys=True)
        if alike not in names:
            kind = _kind(config)
            names[alike] = f"{kind}, {folder}" if kind in names.values() else kind
        kinds.setdefault(names[alike], {})[folder] = lines
    for kind, runs in kinds.items():
        if len({tuple(line["step"] for line in lines) for lines in runs.values()}) > 1:
            raise UserError(f"runs of {kind} were measured at different iterations: let each run to its end")
    return kinds


def _kind(config: Mapping) -> str:
    if not config["rl"]["data_efficient"]:
        return "GRPO"
    return {"scale_free": "Data-Efficient GRPO", "published": "as published"}[config["rl"]["utility"]]


def last_reward(lines: Lines) -> float:
    """Returns the mean of a run's last measurements."""
    return float(np.mean([line["facial"] for line in lines[-LAST:]]))


def rollouts_to_reach(lines: Lines, reward: float) -> float | None:
    """Returns the rollouts at which the held-out facial reward first reaches `reward`, by linear interpolation."""
    for before, after in zip([lines[0], *lines], lines, strict=False):
        if after["facial"] >= reward:
            rise = after["facial"] - before["facial"]
            share = (reward - before["facial"]) / rise if rise > 0 else 1.0
            return before["rollouts"] + share * (after["rollouts"] - before["rollouts"])
    return None


def draw(kinds: Kinds, path: str) -> None:
    """Draws both pictures side by side."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, constrained_layout=True)
    for axis, name in zip(axes, ("rollouts", "step"), strict=True):
        for i, (kind, runs) in enumerate(kinds.items()):
            color, rewards = COLORS[i % len(COLORS)], [[line["facial"] for line in lines] for lines in runs.values()]
            at = [line[name] for line in next(iter(runs.values()))]
            if len(runs) > 1:
                axis.plot(at, np.transpose(rewards), color=color, linewidth=0.8, alpha=0.4)
            axis.plot(at, np.mean(rewards, axis=0), ".-", color=color, label=kind)
        axis.set(xlabel={"step": "iterations"}.get(name, name))
        axis.legend()
    axes[0].set(ylabel="held-out facial reward")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Compares the runs that the flags name."""
    if not _CHECKPOINT.value:
        raise UserError("needed: --checkpoint=WORKDIR,WORKDIR")
    if _FIGURE.value:
        command_line.check_output("--figure", _FIGURE.value)
        if not _FIGURE.value.endswith(".png"):
            raise UserError(f"--figure={_FIGURE.value} is not a PNG file: name one that ends in .png")
    kinds = read_runs(_CHECKPOINT.value)
    goal = float(np.mean([last_reward(lines) for lines in list(kinds.values())[-1].values()]))
    for kind, runs in kinds.items():
        for folder, lines in runs.items():
            needed = rollouts_to_reach(lines, goal - MARGIN)
            reached = "not reached" if needed is None else f"{needed:.0f} rollouts"
            first, last = lines[0]["facial"], last_reward(lines)
            print(f"{kind}, {folder}: {first:.3f} -> {last:.3f}; {goal:.3f} less {MARGIN}: {reached}")
    if _FIGURE.value:
        draw(kinds, _FIGURE.value)


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_list("checkpoint", None, "Workdirs of reinforcement runs, with commas between them")
    _FIGURE = flags.DEFINE_string("figure", None, "PNG file to write")
    command_line.start(main)
