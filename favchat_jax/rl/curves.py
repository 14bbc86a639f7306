"""Draws the curves of a reinforcement run to a picture in its workdir."""

import json
from pathlib import Path

import matplotlib

from favchat_jax.rl.pool import STATES


def draw_curves(workdir: Path) -> None:
    """Writes curves.png: rewards, KL, length of responses, states of samples and utility over iterations."""
    matplotlib.use("Agg")  # draws to a file; needs no display
    from matplotlib import pyplot

    steps, heldout = read_lines(workdir / "metrics.jsonl"), read_lines(workdir / "heldout.jsonl")
    if not steps:
        return
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    at = [line["step"] for line in steps]
    rewards, held, kl, length, states, utility = axes.flat
    for name in sorted(name for name in steps[0] if name.startswith("reward_")):
        part = name.removeprefix("reward_")
        rewards.plot(at, [line[name] for line in steps], label=part)
        held.plot([line["step"] for line in heldout], [line[part] for line in heldout], "o-", label=part)
    kl.plot(at, [line["kl"] for line in steps])
    length.plot(at, [line["response_tokens"] for line in steps])
    states.stackplot(at, *([line[f"share_{state}"] for line in steps] for state in STATES), labels=STATES)
    bins = sorted(name for name in steps[0] if name.startswith("utility_"))
    utility.stackplot(at, *([line[name] for line in steps] for name in bins), labels=bins)
    titles = ("reward of drawn responses", "reward of held-out clips", "KL to the start", "tokens of a response")
    for axis, title in zip(axes.flat, (*titles, "samples by state", "batch by utility"), strict=True):
        axis.set(title=title, xlabel="iteration")
    for axis in (rewards, held, states, utility):
        axis.legend(fontsize=7)
    figure.savefig(workdir / "curves.png", dpi=110)
    pyplot.close(figure)


def read_lines(path: Path) -> list[dict[str, float]]:
    """Reads a file with one JSON object per line, without a last line that a kill left unfinished."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
