"""The last step packs clips and their texts into the training data set, with statistics and a datasheet."""

import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from favchat_jax.corpus import datasheet, pipelines, statistics
from favchat_jax.corpus.annotations import read_annotations
from favchat_jax.corpus.manifest import ANNOTATIONS, KEPT, read_attributes, read_table
from favchat_jax.corpus.pipelines import quiet_beam
from favchat_jax.corpus.reviews import Reviews, final_text
from favchat_jax.data import reasoning
from favchat_jax.data.sources import celebvhq, prepare, stored_digest
from favchat_jax.data.sources.celebvhq import HELDOUT_SHARE, label_text
from favchat_jax.data.sources.corpus import RECORDS, Corpus, label_vector
from favchat_jax.data.vocabulary import INDEX
from favchat_jax.errors import UserError
from favchat_jax.files import replace_file, replace_folder

log = logging.getLogger("favchat_jax")

PACKED = "packed"


def define_flags() -> None:
    """Defines the options of this step."""
    flags.DEFINE_float("heldout_share", HELDOUT_SHARE, "Share of the source videos that no stage trains on", 0, 0.9)
    flags.DEFINE_string("tokenizer", "", "Folder of a tokenizer, to count tokens instead of words")
    pipelines.define_flags()


def run(out: Path) -> None:
    """Packs according to the flags and prints the table of statistics."""
    print(pack(out, flags.FLAGS.heldout_share, flags.FLAGS.tokenizer, pipelines.chosen_options()))


def pack(out: Path, heldout_share: float = HELDOUT_SHARE, tokenizer: str = "", beam_options: Sequence[str] = ()) -> str:
    """Writes records.jsonl, packed/, statistics.{json,md,png} and datasheet.md; returns the table of statistics.

    Raises:
        UserError: an earlier step is missing, nothing is left to train on, or the disk is full.
    """
    kept = read_table(out, KEPT)
    records, left_out = choose_records(out, kept, heldout_share)
    if not records:
        raise UserError(f"{out / ANNOTATIONS} has no text for any kept clip: run annotate, or review rejected texts")
    for reason, count in left_out.items():
        log.info("%d clips are left out: %s", count, reason)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_file(out / RECORDS, lines)
    _pack_records(out, beam_options)
    figures = statistics.measure(records, {row["id"]: row for row in kept}, tokenizer)
    statistics.write(out, figures, records)
    datasheet.write(out, figures, left_out, heldout_share)
    return statistics.table(figures)


def choose_records(
    out: Path, kept: list[dict[str, Any]], heldout_share: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Returns the lines of records.jsonl, sorted by id, and the number of clips left out for each reason.

    Raises:
        UserError: the annotations are missing or damaged.
    """
    annotations, reviews = read_annotations(out), Reviews(out)
    texts, left_out = {}, {"without annotation": 0, "rejected, or waiting for another text": 0}
    for row in kept:
        annotation = annotations.get(row["id"])
        text = final_text(annotation, reviews.of(annotation)) if annotation else None
        if text is None:
            left_out["rejected, or waiting for another text" if annotation else "without annotation"] += 1
        else:
            texts[row["id"]] = text
    held = heldout_groups({row["group"] for row in kept if row["id"] in texts}, heldout_share)
    records = [_record(row, *texts[row["id"]], row["group"] in held) for row in kept if row["id"] in texts]
    return records, {reason: count for reason, count in left_out.items() if count}


def heldout_groups(groups: set[str], share: float) -> set[str]:
    """Returns the groups that no stage trains on.

    A hash of each name decides, so that groups stay held out as a corpus grows. Of two or more groups, at least one is
    held out unless `share` is 0.
    """
    if share == 0 or len(groups) < 2:
        return set()
    placed = sorted(groups, key=celebvhq.place)
    return {group for group in placed[:-1] if celebvhq.place(group) < share} | {placed[0]}


def _record(row: dict[str, Any], summary: str, questions: Sequence, held_out: bool) -> dict[str, Any]:
    labels = label_names(read_attributes(row["attributes"], row["id"]))
    targets = label_text(label_vector(labels))
    has_targets = row["source"] == "celebvhq" and all(targets.values())
    part = "train_rl" if has_targets else "train_celebvhq" if row["source"] == "celebvhq" else "train_other"
    rng = np.random.default_rng(zlib.crc32(row["id"].encode()))
    return {
        "id": row["id"],
        "video": row["path"],
        "sha256": row["sha256"],
        "part": "heldout" if held_out else part,
        "source": row["source"],
        "group": row["group"],
        "labels": labels,
        "summary": summary,
        "questions": [vars(question) for question in questions],
        "reasoning": reasoning.from_summary(summary, targets, rng) if has_targets else "",
    }


def label_names(attributes: dict[str, list]) -> list[str]:
    """Returns the known labels of a clip in the vocabulary's order, emotions without their times."""
    emotions = [item["emotion"] if isinstance(item, dict) else item for item in attributes.get("emotion", [])]
    named = {*attributes.get("appearance", []), *attributes.get("action", []), *emotions}
    return sorted(named & INDEX.keys(), key=INDEX.__getitem__)


def _pack_records(out: Path, beam_options: Sequence[str]) -> None:
    """Builds `packed/` unless it holds these records already; an older one stays until the new one is complete."""
    final = out / PACKED
    if stored_digest(Corpus.name, str(final)) == hashlib.sha256((out / RECORDS).read_bytes()).hexdigest():
        return
    with replace_folder(final) as draft, quiet_beam():
        prepare(Corpus.name, str(out), str(draft), beam_options=tuple(beam_options))
