"""The first step lists every video of the sources, its properties, and the reason if it is unusable."""

import dataclasses
import json
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from favchat_jax.corpus import footage, pipelines
from favchat_jax.corpus.manifest import DUPLICATE, MANIFEST, OK, UNREADABLE, write_table
from favchat_jax.corpus.sources import Found, find, parse_source
from favchat_jax.errors import UserError

UNKNOWN = dict.fromkeys(("duration", "fps", "frames", "width", "height", "codec", "size", "sha256"))


def define_flags() -> None:
    """Defines the options of this step."""
    flags.DEFINE_multi_string("source", [], "Folder of raw videos, or LAYOUT:FOLDER to name its layout; repeatable")
    pipelines.define_flags()


def run(out: Path) -> None:
    """Scans the sources that the flags name."""
    if not flags.FLAGS.source:
        raise UserError("needed: --source=FOLDER of raw videos")
    out.mkdir(parents=True, exist_ok=True)
    rows = scan(flags.FLAGS.source, out, pipelines.chosen_options())
    counts = Counter((row["source"], row["status"]) for row in rows)
    for (source, status), count in sorted(counts.items()):
        print(f"{source}: {count} {status}")
    print(f"{out / MANIFEST}: {len(rows)} videos")


def scan(sources: Sequence[str], out: Path, beam_options: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Writes the manifest of all videos of `sources` and returns its rows.

    Raises:
        UserError: a source is not a folder or cannot be listed, two videos have the same name, or the disk is full.
    """
    videos = {}
    for given in sources:
        root = parse_source(given)[1]
        if out.resolve().is_relative_to(root.resolve()):
            raise UserError(f"--out={out} is inside {root}, which is scanned: choose a folder beside it")
        for video in find(given):
            if video.id in videos:
                other = videos[video.id].path
                raise UserError(f"{_printable(video.path)} and {_printable(other)} have the same name: rename a folder")
            videos[video.id] = video
    items = ((video.id, fingerprint(video), video.to_json()) for video in videos.values())
    rows = mark_duplicates(pipelines.run("scan", inspect_video, items, out, beam_options))
    write_table(out, MANIFEST, rows)
    return rows


def inspect_video(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest's row of a `Found`, before duplicates are marked. Files are read, but not decoded."""
    video = Found.from_json(found)
    problem, known = video.problem, UNKNOWN
    if not problem:
        try:
            known = dataclasses.asdict(footage.facts(video.path))
        except (UserError, OSError) as error:
            problem = str(error)
    if not _is_text(video.path):
        problem = "its name is not UTF-8: rename it"
    elif known["fps"] and video.end is not None and (video.start or 0) >= known["duration"]:
        problem = f"its cut begins at {video.start:g} s, after the video's end: fetch the complete video"
    return {
        "id": video.id,
        "source": video.source,
        "group": f"{video.source}/{_printable(video.group)}",
        "attributes": json.dumps(video.attributes) if video.attributes else "",
        "path": _printable(video.path),
        "start": video.start,
        "end": video.end,
        "box": video.box,
        **known,
        "status": UNREADABLE if problem else OK,
        "reason": _printable(problem),
    }


def fingerprint(video: Found) -> list:
    """Returns everything that a video's row depends on, without reading the video; equal values give an equal row."""
    try:
        status = video.path.stat()
        files = footage.frame_files(video.path) if stat.S_ISDIR(status.st_mode) else [video.path]
        seen = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except (OSError, ValueError):  # ValueError: no file can have this name
        seen = []
    return [video.to_json(), seen]


def mark_duplicates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows sorted by id, all but the first of equal content and cut marked as duplicates."""
    first: dict[tuple, str] = {}
    rows = sorted(rows, key=lambda row: row["id"])
    for row in rows:
        if row["status"] == OK:
            original = first.setdefault((row["sha256"], row["start"], row["end"], row["box"]), row["id"])
            if original != row["id"]:
                row.update(status=DUPLICATE, reason=f"the same content as {original}")
    return rows


def _is_text(path: object) -> bool:
    return str(path) == _printable(path)


def _printable(name: object) -> str:
    """Returns a name as UTF-8 text, with escapes for invalid bytes and for lone surrogates from JSON."""
    try:
        return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return str(name).encode("utf-8", "backslashreplace").decode()
