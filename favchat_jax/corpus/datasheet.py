"""Writes the datasheet of a packed corpus (questions of Gebru et al., Datasheets for Datasets, 2021).

The folder's own facts are filled in. Facts that only its makers know are left as lines for them to complete.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from favchat_jax.corpus.annotations import read_annotations
from favchat_jax.corpus.manifest import DROPPED, MANIFEST, REVIEWS, read_lines, read_table
from favchat_jax.corpus.statistics import table
from favchat_jax.files import replace_file

SETTINGS = "clip.json"  # the settings of the last `clip`
TO_FILL = "*To be filled in by whoever shares it:*"
SHEET = """# Datasheet of this corpus

## Motivation

Training text for a video language model that answers fine-grained questions about faces: summaries and question-answer
pairs for short clips. {to_fill} who made it, for what, and who paid.

## Composition

{table}

Instances are clips (H.264 or as published) with the labels of their source in CelebV-HQ's vocabulary, a summary and
question-answer pairs. They show people; labels such as male or young are impressions of annotators, not what the people
say of themselves. {heldout_share:.0%} of the source videos or persons, at least one, are held out for tests; none is on
both sides.

## Collection

{scanned}

{to_fill} licences and consent of every source, and how requests to remove a person are met.

## Preprocessing and filtering

Settings of the clip step: `{settings}`. `dropped.parquet` lists every dropped clip:

{dropped}

Face detectors miss dark skin and dim light more often than bright faces. Compare `kept.png` and `dropped.png`.

## Annotation

{annotated}

{left_out}

## Uses

Training and testing models of this kind. Not fit for identifying people, or for judging people by their face.

## Distribution and maintenance

{to_fill} where it is stored, under which terms, and who is responsible for it. Most sources forbid redistribution of
their videos.
"""


def write(out: Path, figures: dict[str, Any], left_out: dict[str, int], heldout_share: float) -> None:
    """Writes datasheet.md from the files of the folder."""
    scanned = Counter((row["source"], row["status"]) for row in read_table(out, MANIFEST))
    # Reasons that differ only in their numbers are counted together.
    dropped = Counter("".join("N" if c.isdigit() else c for c in row["reason"]) for row in read_table(out, DROPPED))
    backends = Counter((a.backend, a.model, a.prompts) for a in read_annotations(out).values())
    reviews = read_lines(out, REVIEWS) if (out / REVIEWS).exists() else []
    reviewers = {row["reviewer"] for row in reviews}
    settings = out / SETTINGS
    sheet = SHEET.format(
        to_fill=TO_FILL,
        table=table(figures),
        heldout_share=heldout_share,
        scanned=_listed(f"{source}: {n} videos {status}" for (source, status), n in sorted(scanned.items())),
        settings=settings.read_text().strip() if settings.is_file() else "not recorded",
        dropped=_listed(f"{n} x {reason}" for reason, n in dropped.most_common(20)) or "None.",
        annotated=_listed(
            f"{n} texts by {f'{b} {m}'.strip()}, prompts {p}" for (b, m, p), n in sorted(backends.items())
        )
        + f"\n\n{len(reviews)} verdicts of {len(reviewers)} reviewers.",
        left_out=_listed(f"{n} clips left out: {reason}" for reason, n in left_out.items())
        or "No kept clip is left out.",
    )
    replace_file(out / "datasheet.md", sheet)


def record_settings(out: Path, settings: dict[str, Any]) -> None:
    """Records the settings of `clip`, with the file name but not the path of the detector's model."""
    settings = {**settings, "model": Path(settings["model"]).name}
    replace_file(out / SETTINGS, json.dumps(settings))


def _listed(items: Any) -> str:
    return "\n".join(f"- {item}" for item in items)
