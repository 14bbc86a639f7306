"""Measures a checkpoint's weight of the facial stream on clips with and without a face (the paper's adapter figure).

python -m tools.adapter_weights --checkpoint=runs/tiny-v2/stage3 --figure=docs/figures/adapter_weights.png

Every held-out clip counts once, with the same request to describe it, so that the words do not reveal the content.
"""

import json
from collections.abc import Sequence

import matplotlib
import numpy as np
from absl import flags

import favchat_jax
from favchat_jax import command_line
from favchat_jax.data.loader import INSTRUCTIONS
from favchat_jax.data.sources import open_dataset
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError
from favchat_jax.evaluation.metrics import cohens_d
from favchat_jax.files import replace_file
from favchat_jax.generation.sampler import Sampler

BATCH = 32
# The paper's later version: mean and standard deviation of the facial stream's weight on each kind of video.
PUBLISHED = {"face clips": (0.702, 0.084), "general clips": (0.297, 0.080)}


def facial_weights(sampler: Sampler, records: Sequence, question: str) -> list[float]:
    """Returns the facial stream's weight for one question about each clip."""
    weights: list[float] = []
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        padded = [*batch, *[batch[0]] * (BATCH - len(batch))]
        frames = [decode(r.clip, frames=sampler.frames, size=sampler.image_size, name=r.id).frames for r in padded]
        shares = sampler.stream_weights(sampler.encode(np.stack(frames)), [[question]] * BATCH)
        weights += [float(share) for share in shares[: len(batch), 0, 1]]
    return weights


def summarise(groups: dict[str, list[float]]) -> dict:
    """Returns the number, mean and standard deviation of each group, and Cohen's d between the two."""
    rows = {name: {"n": len(w), "mean": np.mean(w), "std": np.std(w, ddof=1)} for name, w in groups.items()}
    return {**rows, "cohens_d": cohens_d(*groups.values())}


def draw(groups: dict[str, list[float]], result: dict, path: str) -> None:
    """Draws both distributions as violins with the single clips."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), constrained_layout=True)
    rng = np.random.default_rng(0)
    for place, ((name, weights), color) in enumerate(zip(groups.items(), ("#d9635f", "#5b84b1"), strict=True)):
        violin = axes.violinplot(weights, [place], orientation="horizontal", widths=0.7, showextrema=False)
        violin["bodies"][0].set(facecolor=color, alpha=0.6)
        axes.scatter(weights, place + rng.uniform(-0.06, 0.06, len(weights)), s=4, color=color)
        row = result[name]
        axes.text(0.02, place + 0.25, f"mean {row['mean']:.3f}, std {row['std']:.3f}, n {row['n']}", fontsize=8)
    axes.axvline(0.5, color="gray", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), yticks=[0, 1], xlabel="weight of the facial stream")
    axes.set_yticklabels(groups)
    axes.set_title(f"Cohen's d = {result['cohens_d']:.2f}", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures every held-out clip of the data set that the checkpoint was trained on."""
    if not _CHECKPOINT.value:
        raise UserError("needed: --checkpoint=WORKDIR")
    for option, path in (("--json", _JSON.value), ("--figure", _FIGURE.value)):
        if path:
            command_line.check_output(option, path)
    model = favchat_jax.load(_CHECKPOINT.value)
    data = model.config.data
    source = open_dataset(data.name, data.packed, "heldout")
    records = [source[i] for i in range(len(source))]
    groups = {
        name: facial_weights(model.sampler, [r for r in records if r.has_face == has_face], INSTRUCTIONS[0])
        for name, has_face in (("face clips", True), ("general clips", False))
    }
    if empty := [name for name, weights in groups.items() if len(weights) < 2]:
        raise UserError(f"{data.name} has fewer than two held-out {empty[0]}: use another data set's run")
    result = summarise(groups)
    if _FIGURE.value:
        draw(groups, result, _FIGURE.value)
    if _JSON.value:
        rows = {n: {**result[n], "weights": weights, "published": PUBLISHED[n]} for n, weights in groups.items()}
        about = {"table": "adapter_weights", "checkpoint": _CHECKPOINT.value, "question": INSTRUCTIONS[0]}
        replace_file(_JSON.value, json.dumps({**about, "groups": rows, "cohens_d": result["cohens_d"]}, indent=1))
    for name in groups:
        print("{:<14} n {n:>4}  mean {mean:.3f}  std {std:.3f}".format(name, **result[name]))
    print(f"Cohen's d {result['cohens_d']:.2f}")


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _FIGURE = flags.DEFINE_string("figure", None, "PNG file to write")
    _JSON = flags.DEFINE_string("json", None, "JSON file to write")
    command_line.start(main)
