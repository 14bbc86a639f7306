"""Runs a benchmark: python -m favchat_jax.evaluate --config=configs/eval/NAME.py --checkpoint=DIR --out=F.json

--model=openai:URL#NAME evaluates the model of an OpenAI-compatible server instead; --describer=DIR gives it a
checkpoint's description of each clip before the question. After an interruption, the same command resumes. With
--processes, several hosts share out the clips; the result is that of one.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from absl import flags
from ml_collections import config_flags

from favchat_jax import command_line
from favchat_jax.api import Model, mesh_sizes
from favchat_jax.checkpoints.run import Run, load_run
from favchat_jax.checkpoints.weights_folder import describe_leaves
from favchat_jax.config import FaceConfig, Storage
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.embedded.prepare import PRESET
from favchat_jax.errors import UserError
from favchat_jax.evaluation import result as results
from favchat_jax.evaluation.benchmarks import benchmark_of
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.judge import Judge
from favchat_jax.evaluation.questions import check_benchmark
from favchat_jax.evaluation.respondents import FaVChat, OpenAIServer, Respondent
from favchat_jax.evaluation.session import Journal, Session
from favchat_jax.processes import PLACE, first_alone, is_first, joined

FACE_FIELDS = ("face_crop", *(field.name for field in dataclasses.fields(FaceConfig)))


def evaluate(
    config: EvaluationConfig,
    checkpoint: str | Path | None = None,
    *,
    model: str | None = None,
    describer: str | Path | None = None,
    storage: Storage = "full",
    mesh: Mapping[str, int] | None = None,
    journal: Journal | None = None,
) -> results.Result:
    """Runs the benchmark that `config.benchmark` names; `evaluation/result.py` describes the result.

    Args:
        config: one of configs/eval.
        checkpoint: workdir of the model; None if `model` is given.
        model: openai:URL#NAME, a server's model.
        describer: a checkpoint whose descriptions precede the questions.
        storage: width of the kernels of checkpoints' language models in memory.
        mesh: number of devices along each axis, as of `favchat_jax.load`; by default the best for the batch.
        journal: keeps answers for a later start.
    """
    benchmark = benchmark_of(config.benchmark)
    respondent: Respondent
    if model:
        respondent = OpenAIServer(model, config.server)
    elif checkpoint:
        respondent = respondent_of(checkpoint, config, storage, mesh)
    else:
        raise ValueError("give a checkpoint or a model")
    describing = respondent_of(describer, config, storage, mesh) if describer else None
    session = Session(
        respondent,
        batch=config.batch,
        journal=journal,
        judge=judge_of(config) if is_first() else None,  # the other processes only answer
        describer=describing,
        description_tokens=config.description_tokens,
    )
    found = benchmark.run(config, session)
    found["notes"] += respondent.notes
    if session.without_face is not None:
        found["without_face"] = session.without_face
        if faceless := len(session.without_face):
            found["notes"].append(f"{faceless} clips show no face: the facial encoder read their whole frames")
    described = describing.identity if describing else None
    reasons = incomparable(found, {"model": respondent.identity, "describer": described})
    return results.with_provenance(found, config, respondent.identity, described, reasons)


def incomparable(result: results.Result, models: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """Returns why a benchmark's figures are not comparable with published ones, a reason each.

    Args:
        result: the benchmark's result.
        models: role of each model in the evaluation -> its identity.
    """
    reasons = ["the clips are a miniature of rendered faces"] if (result["data"] or {}).get("miniature") else []
    embedded = [role for role, facts in models.items() if facts and facts.get("preset") == PRESET]
    return reasons + [f"the {role} is an embedded one, trained on rendered faces" for role in embedded]


def respondent_of(
    checkpoint: str | Path,
    config: EvaluationConfig,
    storage: Storage = "full",
    mesh: Mapping[str, int] | None = None,
) -> FaVChat:
    """Loads a checkpoint that answers in batches of the config's size."""
    sizes = mesh_sizes(mesh)
    shares = sizes.data * sizes.fsdp if sizes else 1
    if config.batch % shares:
        raise UserError(f"batch={config.batch} does not divide over {shares} devices of --mesh: choose a multiple")
    run = load_run(checkpoint)
    if run.config.preset != PRESET:  # the embedded model's tokenizer spells these questions by letters
        check_benchmark(run.parts, config)
    identity = identity_of(checkpoint, run, storage)
    given = {name: getattr(config.data, name) for name in FACE_FIELDS}
    data = run.config.data.updated({name: value for name, value in given.items() if value is not None})
    crop = FaceCrop.of(data) if data.face_crop else None
    if crop:
        crop.load()  # raises before the weights are read
        identity["face_crop"] = vars(crop)
    sampler = Model(run, storage, sizes, config.batch).sampler
    return FaVChat(sampler, config.batch, config.questions, identity, crop)


