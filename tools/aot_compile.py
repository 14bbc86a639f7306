"""Compiles training, answers or reinforcement for absent hardware; reports whether it fits and how fast it is at best.

python -m tools.aot_compile --config=configs/stage3.py:preset=paper --target=a800-80gb --json=plan.json
python -m tools.aot_compile --config=configs/stage3.py:preset=paper --target=rtx4090 --work=answer --storage=int8
python -m tools.aot_compile --config=configs/grpo.py:preset=paper --target=a800-80gb         an iteration of it
python -m tools.aot_compile --all --json=plans.json          all targets and kinds of work, at the paper's sizes
python -m tools.aot_compile --all --work=answer --json=plans.json                           one kind of work

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
from favchat_jax.config import Config, MeshConfig
from favchat_jax.errors import UserError
from favchat_jax.files import replace_file

# Set before jax is imported, so that jax does not look for the devices of the installed compilers.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from favchat_jax.api import mesh_sizes  # noqa: E402
from favchat_jax.planning import answer, plan  # noqa: E402
from favchat_jax.planning.policy import make_policy_plan  # noqa: E402
from favchat_jax.planning.targets import GIB, TARGETS, find  # noqa: E402

PAPER = "preset=paper"
ANSWERS = ((1, "full"), (8, "full"), (1, "int8"))  # clips at once and storage of the rows of --all
COLUMNS = (
    ("target", lambda p: p.target),
    ("work", lambda p: p.stage),
    ("storage", lambda p: p.storage),
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
    if _WORK.value == "answer" and _SAVE.value:
        raise UserError("--work=answer saves nothing: leave out --save")
    if _WORK.value != "answer" and (_MESH.value or _STORAGE.value != "full"):
        raise UserError("--mesh and --storage are of --work=answer: set --config.mesh.* and --config.llm.storage")
    if _ALL.value:
        if _CONFIG.value is not None or _SAVE.value or _MESH.value or _STORAGE.value != "full":
            raise UserError(
                "--all uses the paper's preset and saves no step: leave out --config, --save, --mesh and --storage"
            )
        wanted = [work for target in ([_TARGET.value] if _TARGET.value else TARGETS) for work in _all_work(target)]
    else:
        if _CONFIG.value is None or not _TARGET.value:
            raise UserError("--config and --target are needed, or --all")
        command_line.check_kind(_CONFIG, "stage", "configs/stage1.py, stage2.py, stage3.py, coldstart.py, grpo.py")
        wanted = [_named_work(Config.from_ml_collections(_CONFIG.value), _TARGET.value)]
    if _SAVE.value:
        replace_file(_SAVE.value, plan.save(wanted[0].config, wanted[0].target, _CLIPS.value))
    kept = _kept(Path(_JSON.value)) if _ALL.value and _JSON.value else {}
    plans, made = [], []
    for work in wanted:
        of = work.digest()
        plans.append(kept.get(of) or work.plan())
        made.append({**dataclasses.asdict(plans[-1]), "of": of})
        print(_verdict(plans[-1]), flush=True)
        if _JSON.value:
            rest = [{**dataclasses.asdict(p), "of": of} for of, p in kept.items() if of not in {m["of"] for m in made}]
            replace_file(_JSON.value, json.dumps(made + rest if _ALL.value else made[0], indent=1))
    if _ALL.value:
        print(table(plans))


@dataclasses.dataclass(frozen=True)
class Work:
    """One row of the table: a kind of work with the config of its stage, a target, and what the kind needs besides.

    Attributes:
        kind: train, answer or reinforce.
        config: of the stage.
        target: name of the target.
        clips: number of clips at once; None for the kind's own.
        storage: width of the language model's kernels, for answers.
        mesh: sizes of the mesh of answers, if given.
    """

    kind: str
    config: Config
    target: str
    clips: int | None = None
    storage: str = "full"
    mesh: MeshConfig | None = None

    def plan(self) -> plan.Plan:
        """Compiles it."""
        if self.kind == "answer":
            return answer.make_plan(self.config, self.target, self.clips or 1, self.storage, self.mesh)
        make = make_policy_plan if self.kind == "reinforce" else plan.make_plan
        return make(self.config, self.target, self.clips)

    def digest(self) -> str:
        """Returns a hash of everything that determines the plan, with the version of jax."""
        facts = [self.kind, self.config.to_json(), self.target, self.clips, self.storage, str(self.mesh)]
        return hashlib.sha256(json.dumps([*facts, jax.__version__]).encode()).hexdigest()[:16]


def _named_work(config: Config, target: str) -> Work:
    """Returns the work that the flags name."""
    if _WORK.value == "answer":
        mesh = mesh_sizes(command_line.read_mesh(_MESH.value))
        return Work("answer", config, target, _CLIPS.value, _STORAGE.value, mesh)
    return Work("reinforce" if config.stage == "grpo" else "train", config, target, _CLIPS.value)


def _all_work(target: str) -> list[Work]:
    """Returns the rows of a target in the table of --all."""
    narrow = {"llm.storage": find(target).storage}

    def config(stage: str) -> Config:
        return Config.from_ml_collections(importlib.import_module(f"configs.{stage}").get_config(PAPER))

    rows = [Work("train", config(f"stage{n}").updated(narrow), target, _CLIPS.value) for n in (1, 2, 3)]
    rows += [Work("answer", config("stage3"), target, clips, storage) for clips, storage in ANSWERS]
    rows.append(Work("reinforce", config("grpo").updated(narrow), target, _CLIPS.value))
    return [row for row in rows if _WORK.value in (None, row.kind)]


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
    _WORK = flags.DEFINE_enum(
        "work",
        None,
        ["train", "answer", "reinforce"],
        "answer: answers of the stage's model; with --all, one kind alone",
    )
    _STORAGE = flags.DEFINE_enum("storage", "full", command_line.STORAGES, f"Answers: {command_line.STORAGE}")
    _MESH = flags.DEFINE_string("mesh", None, f"Answers: {command_line.MESH}")
    _ALL = flags.DEFINE_bool("all", False, "Plan everything at the paper's sizes and print a table")
    _CLIPS = flags.DEFINE_integer("clips", None, "Clips per step on all devices", lower_bound=1)
    _JSON = flags.DEFINE_string("json", None, "File for the figures")
    _SAVE = flags.DEFINE_string("save", None, "File for the lowered step, which runs on a machine with the devices")
    command_line.start(main)
