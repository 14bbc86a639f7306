"""Corpus folders for the tests, as `clip` writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from favchat_jax.corpus.manifest import KEPT, write_table
from tests.data.video_files import encode_video, numbered_picture

LABELS = {
    "appearance": ["male", "young", "brown_hair", "eyeglasses", "no_beard"],
    "action": ["talk", "nod"],
    "emotion": ["happy"],
}


def fill(out: Path, clips: int, labels: Mapping[str, Sequence] | None = LABELS) -> Path:
    """Makes a corpus folder of clips with 9 numbered frames each; all clips differ."""
    (out / "kept").mkdir(parents=True)
    rows = []
    for number in range(clips):
        name = f"clip{number:03d}"
        frames = encode_video(9, picture=lambda frame, w, h, first=10 * number: numbered_picture(first + frame, w, h))
        (out / f"kept/{name}.mp4").write_bytes(frames)
        rows.append(row(name, labels))
    write_table(out, KEPT, rows)
    return out


def row(name: str, labels: Mapping[str, Sequence] | None = LABELS, **more) -> dict:
    """Returns a row of `kept.parquet`."""
    return {
        "id": name,
        "path": f"kept/{name}.mp4",
        "source": "celebvhq",
        "group": f"video of {name}",
        "attributes": json.dumps(labels) if labels else "",
        "frames": 9,
        "fps": 25.0,
        "face_share": 1.0,
        "start_frame": 0,
        **more,
    }
