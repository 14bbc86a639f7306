"""Compiles a training step or an answer for absent hardware, and reports whether it fits and how fast it is at best.

python -m tools.aot_compile --config=configs/stage3.py:preset=paper --target=a800-80gb --json=plan.json
python -m tools.aot_compile --config=configs/stage3.py:preset=paper --target=rtx4090 --work=answer --storage=int8
python -m tools.aot_compile --config=configs/grpo.py:preset=paper --target=a800-80gb         an iteration of it
python -m tools.aot_compile --all --json=plans.json          all targets, stages 1 to 3 of the paper's preset

After a stop, --all resumes: it reuses the plans in its file that the same jax made from the same configs. The command
needs its own environment, .venv-aot, which `make plan` sets up.
"""

import dataclasses
import hashlib
import importlib
import json
import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from favchat_jax import command_line
from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.files import replace_file

# Set before jax is imported, so that jax does not look for the devices of the installed compilers.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from favchat_jax.api import mesh_sizes  # noqa: E402
from favchat_jax.planning import answer, plan  # noqa: E402
from favchat_jax.planning.policy import make_policy_plan  # noqa: E402
from favchat_jax.planning.targets import GIB, TARGETS, find  # noqa: E402

STAGES = ("stage1", "stage2", "stage3")
COLUMNS = (
    ("target", lambda p: p.target),
    ("stage", lambda p: p.stage),
    ("clips", lambda p: str(p.clips)),
    ("frozen", lambda p: _gib(p.frozen_bytes)),
    ("trained", lambda p: _gib(p.trained_bytes)),
    ("optimiser", lambda p: _gib(p.optimizer_bytes)),
    ("activations", lambda p: _gib(p.activation_bytes)),
    ("temporaries", lambda p: _gib(p.temporary_bytes)),
    ("peak", lambda p: _gib(p.peak_bytes_per_device)),
    ("fits", lambda p: "yes" if p.fits else "no"),
    ("head-room", lambda p: _gib(p.headroom_bytes)),
    ("TFLOP", lambda p: f"{p.flops_per_step / 1e12:.1f}"),
    ("least s", lambda p: f"{p.roofline_seconds:.3f}"),
    ("MFU at most", lambda p: f"{p.mfu_ceiling:.0%}"),
)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def table(plans: list[plan.Plan]) -> str:
    """Returns a Markdown table of plans, with memory in GiB per device."""
    rows = [[name for name, _ in COLUMNS], *([cell(p) for _, cell in COLUMNS] for p in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _verdict(made: plan.Plan) -> str:
    where = f"{made.stage} on {made.target}, {made.clips} clips at once"
    if made.fits:
        return f"{where}: fits, with {_gib(made.headroom_bytes)} GiB per device to spare"
    return f"{where}: does not fit, {_gib(-made.headroom_bytes)} GiB per device are missing; try {made.advice}"


def main() -> None:
    """Makes the plans that the flags name."""
    for option, path in (("--json", _JSON.value), ("--save", _SAVE.value)):
        if path:
            command_line.check_output(option, path)
    wanted = []
    if _WORK.value == "answer" and (_ALL.value or _SAVE.value):
        raise UserError("--work=answer plans for one --target and saves nothing: leave out --all and --save")
    if _WORK.value == "train" and (_MESH.value or _STORAGE.value != "full"):
        raise UserError("--mesh and --storage are of --work=answer: set --config.mesh.* and --config.llm.storage")
    if _ALL.value:
        if _CONFIG.value is not None or _SAVE.value:
            raise UserError("--all uses the paper's preset and saves no step: leave out --config and --save")
        chosen = [_TARGET.value] if _TARGET.value else list(TARGETS)
        for target in chosen:
            for stage in STAGES:
                config = Config.from_ml_collections(
                    importlib.import_module(f"configs.{stage}").get_config("preset=paper")
                )
                wanted.append((config.updated({"llm.storage": find(target).storage}), target))
    else:
        if _CONFIG.value is None or not _TARGET.value:
            raise UserError("--config and --target are needed, or --all")
        command_line.check_kind(_CONFIG, "stage", "configs/stage1.py, stage2.py, stage3.py, coldstart.py, grpo.py")
        wanted.append((Config.from_ml_collections(_CONFIG.value), _TARGET.value))
    if _SAVE.value:
        replace_file(_SAVE.value, plan.save(*wanted[0], _CLIPS.value))
    kept = _kept(Path(_JSON.value)) if _ALL.value and _JSON.value else {}
    plans, made = [], []
    for config, target in wanted:
        of = _digest(config, target, _CLIPS.value)
        plans.append(kept.get(of) or _made(config, target))
        made.append({**dataclasses.asdict(plans[-1]), "of": of})
        print(_verdict(plans[-1]), flush=True)
        if _JSON.value:
            rest = [{**dataclasses.asdict(p), "of": of} for of, p in kept.items() if of not in {m["of"] for m in made}]
            replace_file(_JSON.value, json.dumps(made + rest if _ALL.value else made[0], indent=1))
    if _ALL.value:
        print(table(plans))


def _made(config: Config, target: str) -> plan.Plan:
    """Makes the plan of the work that the flags name."""
    if _WORK.value == "answer":
        sizes = mesh_sizes(command_line.read_mesh(_MESH.value))
        return answer.make_plan(config, target, _CLIPS.value or 1, _STORAGE.value, sizes)
    make = make_policy_plan if config.stage == "grpo" else plan.make_plan
    return make(config, target, _CLIPS.value)


def _digest(config: Config, target: str, clips: int | None) -> str:
    """Returns a hash of everything that determines a plan: config, target, clips of a step and version of jax."""
    return hashlib.sha256(json.dumps([config.to_json(), target, clips, jax.__version__]).encode()).hexdigest()[:16]


def _kept(path: Path) -> dict[str, plan.Plan]:
    """Returns the plans by digest in a file that an earlier run of --all wrote."""
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())
        return {row.pop("of"): plan.Plan(**row) for row in rows}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"--json={path} contains no plans of --all: name another file, or delete it") from None


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config of a stage, for example configs/stage3.py")
    _TARGET = flags.DEFINE_string("target", None, f"One of {', '.join(TARGETS)}; with --all, plan only for this one")
    _WORK = flags.DEFINE_enum("work", "train", ["train", "answer"], "A step of training, or answers")
    _STORAGE = flags.DEFINE_enum("storage", "full", command_line.STORAGES, f"Answers: {command_line.STORAGE}")
    _MESH = flags.DEFINE_string("mesh", None, f"Answers: {command_line.MESH}")
    _ALL = flags.DEFINE_bool("all", False, "Plan stages 1 to 3 of the paper's preset and print a table")
    _CLIPS = flags.DEFINE_integer("clips", None, "Clips per step on all devices", lower_bound=1)
    _JSON = flags.DEFINE_string("json", None, "File for the figures")
    _SAVE = flags.DEFINE_string("save", None, "File for the lowered step, which runs on a machine with the devices")
    command_line.start(main)
