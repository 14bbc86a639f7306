"""Finds the files of a published data set; errors name the missing file and where to get it."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from favchat_jax.errors import UserError
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.result import data_hash

MINIATURE = "MINIATURE.txt"  # marks a folder of rendered clips in the layout of a data set, see `tools/miniatures.py`


def root_of(config: EvaluationConfig, layout: str, source: str) -> Path:
    """Returns the data set's folder.

    Raises:
        UserError: `data.root` is not set or not a folder; `layout` names its content, `source` where to get it.
    """
    if not config.data.root:
        raise UserError(f"--config.data.root=DIR is not set: give the folder that holds {layout} ({source})")
    root = Path(config.data.root)
    if not root.is_dir():
        raise UserError(f"--config.data.root={root} is not a folder: it should hold {layout} ({source})")
    return root


def first_of(root: Path, names: Sequence[str], what: str, source: str) -> Path:
    """Returns the first of these files or folders that exists; raises UserError if none does."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(f"{root} lacks {what}: expected {' or '.join(names)} ({source})")


def find_clip(root: Path, patterns: Sequence[str], **names: Any) -> Path | None:
    """Finds a clip: fills the patterns in and returns the first path that exists, or None."""
    paths = (root / pattern.format(**names) for pattern in patterns)
    return next((path for path in paths if path.exists()), None)


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Reads the rows of a CSV file with a header, each with its line number as "line"; blank lines are skipped.

    Raises:
        UserError: the file is not UTF-8 text, a column is missing, or a row is too short.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows, names = [{**row, "line": str(reader.line_num)} for row in reader], reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}): copy it again") from None
    lacking = [name for name in columns if name not in names]
    if lacking:
        raise UserError(f"{path} has no column {lacking[0]}: its first line must name {', '.join(columns)}")
    short = next((row["line"] for row in rows if any(row[name] is None for name in columns)), None)
    if short:
        raise UserError(f"{path}, line {short}: fewer than {len(columns)} fields: copy the file again")
    return rows


def described(name: str, root: Path, annotations: Sequence[Path], clips: Sequence[Path], listed: int) -> dict[str, Any]:
    """Returns the entry of a result that describes its data."""
    known = {"name": name, "root": str(root), "listed": listed, "miniature": (root / MINIATURE).exists()}
    return {**known, "sha256": data_hash(annotations, clips)}
