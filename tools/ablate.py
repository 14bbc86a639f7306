"""Trains Table 6 in miniature: the full model and each ablation, at equal steps on the embedded data, several seeds.

python -m tools.ablate --preset=tiny --json=runs/ablations-v1.json
python -m tools.ablate --preset=tiny --variant=v2 --json=runs/ablations-v2.json

Every arm has the same pretrained parts, data and steps. Seed 0's arms use the default workdirs, so the full model of
`make demo` is reused. Those of other seeds are in runs/seedN. After a stop, the same command resumes; finished arms are
not trained again.
"""

import ast
import json
import logging
from pathlib import Path
from typing import Any

from absl import flags

from configs.common import PRESETS
from configs.eval import rendered
from favchat_jax import command_line
from favchat_jax.checkpoints.workdir import check_config, stored_config
from favchat_jax.config import ABLATIONS, VARIANTS, Config
from favchat_jax.embedded.prepare import stage_config
from favchat_jax.errors import UserError
from favchat_jax.evaluate import evaluate
from favchat_jax.evaluation import ablations
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.result import versions, write_result
from favchat_jax.files import replace_file
from favchat_jax.train import train_stage
from favchat_jax.training.progress import is_finished
from tools.demo import STAGES

log = logging.getLogger("favchat_jax")


def arm_config(stage: str, variant: str, ablation: str, seed: int, changes: dict[str, Any]) -> Config:
    """Returns the config of one stage of an arm: the preset's, in its seed's folder, with the changes for all arms."""
    config = stage_config(stage, f"preset=tiny,variant={variant},ablation={ablation}")
    sources = {"init.from_run": config.init.from_run, "init.qformer": config.init.qformer}
    seeded = {field: str(_of_seed(Path(source), seed)) for field, source in sources.items() if source}
    try:
        return config.updated({"seed": seed, **seeded, **changes})
    except UserError as error:
        raise UserError(f"--set: {error}") from None


def arm_workdir(config: Config) -> Path:
    """Returns the workdir of a stage of an arm."""
    return _of_seed(config.default_workdir, config.seed)


def _of_seed(workdir: Path, seed: int) -> Path:
    return workdir if seed == 0 else workdir.parents[1] / f"seed{seed}" / Path(*workdir.parts[-2:])


def train_arm(variant: str, ablation: str, seed: int, changes: dict[str, Any]) -> Path:
    """Trains the unfinished stages of an arm; returns the last stage's workdir."""
    configs = [arm_config(stage, variant, ablation, seed, changes) for stage in STAGES]
    stand_in = arm_config("stage1", "v1", "none", seed, changes)
    if configs[0].init.qformer == str(arm_workdir(stand_in)):  # v2's Q-Formers start from it
        _train(stand_in)
    for config in configs:
        _train(config)
    return arm_workdir(configs[-1])


def _train(config: Config) -> None:
    workdir = arm_workdir(config)
    if is_finished(workdir):
        check_config(workdir, config)  # raises if it was trained with another config than the other arms
    elif not train_stage(config, workdir).finished:
        raise SystemExit(0)  # SIGTERM: the progress is saved


def evaluate_arm(workdir: Path) -> dict[str, Any]:
    """Returns the held-out result of a finished arm, from its workdir if it was evaluated with this config before."""
    data = stored_config(workdir).data
    config = EvaluationConfig.from_ml_collections(rendered.get_config())
    config = config.updated({"data.name": data.name, "data.packed": data.packed})
    path = workdir / "heldout.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["provenance"]["config"] == config.to_json():
            return kept
    result = evaluate(config, workdir)
    write_result(path, result)
    return result


def parse_changes(items: list[str]) -> dict[str, Any]:
    """Parses FIELD=VALUE: numbers, tuples and True in Python's notation, everything else as text."""
    changes = {}
    for item in items:
        field, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--set={item}: write --set=FIELD=VALUE, for example --set=steps=20")
        try:
            changes[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[field] = text
    return changes


def arms(preset: str, ablations: list[str], seeds: list[str]) -> list[tuple[str, int]]:
    """Returns (ablation, seed) of every arm in the order of training; raises UserError if one does not exist."""
    if preset != "tiny":
        raise UserError(
            f"preset={preset} needs data sets of its own: train each arm with python -m favchat_jax.train "
            f"--config=configs/ablations/NAME.py:preset={preset}, then evaluate it with configs/eval/dfew.py"
        )
    if not ablations or not set(ablations) <= set(ABLATIONS):
        raise UserError(f"--ablations={','.join(ablations)}: choose from {', '.join(ABLATIONS)}")
    if not seeds or not all(seed.isdigit() for seed in seeds):
        raise UserError(f"--seeds={','.join(seeds)}: give whole numbers, as in --seeds=0,1,2")
    return [(ablation, int(seed)) for ablation in ablations for seed in seeds]


def main() -> None:
    """Trains, evaluates and compares the arms that the flags name."""
    chosen = arms(_PRESET.value, _ABLATIONS.value, _SEEDS.value)
    if _JSON.value:
        command_line.check_output("--json", _JSON.value)
    variant, changes = _VARIANT.value, parse_changes(_SET.value)
    answers: dict[str, list[Any]] = {}
    for ablation, seed in chosen:
        log.info("%s, ablation %s, seed %d", variant, ablation, seed)
        workdir = train_arm(variant, ablation, seed, changes)
        answers.setdefault(ablation, []).append(evaluate_arm(workdir)["samples"])
    steps = {stage: arm_config(stage, variant, "none", 0, changes).steps for stage in STAGES}
    compared = {
        "table": "ablations",
        "variant": variant,
        "seeds": [int(seed) for seed in _SEEDS.value],
        "steps": steps,
        "changes": changes,
        "versions": versions(),
        **ablations.compare(variant, answers),
    }
    if _JSON.value:
        replace_file(_JSON.value, json.dumps(compared, indent=1))
    print(f"{variant} after {' + '.join(str(count) for count in steps.values())} steps, seeds {_SEEDS.value}")
    print(ablations.table(compared))


if __name__ == "__main__":
    _PRESET = flags.DEFINE_enum("preset", "tiny", PRESETS, "This command trains tiny only, the embedded preset")
    _VARIANT = flags.DEFINE_enum("variant", "v1", VARIANTS, "Variant of the model")
    _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds; the data and the pretrained parts keep theirs")
    _ABLATIONS = flags.DEFINE_list("ablations", list(ABLATIONS), "Arms; none is the full model")
    _SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE for all arms' and stages' configs, such as steps=20")
    _JSON = flags.DEFINE_string("json", None, "JSON file to write")
    command_line.start(main)
