"""Reading data sets where they lie: what is missing is named, with where to get it."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from favchat_jax.errors import UserError
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.result import data_hash


def root_of(config: EvaluationConfig, layout: str, source: str) -> Path:
    """The data set's folder.

    Raises:
        UserError: `data.root` is not set or no folder; `layout` says what lies in it, `source` where to get it.
    """
    if not config.data.root:
        raise UserError(f"--config.data.root=DIR is not set: name the folder that holds {layout} ({source})")
    root = Path(config.data.root)
    if not root.is_dir():
        raise UserError(f"--config.data.root={root} is not a folder: it should hold {layout} ({source})")
    return root


def first_of(root: Path, names: Sequence[str], what: str, source: str) -> Path:
    """The first of these files or folders that is there; raises UserError where none is."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(f"{root} lacks {what}: expected {' or '.join(names)} ({source})")


def find_clip(root: Path, patterns: Sequence[str], **names: Any) -> Path | None:
    """Where a clip lies: the first of the patterns, filled in, that is there."""
    paths = (root / pattern.format(**names) for pattern in patterns)
    return next((path for path in paths if path.exists()), None)


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, each with its line number as "line"; blank lines are passed over.

    Raises:
        UserError: not text, or one of the columns is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows, names = [{**row, "line": str(reader.line_num)} for row in reader], reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}): copy it again") from None
    lacking = [name for name in columns if name not in names]
    if lacking:
        raise UserError(f"{path} has no column {lacking[0]}: its first line should name {', '.join(columns)}")
    short = next((row["line"] for row in rows if any(row[name] is None for name in columns)), None)
    if short:
        raise UserError(f"{path}, line {short}: fewer than {len(columns)} fields; copy the file again")
    return rows


def described(name: str, root: Path, annotations: Sequence[Path], clips: Sequence[Path], listed: int) -> dict[str, Any]:
    """What a result says of its data."""
    return {"name": name, "root": str(root), "listed": listed, "sha256": data_hash(annotations, clips)}
