"""Identifies the run in a workdir: its config, and the language model that it was trained on.

WORKDIR/config.json   WORKDIR/llm.json (the language model's folder and fingerprint, and where the run was started)
WORKDIR/checkpoints/STEP/ (`store.py`)   WORKDIR/frozen/ (weights that never change in a run, `weights_folder.py`)
WORKDIR/metrics.jsonl   tensorboard/   compiled/
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from favchat_jax.checkpoints import mistral_folder
from favchat_jax.checkpoints.weights_folder import RESTORE, is_weights_folder
from favchat_jax.config import Config
from favchat_jax.errors import UserError, one_line
from favchat_jax.files import lock_file, replace_file
from favchat_jax.processes import is_first
from favchat_jax.stages import STAGES

INSIDE = ("llm.path", "prompt_tokenizer")  # what an exported folder holds, and every answer needs

# Fields with which a run may resume at other values. They change how it is computed or reported, not what it learns;
# only the random numbers of dropout depend on `accumulate` and `mesh`.
FREE = (
    "mesh",
    "model.remat",
    "accumulate",
    "loss_chunk",
    "data.missing_share",
    "data.keep_features",
    "log_every",
    "checkpoint_every",
    "checkpoints_kept",
    "rl.merged_rollouts",
)


def load_config(folder: str | Path) -> dict[str, Any]:
    """Reads the config.json beside weights or checkpoints; raises UserError if it is missing or damaged."""
    path = Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        around = [*sorted(Path(folder).glob("*/config.json")), *Path(folder).parent.glob("config.json")]
        hint = f"did you mean {around[-1].parent}?" if around else "name one that training or an export wrote"
        raise UserError(f"{path} is missing: {folder} is not a workdir or a weights folder; {hint}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{path} is damaged ({one_line(error)}): make or copy {folder} again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is damaged (not a JSON object): make or copy {folder} again")
    return fields


def stored_config(workdir: str | Path) -> Config:
    """Reads the config of a run; folders that it names are found from any working directory, see `_located`.

    Raises:
        UserError: the folder is of another kind, or its config.json is damaged.
    """
    return _located(Path(workdir), _read_config(Path(workdir)))


def _read_config(workdir: Path) -> Config:
    fields = load_config(workdir)
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


def _located(workdir: Path, config: Config) -> Config:
    """Returns a run's config with each file and folder at the first place where it exists; others stay unchanged.

    Of an exported folder, paths are relative to it. A language model's folder must have the run's fingerprint, if one
    of the places has it.
    """
    places = config.places()
    if is_weights_folder(workdir):
        return config.updated({field: str(workdir / places[field]) for field in INSIDE if field in places})
    llm = _read_llm(workdir)
    found = {}
    for field, path in places.items():
        candidates = [place for place in _candidates(path, workdir, llm, field in INSIDE) if os.path.exists(place)]
        if field == "llm.path":
            candidates.sort(key=lambda folder: _fingerprint(folder) != llm.get("fingerprint"))
        if candidates:
            found[field] = str(candidates[0])
    return config.updated(found)


def _candidates(path: str, workdir: Path, llm: dict[str, Any], shortened: bool) -> Iterator[Path]:
    """Yields where a path of a run may be: seen from where the run was started, from here, and from the workdir.

    The last finds what was moved together with the workdir: the path below any folder that holds the workdir, and with
    `shortened` also its last parts alone.
    """
    given, here = Path(path), Path.cwd()
    started_in = Path(llm.get("started_in", here))
    yield given if started_in == here else started_in / given
    yield given
    parts = given.parts[given.is_absolute() :]
    for skipped in range(len(parts) if shortened else 1):
        for folder in workdir.absolute().parents[:-1]:  # without the root of the file system
            yield folder.joinpath(*parts[skipped:])


def _read_llm(workdir: Path) -> dict[str, Any]:
    """Returns the content of llm.json; empty if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads((workdir / "llm.json").read_text()))
    return {}


