"""Packing clips and their texts: the data set of every stage, its statistics, and a trained stage 3."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from favchat_jax.corpus import statistics
from favchat_jax.corpus.annotations import text_digest
from favchat_jax.corpus.clip import clip
from favchat_jax.corpus.clips import Settings
from favchat_jax.corpus.manifest import KEPT, read_table
from favchat_jax.corpus.pack import heldout_groups, label_names, pack
from favchat_jax.corpus.scan import scan
from favchat_jax.data import vocabulary
from favchat_jax.data.record import Question
from favchat_jax.data.sources import open_dataset, prepare
from favchat_jax.errors import UserError
from favchat_jax.rl.rewards import FORM
from tests.conftest import train_alone
from tests.corpus.corpus_files import annotate, celebvhq_entry, celebvhq_info, face_video, write


@pytest.fixture(scope="module")
def clipped(tmp_path_factory):
    """A corpus folder with six CelebV-HQ clips of three source videos, one without an action, and three other clips."""
    folder = tmp_path_factory.mktemp("clipped")
    still = {**celebvhq_entry()["attributes"], "action": [0] * 35}
    entries = {f"v{i // 2}_{i}": celebvhq_entry(ytb_id=f"v{i // 2}") for i in range(6)}
    entries["v2_5"]["attributes"] = still
    write(folder / "celebvhq" / "celebvhq_info.json", celebvhq_info(**entries))
    for index, name in enumerate(entries):
        write(folder / "celebvhq" / f"{name}.mp4", face_video(index, frames=12))
    for index in range(3):
        write(folder / "others" / f"o{index}.mp4", face_video(12 + index))
    out = folder / "out"
    scan([str(folder / "celebvhq"), str(folder / "others")], out)
    kept, dropped = clip(out, Settings())
    assert len(kept) == 9 and not dropped
    annotate(out, [row["id"] for row in kept])
    return out


def copied(clipped, out):
    """A copy of a corpus folder, not packed yet."""
    return Path(shutil.copytree(clipped, out, ignore=shutil.ignore_patterns("packed", ".packed.part")))


def records(out, split):
    source = open_dataset("corpus", str(out / "packed"), split)
    return {source[i].id: source[i] for i in range(len(source))}


@pytest.fixture(scope="module")
def packed(clipped):
    """The same folder, packed."""
    pack(clipped)
    return clipped


def test_each_stage_reads_its_clips_and_none_reads_held_out_ones(packed):
    parts = {
        name: records(packed, name) for name in ("train", "stage1", "stage2", "stage3", "rl", "coldstart", "heldout")
    }
    everything = {row["id"]: row for row in read_table(packed, KEPT)}
    assert set(parts["train"]) | set(parts["heldout"]) == set(everything)
    assert not set(parts["train"]) & set(parts["heldout"])
    sides = {
        group: {row["id"] in parts["heldout"] for row in everything.values() if row["group"] == group}
        for group in {row["group"] for row in everything.values()}
    }
    assert all(len(side) == 1 for side in sides.values()) and parts["heldout"]
    assert set(parts["stage1"]) == set(parts["stage2"]) == set(parts["train"])
    assert set(parts["stage3"]) == {name for name in parts["train"] if everything[name]["source"] == "celebvhq"}
    assert set(parts["rl"]) == set(parts["coldstart"]) == {name for name in parts["stage3"] if name != "v2_5"}
    for record in parts["rl"].values():
        assert record.targets == {"attributes": "brown hair", "action": "talk", "emotion": "happy"}
        assert record.summary in record.reasoning and FORM.fullmatch(record.reasoning)


def test_a_packed_record_is_the_clip_with_its_text(packed):
    for name, record in records(packed, "train").items():
        row = next(row for row in read_table(packed, KEPT) if row["id"] == name)
        assert record.clip == (packed / row["path"]).read_bytes()
        assert record.source == row["group"] and record.has_face
        assert record.summary == f"A happy person with brown hair talks, {name}."
        assert record.questions == (Question("What is the hair like?", f"It is brown, {name}.", "hair"),)
        held = {vocabulary.VOCABULARY[i] for i in np.flatnonzero(record.attributes)}
        expected = {"brown_hair", "happy"} if name == "v2_5" else {"brown_hair", "talk", "happy"}
        assert held == (expected if row["source"] == "celebvhq" else set())


def test_packing_again_changes_nothing_until_the_text_does(packed):
    folder = packed / "packed"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    pack(packed)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_rejected_texts_are_left_out_and_edits_win(clipped, tmp_path):
    out = copied(clipped, tmp_path / "out")
    annotations = {row["id"]: row for row in map(json.loads, (out / "annotations.jsonl").read_text().splitlines())}

    def review(name, verdict, **changes):
        text = annotations[name]
        digest = text_digest(text["summary"], [Question(**question) for question in text["questions"]])
        judged = {"summary": text["summary"], "questions": text["questions"], "text": digest}
        return {"id": name, "reviewer": "r", "verdict": verdict, "time": "2026-01-01T00:00:00", **judged, **changes}

    reviews = [review("v0_0", "reject"), review("v1_2", "edit", summary="Edited."), review("v1_3", "accept")]
    write(out / "reviews.jsonl", "".join(json.dumps(row) + "\n" for row in reviews))
    pack(out)
    found = {**records(out, "train"), **records(out, "heldout")}
    assert "v0_0" not in found and len(found) == 8
    assert found["v1_2"].summary == "Edited." and found["v1_3"].summary == annotations["v1_3"]["summary"]
    assert "1 clips left out: rejected" in (out / "datasheet.md").read_text()


def test_a_group_stays_on_its_side_as_the_corpus_grows():
    groups = {f"g{number}" for number in range(1000)}
    held = heldout_groups(groups, 0.05)
    assert 20 < len(held) < 90
    fewer = {group for group in groups if group.endswith(("0", "1", "2"))}
    grown = heldout_groups(fewer, 0.05)
    assert grown == held & fewer
    assert len(heldout_groups({"a", "b"}, 0.05)) == 1 and not heldout_groups({"a"}, 0.05)
    assert not heldout_groups(groups, 0)


def test_labels_are_listed_in_the_order_of_the_vocabulary():
    timed = [{"emotion": "fear", "start_sec": 0, "end_sec": 1}, {"emotion": "happy", "start_sec": 1, "end_sec": 2}]
    assert label_names({"action": ["talk", "waltz"], "emotion": timed}) == ["talk", "happy", "fear"]
    assert label_names({}) == []


def test_statistics_equal_a_count_by_hand():
    def record(name, source, part, summary, labels, answers):
        questions = [{"question": "?", "answer": answer, "kind": "k"} for answer in answers]
        row = {"id": name, "source": source, "part": part, "group": name, "summary": summary, "labels": labels}
        return {**row, "questions": questions}

    rows = [
        record(
            "a", "celebvhq", "train_rl", "She nods, a hat on.", ["nod", "wearing_hat", "blonde_hair"], ["Yes.", "No"]
        ),
        record("b", "folder", "heldout", "He sits.", [], ["A b c"]),
    ]
    kept = {"a": {"frames": 50, "fps": 25.0}, "b": {"frames": 3600 * 36, "fps": 36.0}}
    figures = statistics.measure(rows, kept)["rows"]
    assert figures["celebvhq"] == {
        "clips": 1, "heldout": 0, "groups": 1, "hours": 0.0006, "frames": 50.0, "summaries": 1, "pairs": 2,
        "labels": 3.0, "told": 2.0, "summary_tokens": 7.0, "answer_tokens": 1.5,
    }  # fmt: skip
    assert figures["all"]["clips"] == 2 and figures["all"]["heldout"] == 1 and figures["all"]["pairs"] == 3
    assert figures["all"]["hours"] == 1.0006 and figures["all"]["summary_tokens"] == 5.0


def test_a_summary_names_a_label_by_its_words_in_any_form():
    named = statistics.labels_named
    assert named("Her eyes close, then she smiles.", ["close_eyes", "smile"]) == 2
    assert named("He wears eyeglasses.", ["eyeglasses", "sunglasses"]) == 1
    assert named("Blonde curls.", ["blonde_hair"]) == 0


def test_a_missing_file_or_option_is_named(tmp_path):
    with pytest.raises(UserError, match="kept.parquet is missing"):
        pack(tmp_path)
    with pytest.raises(UserError, match="records.jsonl is missing.*pack"):
        prepare("corpus", str(tmp_path), str(tmp_path / "packed"))
    with pytest.raises(UserError, match="data.root"):
        prepare("corpus", None, str(tmp_path / "packed"))


def test_a_clip_that_changed_after_clipping_is_refused(clipped, tmp_path):
    out = copied(clipped, tmp_path / "out")
    write(out / "kept" / "v0_0.mp4", b"another")
    with pytest.raises(UserError, match="v0_0.mp4 has changed since the clip step wrote it: run clip and pack again$"):
        pack(out)
    assert not (out / "packed").exists()


@pytest.mark.parametrize("stage", ["stage1", "stage3", "coldstart"])
def test_a_packed_corpus_trains_a_stage(packed, small_world, tmp_path, stage):
    data = {"data__name": "corpus", "data__root": str(packed), "data__packed": str(packed / "packed")}
    config = small_world.config(stage, "", **data, steps=2, batch=2, data__buckets=(320,))
    outcome = train_alone(config, tmp_path / stage)
    assert outcome.finished
    rows = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
