"""Which run a workdir is of: its config, and the language model that it was trained on.

WORKDIR/config.json   WORKDIR/llm.json (the language model's folder and fingerprint)
WORKDIR/checkpoints/STEP/ (`store.py`)   WORKDIR/frozen/ (`weights_folder.py`: weights that never change in a run)
WORKDIR/metrics.jsonl   tensorboard/   compiled/
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from favchat_jax.checkpoints import mistral_folder
from favchat_jax.checkpoints.weights_folder import RESTORE
from favchat_jax.config import Config
from favchat_jax.errors import UserError, one_line
from favchat_jax.files import replace_file

# Fields that change where and how a run is computed, not its result. A run may resume with other values; dropout then
# draws other numbers.
FREE = ("mesh", "model.remat", "accumulate", "loss_chunk", "data.keep_features")


def load_config(folder: str | Path) -> dict[str, Any]:
    """The config.json beside weights or checkpoints; raises UserError where it is missing or damaged."""
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
    """The config of a run; raises UserError where the folder is something else, or its config.json is damaged."""
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


def claim(workdir: Path, config: Config) -> None:
    """Makes a new workdir, or checks that the run in it may resume.

    Raises:
        UserError: the workdir cannot be written, or has steps of a run of another config or language model.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").touch()
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written ({error.strerror}): choose another --workdir") from None
    if not (workdir / "config.json").exists() or not any((workdir / "checkpoints").glob("[0-9]*")):
        return  # a start that failed before its first saved step leaves the config free
    found = differing(stored_config(workdir).to_json(), config.to_json())
    fields = sorted(field for field in found if not field.startswith(FREE))
    if fields:
        raise UserError(
            f"{workdir} was made with another config; these fields differ: {', '.join(fields)}. "
            "Choose another --workdir or the same values"
        )
    check_llm(workdir, config)


def differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """The fields in which two configs, as JSON holds them, differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differing(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield f"{path} ({one} there, {other} here)"


def bind(workdir: Path, config: Config) -> None:
    """Writes which language model and config a workdir is of."""
    llm = {"path": config.llm.path, "fingerprint": mistral_folder.fingerprint(config.llm.path)}
    replace_file(workdir / "llm.json", json.dumps(llm))
    # Last, so that a start that failed over a wrong path does not bind the workdir to that path.
    replace_file(workdir / "config.json", json.dumps(config.to_json(), indent=1))


def check_llm(workdir: Path, config: Config) -> None:
    """Raises UserError where the language model's folder is not the one that the run started with."""
    try:
        expected = json.loads((workdir / "llm.json").read_text())["fingerprint"]
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no checkpoint: train it first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{workdir}/llm.json is damaged: delete the workdir and train again") from None
    mistral_folder.read_config(config.llm.path)
    if mistral_folder.fingerprint(config.llm.path) != expected:
        raise UserError(
            f"{config.llm.path} is not the language model that {workdir} was trained on: restore that folder"
        )