def identity_of(checkpoint: str | Path, run: Run, storage: Storage = "full") -> dict[str, Any]:
    """Identifies a checkpoint in a result: its folder, kind, step and storage, and a hash of its weights.

    The hash includes the fingerprint of the language model's folder.
    """
    content = json.dumps([describe_leaves(run.weights), run.parts.fingerprint], sort_keys=True)
    kind = {name: getattr(run.config, name) for name in ("preset", "variant", "ablation", "stage")}
    return {
        "name": str(checkpoint),
        **kind,
        "step": run.step,
        "storage": storage,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }


def judge_of(config: EvaluationConfig) -> Judge | None:
    """Returns the judge that the config names, with its second judge; None without a judge."""
    if not config.judge.model:
        return None
    return Judge(config.judge, Judge(config.second_judge) if config.second_judge.model else None)


def table(result: results.Result) -> str:
    """Formats the figures for a terminal."""
    return getattr(benchmark_of(result["benchmark"]), "table", results.table)(result)


def main() -> None:
    """Evaluates the model that the flags name."""
    needed = "needed: --config=configs/eval/rendered.py --checkpoint=WORKDIR --out=FILE.json"
    if _CONFIG.value is None:
        raise UserError(needed)
    command_line.check_kind(_CONFIG, "benchmark", "configs/eval/*.py")
    config = EvaluationConfig.from_ml_collections(_CONFIG.value)
    if _PRINT_CONFIG.value:
        print(json.dumps(config.to_json(), indent=1))
        return
    if not _OUT.value or not (_CHECKPOINT.value or _MODEL.value):
        raise UserError(needed)
    if _CHECKPOINT.value and _MODEL.value:
        raise UserError("--checkpoint and --model both name the model: give one (--describer=DIR adds descriptions)")
    command_line.check_output("--out", _OUT.value)
    out = Path(_OUT.value)
    flags_given = [one.value for one in (_CHECKPOINT, _MODEL, _DESCRIBER, _STORAGE, _MESH)]
    kept = "all answers are kept: start all processes again to go on"
    with joined(_PROCESSES.value, [config.to_json(), *flags_given], kept):
        journal = Journal(out.with_name(f"{out.name}.answers.jsonl"))
        result = evaluate(
            config,
            _CHECKPOINT.value,
            model=_MODEL.value,
            describer=_DESCRIBER.value,
            storage=cast(Storage, _STORAGE.value),
            mesh=command_line.read_mesh(_MESH.value),
            journal=journal,
        )
        first_alone(lambda: results.write_result(out, result))
        journal.remove()  # the result holds everything
        if is_first():
            print(table(result))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the benchmark")
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _MODEL = flags.DEFINE_string("model", None, "openai:URL#NAME: evaluate a server's model instead of a checkpoint")
    _DESCRIBER = flags.DEFINE_string("describer", None, "Workdir of a stage whose descriptions precede the questions")
    _OUT = flags.DEFINE_string("out", None, "JSON file of the result")
    _STORAGE = flags.DEFINE_enum("storage", "full", command_line.STORAGES, command_line.STORAGE)
    _MESH = flags.DEFINE_string("mesh", None, command_line.MESH)
    _PROCESSES = flags.DEFINE_string("processes", "", PLACE)
    _PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the config with the options given, and end")
    command_line.start(main, less_memory=f"lower --config.batch, {command_line.LESS_FOR_ANSWERS}")
