"""Whether an export answers as its run does: python -m tools.compare_export --checkpoint=DIR --export=DIR [--clips=N]

Asks both, ours in JAX and the exported one in PyTorch, the questions of held-out rendered clips, greedily, from the
encoded clip on, and prints how many answers are the same to the letter.
"""

import json
import time
from pathlib import Path

from absl import flags

from configs.eval import rendered
from favchat_jax import command_line
from favchat_jax.checkpoints.run import load_run, run_config
from favchat_jax.checkpoints.tensors import read_json
from favchat_jax.convert.exported import favchat_config, is_exported
from favchat_jax.data.sources import open_dataset
from favchat_jax.embedded import benchmark
from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.session import Session
from favchat_jax.generation.sampler import Sampler


def compare(checkpoint: str | Path, export: str | Path, clips: int) -> list[dict[str, str]]:
    """Rows of clip, question, expected, answer (ours) and exported (PyTorch's)."""
    if not is_exported(Path(export)):
        raise UserError(f"--export={export} is not an exported folder: write one with tools.export_pytorch")
    _check_same_model(checkpoint, export)
    config = EvaluationConfig.from_ml_collections(rendered.get_config()).updated({"limit": clips})
    rows = benchmark.run(config, Session.of(Sampler.of(load_run(checkpoint)), config))["samples"]
    source = open_dataset(config.data.name, config.data.packed, config.data.split)
    encoded = {record.id: record.clip for record in (source[i] for i in range(len(source)))}
    from transformers import AutoModelForCausalLM  # here, not above: with it comes PyTorch

    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    started = time.perf_counter()
    for row in rows:
        row["exported"] = model.answer(encoded[row["clip"]], row["question"], max_new_tokens=config.max_new_tokens)
    print(f"PyTorch: {len(rows)} questions in {time.perf_counter() - started:.0f} s")
    return rows


def _check_same_model(checkpoint: str | Path, export: str | Path) -> None:
    """Raises UserError where an export is of another variant, ablation or size than a run."""
    told = json.loads(json.dumps(favchat_config(run_config(checkpoint), {}, "")))
    found = read_json(Path(export) / "config.json")
    del told["dtype"]  # which may have been asked for
    for name in told:
        if found.get(name) != told[name]:
            raise UserError(
                f"--export={export} is of {name}={found.get(name)}, --checkpoint={checkpoint} of {told[name]}: "
                "write that checkpoint's with tools.export_pytorch"
            )


def main() -> None:
    """Compares what the flags name."""
    if not _CHECKPOINT.value or not _EXPORT.value:
        raise UserError("needed: --checkpoint=WORKDIR --export=FOLDER")
    rows = compare(_CHECKPOINT.value, _EXPORT.value, _CLIPS.value)
    differing = [row for row in rows if row["answer"] != row["exported"]]
    right = {name: sum(row[name] == row["expected"] for row in rows) for name in ("answer", "exported")}
    print(f"right answers: JAX {right['answer']}, PyTorch {right['exported']} of {len(rows)}")
    print(f"the same answer: {len(rows) - len(differing)} of {len(rows)}")
    if differing:
        row = differing[0]
        raise RunError(f"{row['clip']}, {row['question']!r}: JAX {row['prediction']!r}, PyTorch {row['exported']!r}")


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _EXPORT = flags.DEFINE_string("export", None, "What tools.export_pytorch wrote of it")
    _CLIPS = flags.DEFINE_integer("clips", 50, "How many clips; 0 for all", lower_bound=0)
    command_line.start(main)
