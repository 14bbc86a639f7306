"""Identifies the run in a workdir: its config, and the language model that it was trained on.

WORKDIR/config.json   WORKDIR/llm.json (the language model's folder and fingerprint)
WORKDIR/checkpoints/STEP/ (`store.py`)   WORKDIR/frozen/ (weights that never change in a run, `weights_folder.py`)
WORKDIR/metrics.jsonl   tensorboard/   compiled/
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from favchat_jax.checkpoints.weights_folder import RESTORE
from favchat_jax.config import Config
from favchat_jax.errors import UserError, one_line
from favchat_jax.files import replace_file
from favchat_jax.processes import is_first

# Fields with which a run may resume at other values. They change how it is computed or reported, not what it learns;
# only the random numbers of dropout depend on `accumulate` and `mesh`.
FREE = (
    "mesh",
    "model.remat",
    "accumulate",
    "loss_chunk",
    "data.keep_features",
    "log_every",
    "checkpoint_every",
    "checkpoints_kept",
)


def load_config(folder: str | Path) -> dict[str, Any]:
    """Reads the config.json beside weights or checkpoints; raises UserError if it is missing or damaged."""
    path = Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {folder} is not a workdir or a weights folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{path} is damaged ({one_line(error)}): make or copy {folder} again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is damaged (not a JSON object): make or copy {folder} again")
    return fields


def stored_config(workdir: str | Path) -> Config:
    """Reads the config of a run; raises UserError if the folder is of another kind or its config.json is damaged."""
    workdir, fields = Path(workdir), load_config(workdir)
    kinds = {"favchat": "an export for PyTorch", "mistral": "a language model's folder"}
    what = kinds.get(str(fields.get("model_type")))
    if fields.keys() & {"kind", "of"}:
        what = f"a weights folder ({fields.get('kind') or fields.get('of')})"
    if what:
        raise UserError(f"{workdir} is {what}, not a run: name a stage's workdir, or what tools.export_orbax wrote")
    try:
        return Config.from_json(fields)
    except UserError as error:
        raise UserError(f"{workdir}/config.json is damaged ({error}): {RESTORE}") from None


def claim(workdir: Path, config: Config, fingerprint: str) -> None:
    """Makes the workdir of a new run, or checks that the run in it may resume.

    Until the first checkpoint is saved, the workdir is free for another config.

    Args:
        workdir: folder of the run.
        config: of the run.
        fingerprint: of the language model's folder.

    Raises:
        UserError: the workdir cannot be written, or has steps of a run of another config or language model.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").touch()
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written ({error.strerror}): choose another --workdir") from None
    if (workdir / "config.json").exists() and any((workdir / "checkpoints").glob("[0-9]*")):
        found = differing(stored_config(workdir).to_json(), config.to_json())
        fields = sorted(field for field in found if not field.startswith(FREE))
        if fields:
            raise UserError(
                f"{workdir} was made with another config; these fields differ: {', '.join(fields)}. "
                "Choose another --workdir or the same values"
            )
        check_llm(workdir, config.llm.path, fingerprint)
    elif is_first():
        replace_file(workdir / "llm.json", json.dumps({"path": config.llm.path, "fingerprint": fingerprint}))
        replace_file(workdir / "config.json", json.dumps(config.to_json(), indent=1))


def differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yields the fields in which two configs (as JSON) differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differing(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield f"{path} ({one} there, {other} here)"


def check_llm(workdir: Path, folder: str, fingerprint: str) -> None:
    """Raises UserError unless the language model's folder has the fingerprint that the run started with."""
    try:
        expected = json.loads((workdir / "llm.json").read_text())["fingerprint"]
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no checkpoint: train it first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{workdir}/llm.json is damaged: delete the workdir and train again") from None
    if fingerprint != expected:
        raise UserError(f"{folder} is not the language model that {workdir} was trained on: restore that folder")
