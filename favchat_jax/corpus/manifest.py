"""Reads and writes the tables of a corpus folder, which each step leaves for the next.

    manifest.parquet     scan: every video that was found, with the reason if it is unusable
    kept.parquet         clip: every kept clip; its video is kept/ID.mp4
    dropped.parquet      clip: every dropped video, with the reason
    annotations.jsonl    annotate: one object per clip
    reviews.jsonl        review: one object per verdict, in the order of time
    work/                results of scan and clip so far, from which a killed run resumes

Rows are sorted by id and independent of the run that wrote them, so equal videos give equal bytes.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from favchat_jax.errors import UserError, one_line
from favchat_jax.files import draft_file

MANIFEST, KEPT, DROPPED = "manifest.parquet", "kept.parquet", "dropped.parquet"
ANNOTATIONS, REVIEWS = "annotations.jsonl", "reviews.jsonl"
OK, UNREADABLE, DUPLICATE = STATUSES = ("ok", "unreadable", "duplicate")
SOURCES = ("celebvhq", "hmdb51", "youtube_faces", "faceforensics", "ferv39k", "folder")
FPS = (0.001, 1000.0)  # the lowest and the highest rate that a video can state
LONGEST = 1e9  # seconds; no time in a video is larger
GROUP = 1000  # rows written at a time

# `id` is safe as a file name. Splits are disjoint by `group`: the source video, or the person if the source names one.
# `attributes` is JSON: {"appearance": [labels], "action": [labels], "emotion": [labels, or timed segments
# {"emotion", "start_sec", "end_sec"}]} in CelebV-HQ's vocabulary. A group that the source does not label is absent;
# without any labels, the text is "".
_SHARED = [("id", pa.string()), ("source", pa.string()), ("group", pa.string()), ("attributes", pa.string())]
SCHEMAS = {
    # The clip is a part of the file: `start` to `end` in seconds, and `box`, JSON [top, bottom, left, right] in shares
    # of the picture, of which the largest square is cut. Null and "" stand for the entire video and picture.
    MANIFEST: pa.schema(
        [
            *_SHARED,
            ("path", pa.string()),  # a file, or a folder of frames
            ("start", pa.float64()),
            ("end", pa.float64()),
            ("box", pa.string()),
            ("duration", pa.float64()),  # seconds
            ("fps", pa.float64()),
            ("frames", pa.int64()),
            ("width", pa.int64()),
            ("height", pa.int64()),
            ("codec", pa.string()),
            ("size", pa.int64()),  # bytes
            ("sha256", pa.string()),
            ("status", pa.string()),  # one of STATUSES
            ("reason", pa.string()),
        ]
    ),
    KEPT: pa.schema(
        [
            *_SHARED,
            ("path", pa.string()),  # relative to the corpus folder
            ("frames", pa.int64()),
            ("fps", pa.float64()),
            ("face_share", pa.float64()),  # of the video's sampled frames; null if none were checked
            ("start_frame", pa.int64()),  # of the clip in the video
            ("sha256", pa.string()),  # of the clip
        ]
    ),
    DROPPED: pa.schema([("id", pa.string()), ("source", pa.string()), ("path", pa.string()), ("reason", pa.string())]),
}


def write_table(folder: str | os.PathLike, name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a table of SCHEMAS, sorted by id."""
    rows = sorted(rows, key=lambda row: row["id"])
    path = Path(folder) / name
    with draft_file(path) as draft, pq.ParquetWriter(draft, SCHEMAS[name]) as writer:
        for start in range(0, max(1, len(rows)), GROUP):
            writer.write_table(pa.Table.from_pylist(rows[start : start + GROUP], SCHEMAS[name]))


def read_table(folder: str | os.PathLike, name: str) -> list[dict[str, Any]]:
    """Returns the validated rows of a table.

    Raises:
        UserError: the table is missing, is not Parquet, or has invalid columns, ids or values.
    """
    path = Path(folder) / name
    if not path.is_file():
        step = "scan --source=DIR" if name == MANIFEST else "clip"
        raise UserError(f"{path} is missing: make it with python -m tools.build_dataset {step} --out={folder}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file ({one_line(error)}): make it again") from None
    missing = set(SCHEMAS[name].names) - set(table.column_names)
    if missing:
        raise UserError(f"{path} has no column {', '.join(sorted(missing))}: restore it, or make the table again")
    try:
        rows = table.select(SCHEMAS[name].names).cast(SCHEMAS[name]).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path} holds a column of another type ({one_line(error)}): make it again") from None
    _check_rows(path, name, rows)
    return rows


