"""Measures how answers depend on the number of frames per clip (v2's figure: 16 to 128 frames).

python -m tools.frame_length --checkpoint=runs/tiny-v1/stage3 --frames=2,4,8,16 --json=frames.json --figure=frames.png

The same weights answer the held-out questions from fewer or more frames than they were trained on. A clip with too few
frames repeats its last one; rendered clips have 16.
"""

import json
import logging
from typing import Any

import matplotlib
import numpy as np
from absl import flags

from configs.eval import rendered
from favchat_jax import command_line
from favchat_jax.checkpoints.run import Run, assemble, load_run
from favchat_jax.embedded import benchmark
from favchat_jax.errors import UserError
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.session import Session
from favchat_jax.files import replace_file
from favchat_jax.generation.sampler import Sampler
from favchat_jax.generation.weights import from_run

log = logging.getLogger("favchat_jax")

# v2's figure of inference frame lengths, FaVChat: VideoChatGPT scores (0-5), read from the picture to about 0.01.
PUBLISHED_FRAMES = (16, 32, 64, 96, 128)
PUBLISHED = {
    "Correctness": (4.84, 4.89, 4.82, 4.87, 4.85),
    "Detail": (4.79, 4.75, 4.80, 4.83, 4.77),
    "Context": (4.69, 4.66, 4.71, 4.67, 4.69),
    "Temporal": (4.78, 4.82, 4.80, 4.75, 4.74),
}


def sweep(run: Run, lengths: list[int], limit: int) -> list[dict[str, Any]]:
    """Returns the accuracy with its interval for each number of frames, over all answers and per kind of question."""
    data = run.config.data
    config = EvaluationConfig.from_ml_collections(rendered.get_config())
    config = config.updated({"limit": limit, "data.name": data.name, "data.packed": data.packed})
    rows, weights = [], from_run(run)
    for frames in lengths:
        log.info("%d frames", frames)
        parts = assemble(run.config.updated({"model.frames": frames}))
        result = benchmark.run(config, Session.of(Sampler(parts, weights), config))
        groups = {"all": result, **result["groups"]}
        figures = {name: {"n": part["n"], **part["figures"]["accuracy"]} for name, part in groups.items()}
        rows.append({"frames": frames, "figures": figures})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the accuracy by kind of question as a table, one column per number of frames."""
    lines = [f"{'frames':<14}{'n':>6}" + "".join(f"{row['frames']:>24}" for row in rows)]
    for kind, first in rows[0]["figures"].items():
        cells = [row["figures"][kind] for row in rows]
        lines.append(
            f"{kind:<14}{first['n']:>6}"
            + "".join(f"{c['value']:>8.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells)
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], trained_on: int, path: str) -> None:
    """Draws the accuracy over frames with intervals, beside the published scores."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ours, published) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    at = [row["frames"] for row in rows]
    ours.set_prop_cycle(color=pyplot.colormaps["tab20"].colors)  # the default has fewer colours than there are kinds
    for kind in rows[0]["figures"]:
        cells = [row["figures"][kind] for row in rows]
        values = np.array([cell["value"] for cell in cells])
        if kind == "all":
            spread = [[c["value"] - c["low"] for c in cells], [c["high"] - c["value"] for c in cells]]
            ours.errorbar(at, values, spread, color="black", linewidth=2, capsize=3, label=kind, zorder=3)
        else:
            ours.plot(at, values, "o-", linewidth=1, markersize=3, alpha=0.7, label=kind)
    ours.axvline(trained_on, color="gray", linestyle="--", linewidth=1)
    ours.set(xlabel=f"frames (trained on {trained_on})", ylabel="held-out accuracy", xticks=at, ylim=(0, 1.02))
    for name, values in PUBLISHED.items():
        published.plot(PUBLISHED_FRAMES, values, "o-", label=name)
    published.set(xlabel="frames", ylabel="VideoChatGPT score", xticks=PUBLISHED_FRAMES, ylim=(4, 5))
    published.set_title("published, read from the figure", fontsize=10)
    for axis in (ours, published):
        axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Sweeps over the numbers of frames that the flags name."""
    if not _CHECKPOINT.value:
        raise UserError("needed: --checkpoint=WORKDIR")
    if not _FRAMES.value or not all(count.isdigit() and int(count) for count in _FRAMES.value):
        raise UserError(f"--frames={','.join(_FRAMES.value)}: give whole numbers above 0, as in --frames=4,8,16")
    for option, path in (("--json", _JSON.value), ("--figure", _FIGURE.value)):
        if path:
            command_line.check_output(option, path)
    run = load_run(_CHECKPOINT.value)
    trained_on = run.config.model.frames
    rows = sweep(run, [int(count) for count in _FRAMES.value], _LIMIT.value)
    result = {
        "table": "frame_length",
        "checkpoint": _CHECKPOINT.value,
        "trained_on": trained_on,
        "rows": rows,
        "published": {"frames": PUBLISHED_FRAMES, **PUBLISHED},
    }
    if _JSON.value:
        replace_file(_JSON.value, json.dumps(result, indent=1))
    if _FIGURE.value:
        draw(rows, trained_on, _FIGURE.value)
    print(table(rows))


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _FRAMES = flags.DEFINE_list("frames", ["2", "4", "8", "16"], "Numbers of frames; the paper's are 16,32,64,96,128")
    _LIMIT = flags.DEFINE_integer("limit", 0, "Number of clips; 0 for all", lower_bound=0)
    _JSON = flags.DEFINE_string("json", None, "JSON file to write")
    _FIGURE = flags.DEFINE_string("figure", None, "PNG file to write")
    command_line.start(main)
