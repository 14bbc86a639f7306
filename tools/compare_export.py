"""Compares an export's answers with its run's: python -m tools.compare_export --checkpoint=DIR --export=DIR [--limit=N]

Our model in JAX and the exported one in PyTorch answer the questions of held-out rendered clips by greedy decoding,
starting from the encoded clip. The command prints how many answers are identical.
"""

import importlib.util
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags
from tqdm import tqdm

import favchat_jax
from configs.eval import rendered
from favchat_jax import command_line
from favchat_jax.checkpoints.run import open_run
from favchat_jax.checkpoints.tensors import read_json
from favchat_jax.convert.exported import favchat_config, is_exported
from favchat_jax.data.sources import open_dataset
from favchat_jax.embedded import benchmark
from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.session import Session

WORKERS = 4  # questions that the exported model answers side by side, at most; each needs memory for its activations
DIFFERING = {"dtype", "auto_map"}  # fields that --dtype or another version of tools.export_pytorch may have changed


def compare(checkpoint: str | Path, export: str | Path, limit: int) -> list[dict[str, str]]:
    """Returns rows of clip, question, expected, answer (ours) and exported (PyTorch's)."""
    if not is_exported(Path(export)):
        raise UserError(f"--export={export} is not an exported folder: write one with tools.export_pytorch")
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed: pip install -e '.[convert]'")
    _check_same_model(checkpoint, export)
    config = EvaluationConfig.from_ml_collections(rendered.get_config()).updated({"limit": limit})
    rows = benchmark.run(config, Session.of(favchat_jax.load(checkpoint).sampler, config))["samples"]
    source = open_dataset(config.data.name, config.data.packed, config.data.split)
    encoded = {record.id: record.clip for record in (source[i] for i in range(len(source)))}
    asked = [(encoded[row["clip"]], row["question"]) for row in rows]
    answers = _answers(export, asked, config.max_new_tokens)
    return [{**row, "exported": answer} for row, answer in zip(rows, answers, strict=True)]


def _answers(export: str | Path, asked: Sequence[tuple[bytes, str]], max_new_tokens: int) -> list[str]:
    """Returns the exported model's answers to questions about encoded clips, answered side by side.

    Several cores answer several questions: a small model's operators are too short to share them among cores, and
    PyTorch's threads then wait for each other most of the time.
    """
    import torch  # imported here, since the rest runs without PyTorch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    cores = torch.get_num_threads()
    workers = min(cores, WORKERS)
    torch.set_num_threads(max(1, cores // workers))

    def answer(pair: tuple[bytes, str]) -> str:
        return model.answer(*pair, max_new_tokens=max_new_tokens)

    try:
        first = answer(asked[0])  # before the others, since it loads the tokenizers
        with ThreadPoolExecutor(workers) as pool:
            rest = pool.map(answer, asked[1:])
            return [first, *tqdm(rest, total=len(asked) - 1, desc="PyTorch", unit="question", mininterval=1)]
    finally:
        torch.set_num_threads(cores)


def _check_same_model(checkpoint: str | Path, export: str | Path) -> None:
    """Raises UserError if an export has another variant, ablation or size than a run."""
    expected = json.loads(json.dumps(favchat_config(open_run(checkpoint).config, {}, "")))
    found = read_json(Path(export) / "config.json")
    for name in expected:
        if name not in DIFFERING and found.get(name) != expected[name]:
            raise UserError(
                f"--export={export} has {name}={found.get(name)}, --checkpoint={checkpoint} has {expected[name]}: "
                "export that checkpoint with tools.export_pytorch"
            )


def main() -> None:
    """Compares the run and the export that the flags name."""
    if not _CHECKPOINT.value or not _EXPORT.value:
        raise UserError("needed: --checkpoint=WORKDIR --export=FOLDER")
    rows = compare(_CHECKPOINT.value, _EXPORT.value, _LIMIT.value)
    differing = [row for row in rows if row["answer"] != row["exported"]]
    right = {name: sum(row[name] == row["expected"] for row in rows) for name in ("answer", "exported")}
    print(f"right answers: JAX {right['answer']}, PyTorch {right['exported']} of {len(rows)}")
    print(f"the same answer: {len(rows) - len(differing)} of {len(rows)}")
    if differing:
        row = differing[0]
        raise RunError(f"{row['clip']}, {row['question']!r}: JAX {row['answer']!r}, PyTorch {row['exported']!r}")


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _EXPORT = flags.DEFINE_string("export", None, "Folder that tools.export_pytorch wrote from it")
    _LIMIT = flags.DEFINE_integer("limit", 50, "Number of clips; 0 for all", lower_bound=0)
    command_line.start(main)