def _check_rows(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    seen = set()
    for row in rows:
        clip = row["id"]
        if not clip or not is_safe_id(clip):
            raise UserError(f"{path}: id {clip!r} is not a file name of letters, digits, '.', '_' and '-': change it")
        if clip in seen:
            raise UserError(f"{path}: id {clip} occurs twice: remove one of the two rows")
        seen.add(clip)
        required = ("source", "path") if name == DROPPED else ("source", "path", "group", "attributes")
        empty = [column for column in required if row[column] is None]
        if name == MANIFEST and row["status"] not in STATUSES:
            raise UserError(f"{path}: {clip} has status {row['status']!r}: choose one of {', '.join(STATUSES)}")
        if empty:
            raise UserError(f"{path}: {clip} has no {empty[0]}: fill it in, or make the table again")
        if row["source"] not in SOURCES:
            raise UserError(f"{path}: {clip} has source {row['source']!r}: choose one of {', '.join(SOURCES)}")
        if row.get("status", OK) == OK and name != DROPPED and (invalid := _invalid_column(row)):
            raise UserError(
                f"{path}: {clip} has {invalid} {row[invalid]!r}, which no video has: correct it or make the table again"
            )
        if "attributes" in row:
            read_attributes(row["attributes"], f"{path}: {clip}")


def _invalid_column(row: dict[str, Any]) -> str:
    """Returns the name of a column with an impossible value for a usable video or clip, or ""."""
    if not FPS[0] <= (row["fps"] or 0) <= FPS[1]:
        return "fps"
    if (row["frames"] or 0) < 1:
        return "frames"
    if not is_time(row.get("start"), row.get("end")):
        return "end" if is_time(row["start"], None) else "start"
    try:
        return "" if not row.get("box") or is_box(json.loads(row["box"])) else "box"
    except (ValueError, TypeError):
        return "box"


def is_time(start: float | None, end: float | None) -> bool:
    """Returns whether these are a stretch of a video in seconds; None stands for its beginning or end."""
    return 0 <= (start or 0) < (LONGEST if end is None else end) <= LONGEST


def is_box(sides: Sequence[float]) -> bool:
    """Returns whether these are top, bottom, left and right of a part of a picture, in shares of it."""
    top, bottom, left, right = sides
    return 0 <= top < bottom <= 1 and 0 <= left < right <= 1


def is_safe_id(name: str) -> bool:
    """Returns whether a name is a valid file name on every system."""
    return all(character.isascii() and (character.isalnum() or character in "._-") for character in name) and (
        not name.startswith(".") and len(name) <= 200
    )


def read_attributes(text: str, label: str) -> dict[str, list]:
    """Returns the labels of a row by group, {} if the source has none. `label` names the row in an error.

    Raises:
        UserError: the text is not JSON of this form.
    """
    try:
        attributes = json.loads(text) if text else {}
        held = {group: attributes.get(group, []) for group in ("appearance", "action", "emotion")}
        timed = [item["emotion"] if isinstance(item, dict) else item for item in held["emotion"]]
        names = [*held["appearance"], *held["action"], *timed]
        if all(isinstance(part, list) for part in held.values()) and all(isinstance(name, str) for name in names):
            return attributes
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise UserError(f"{label}: attributes are not JSON of appearance, action and emotion, each a list: correct them")


def read_lines(folder: str | os.PathLike, name: str) -> list[dict[str, Any]]:
    """Returns the objects of a JSON-lines file; an incomplete last line, left by a killed writer, is skipped.

    Raises:
        UserError: a line is not a JSON object with an id.
    """
    path = Path(folder) / name
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["id"] + ""
            except (ValueError, KeyError, TypeError):
                if not line.endswith(b"\n"):
                    break
                raise UserError(f"{path}, line {number}: not a JSON object with an id; correct or remove it") from None
            rows.append(row)
    return rows
