"""The corpus from end to end: separate processes and a real HTTP server turn raw clips into a trained stage 3."""

import json
import time
from collections import Counter

import numpy as np
import pytest

from favchat_jax.corpus.manifest import DROPPED, KEPT, read_table
from favchat_jax.data import vocabulary
from favchat_jax.data.sources import open_dataset
from favchat_jax.embedded import faces as rendered_faces
from tests.conftest import train_alone
from tests.corpus.chat_server import FEATURES, Answer
from tests.corpus.corpus_files import celebvhq_entry, celebvhq_info, write
from tests.corpus.processes import command, finish

CLIPS = 1000
UNSEEN = {**FEATURES, "hair": "unclear", "facial_hair": "unclear", "worn": [], "talking": "unclear", "movements": []}
UNSEEN["person"] = {"looks_like": "unclear", "age": "unclear"}
UNSEEN["expressions"] = [{"when": "throughout", "emotion": "unclear", "evidence": "unclear"}]
SUMMARY = (
    "A person is seen from the front, close to the camera, and the whole face can be seen from beginning to end while "
    "the ground behind stays the same. This is number {}."
)
QUESTIONS = [
    {"question": "How close is the person?", "answer": "Close to the camera.", "kind": "general"},
    {"question": "What stays the same?", "answer": "The ground behind the person.", "kind": "general"},
    {"question": "From where is the face seen?", "answer": "From the front.", "kind": "appearance"},
    {"question": "How much of the face is shown?", "answer": "The whole of it, all the time.", "kind": "motion"},
]


def fair(asked, number):
    """Returns an answer that no label contradicts; one call in 50 meets a failing gateway."""
    if number % 50 == 49:
        return Answer(status=503, raw=b"")
    return {
        "features": Answer(json.dumps(UNSEEN)),
        "summary": Answer(SUMMARY.format(asked.key[:8])),
        "questions": Answer(json.dumps({"questions": QUESTIONS})),
    }[asked.step]


def lay_out(root):
    """Writes rendered clips in CelebV-HQ's published layout; returns the names of those that show a face."""
    entries, faces = {}, set()
    for index in range(CLIPS):
        record = rendered_faces.render(0, "corpus", index)
        held = record.attributes.astype(int).tolist()
        emotion = next((name for name, on in zip(vocabulary.EMOTION, held[75:], strict=True) if on), "neutral")
        attributes = {"appearance": held[:40], "action": held[40:75], "emotion": {"labels": emotion}}
        name = f"clip{index:04d}"
        entries[name] = celebvhq_entry(ytb_id=f"video{index // 3}", attributes=attributes)
        write(root / f"{name}.mp4", record.clip)
        faces |= {name} if record.has_face else set()
    write(root / "celebvhq_info.json", celebvhq_info(**entries))
    return faces


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_rendered_clips_become_a_trained_stage(start, small_world, tmp_path):
    raw, out, seconds = tmp_path / "raw", tmp_path / "out", {}
    faces = lay_out(raw)

    def run(name, *arguments):
        began = time.perf_counter()
        code, errors = finish(command(name, out, *arguments))
        seconds[name] = round(time.perf_counter() - began, 1)
        assert code == 0, errors

    run("scan", f"--source={raw}")
    run("clip", "--filter_celebvhq")
    kept = {row["id"] for row in read_table(out, KEPT)}
    assert kept | {row["id"] for row in read_table(out, DROPPED)} == {f"clip{index:04d}" for index in range(CLIPS)}
    assert len(kept & faces) >= 0.95 * max(len(kept), len(faces))
    server = start(fair)
    run("annotate", "--spend_limit=0", "--calls_per_minute=60000")
    asked = Counter(asked.key for asked in server.asked if asked.sent)
    assert len(asked) == 3 * len(kept) and asked.total() - len(asked) == len(server.asked) // 50
    run("pack")
    parts = {name: open_dataset("corpus", str(out / "packed"), name) for name in ("stage3", "heldout")}
    assert sum(map(len, parts.values())) == len(kept) and len(parts["heldout"])
    groups = [{source[i].source for i in range(len(source))} for source in parts.values()]
    assert not groups[0] & groups[1]
    data = {"data__name": "corpus", "data__root": str(out), "data__packed": str(out / "packed")}
    config = small_world.config("stage3", "", **data, steps=5, batch=4, data__buckets=(480,))
    assert train_alone(config, tmp_path / "run").finished
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(loss) for loss in losses if loss is not None)
    print(f"{len(faces)} with a face, {len(kept)} kept, {len(kept & faces)} of them right; seconds {seconds}")
