"""Runs the embedded demo (`make demo`): clips, pretrained parts, stages 1-3, held-out evaluation, one answer.

It writes runs/tiny-v1/report.json and prints a short table. A second run reuses finished work.
"""

import json
import resource
import time
from pathlib import Path

from absl import flags

import favchat_jax
from configs.eval import rendered
from favchat_jax import command_line
from favchat_jax.data.sources import open_dataset
from favchat_jax.embedded import benchmark
from favchat_jax.embedded.prepare import stage_config
from favchat_jax.evaluate import table
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.session import Session
from favchat_jax.files import replace_file
from favchat_jax.train import train_stage

STAGES = ("stage1", "stage2", "stage3")


def stage_report(folder: Path) -> dict[str, dict[str, float]]:
    """Returns each stage's steps and its first and last logged loss."""
    report = {}
    for stage in STAGES:
        lines = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
        report[stage] = {"steps": lines[-1]["step"], "loss_first": lines[0]["loss"], "loss_last": lines[-1]["loss"]}
    return report


def main() -> None:
    """Trains, evaluates, asks one question and writes the report."""
    started = time.perf_counter()
    config = stage_config("stage3", _ARGUMENT.value).updated({"seed": _SEED.value})
    workdir = config.default_workdir
    if not train_stage(config, workdir).finished:
        return  # stopped by SIGTERM and saved; the same command resumes
    model, asked = favchat_jax.load(workdir), EvaluationConfig.from_ml_collections(rendered.get_config())
    heldout = benchmark.run(asked, Session.of(model.sampler, asked))

    record = open_dataset(config.data.name, config.data.packed, "heldout")[0]
    video = workdir.parent / "example.mp4"
    video.write_bytes(record.clip)
    question = "What is the person doing?" if record.has_face else "What shape is moving?"
    answer = model.answer(video, question)

    report = {
        "wall_seconds": time.perf_counter() - started,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "stages": stage_report(workdir.parent),
        "heldout": {name: heldout[name] for name in ("n", "accuracy", "majority_baseline", "by_kind")},
        "chat": {"video": str(video), "question": question, "answer": answer},
    }
    path = workdir.parent / "report.json"
    replace_file(path, json.dumps(report, indent=1))
    print(table(heldout))
    for stage, row in report["stages"].items():
        print(f"{stage}: {row['steps']} steps, loss {row['loss_first']:.3f} -> {row['loss_last']:.3f}")
    print(f"{video}: {question} -> {answer}")
    print(f"{report['wall_seconds']:.0f} s, peak memory {report['peak_memory_gib']:.1f} GiB; {path} has all figures")


if __name__ == "__main__":
    _ARGUMENT = flags.DEFINE_string("config_argument", "", "Config argument, such as ablation=no_face")
    _SEED = flags.DEFINE_integer("seed", 0, "Seed of all draws except the clips; run each seed in its own folder")
    command_line.start(main)