def _fingerprint(folder: Path) -> str:
    """Returns a language model's fingerprint; empty if the folder holds none."""
    with contextlib.suppress(OSError, UserError):
        return mistral_folder.fingerprint(folder)
    return ""


@contextlib.contextmanager
def occupied(workdir: Path) -> Iterator[None]:
    """Makes a workdir, and keeps other processes from training in it meanwhile.

    If the run is refused before its first step, the folders that were made for it are removed.

    Raises:
        UserError: the workdir cannot be made, or another process is training in it.
    """
    if not is_first():  # of several processes of a run, the first speaks for all
        yield
        return
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        place = os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written ({error.strerror}): choose another --workdir") from None
    try:
        try:
            lock_file(place, wait=False)
        except BlockingIOError:
            message = f"another process is training in {workdir}: wait for it, or choose another --workdir"
            raise UserError(message) from None
        yield
    except UserError:
        metrics = workdir / "metrics.jsonl"
        if made and not (metrics.exists() and metrics.stat().st_size):
            shutil.rmtree(workdir, ignore_errors=True)
            for folder in made[1:]:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise
    finally:
        os.close(place)


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
    if has_steps(workdir):
        check_config(workdir, config)
        check_llm(workdir, config.llm.path, fingerprint)
    elif is_first():
        llm = {"path": config.llm.path, "fingerprint": fingerprint, "started_in": os.getcwd()}
        replace_file(workdir / "llm.json", json.dumps(llm))
        replace_file(workdir / "config.json", json.dumps(config.to_json(), indent=1))


def check_config(workdir: Path, config: Config) -> None:
    """Raises UserError if a workdir has steps of a run of another config, with the fields that differ."""
    if not has_steps(workdir):
        return
    before, now = stored_config(workdir).places(), config.places()
    same = {field: now[field] for field in before.keys() & now.keys() if _is_same(before[field], now[field])}
    found = differing(_read_config(workdir).updated(same).to_json(), config.to_json())
    fields = sorted(field for field in found if not field.startswith(FREE))
    if fields:
        raise UserError(
            f"{workdir} was made with another config; these fields differ: {', '.join(fields)}. "
            "Choose another --workdir or the same values"
        )


def check_stage_before(config: Config) -> None:
    """Raises UserError if `init.from_run` is not the stage before, of the same model."""
    source, expected = config.init.from_run, STAGES[config.stage].before
    before = stored_config(source)
    for field in ("preset", "variant", "ablation"):
        there, here = getattr(before, field), getattr(config, field)
        if there != here:
            raise UserError(f"init.from_run={source} is of {field}={there}, this run of {field}={here}")
    if before.stage != expected:
        raise UserError(f"init.from_run={source} is {before.stage}, but {config.stage} starts from {expected}")


def _is_same(one: str, other: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def has_steps(workdir: Path) -> bool:
    """Returns whether a workdir has a checkpoint, so that it belongs to a run."""
    return (workdir / "config.json").exists() and any((workdir / "checkpoints").glob("[0-9]*"))


def differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yields the fields in which two configs (as JSON) differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differing(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield f"{path} ({one} there, {other} here)"


def check_llm(workdir: Path, folder: str, fingerprint: str) -> None:
    """Raises UserError unless the language model's folder has the fingerprint that the run started with."""
    if not (workdir / "llm.json").exists():
        missing = (
            "lacks llm.json: copy the workdir again" if has_steps(workdir) else "holds no checkpoint: train it first"
        )
        raise UserError(f"{workdir} {missing}")
    expected = _read_llm(workdir).get("fingerprint")
    if expected is None:
        raise UserError(f"{workdir}/llm.json is damaged: delete the workdir and train again")
    if fingerprint != expected:
        raise UserError(f"{folder} is not the language model that {workdir} was trained on: restore that folder")
