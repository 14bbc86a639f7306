"""Makes miniatures of the benchmarks' data sets: rendered clips in exactly the published layouts.

    python -m tools.miniatures --benchmark=dfew --out=runs/miniatures/dfew --clips=40

They show that a benchmark works without its data set, and document its layout. Their clips are in no split of the
embedded data set. A file MINIATURE.txt marks them, so that results say that they are no results on the data set.
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
from absl import flags

from favchat_jax import command_line
from favchat_jax.data.record import Record
from favchat_jax.data.video import decode
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.errors import UserError
from favchat_jax.evaluation.benchmarks import dfew
from favchat_jax.evaluation.layout import MINIATURE
from favchat_jax.files import replace_folder

EMOTIONS = rendered_faces.LABELS["emotion"]
FRAME_SIZE = 128  # pixels a side of the frames of YouTube Faces
FRAMES = 16  # frames of a rendered clip; each half becomes a video of its person


def draw(count: int, seed: int) -> list[Record]:
    """Returns rendered clips with faces."""
    drawn, index = [], 0
    while len(drawn) < count:
        record = rendered_faces.render(seed, "miniature", index)
        index += 1
        if record.has_face:
            drawn.append(record)
    return drawn


def emotion_of(record: Record) -> str:
    """Returns the emotion of a rendered face."""
    return EMOTIONS[record.labels["emotion"]]


def make_dfew(root: Path, records: Sequence[Record]) -> None:
    """Writes five folds of video_name,label, and Clip/original/N.mp4."""
    names = {"happy": "happy", "sadness": "sad", "neutral": "neutral", "anger": "angry", "surprise": "surprise"}
    labels = [list(dfew.CLASSES).index(names[emotion_of(record)]) + 1 for record in records]
    for fold in range(5):
        rows = [(i + 1, labels[i]) for i in range(fold, len(records), 5)]
        _table(
            root / "EmoLabel_DataSplit" / "test(single-labeled)" / f"set_{fold + 1}.csv", ["video_name", "label"], rows
        )
    _clips(root / "Clip" / "original", "{number}.mp4", records)


def make_mafw(root: Path, records: Sequence[Record]) -> None:
    """Writes five folds of '00001.mp4 anger', and data/clips/00001.mp4."""
    names = {"happy": "happiness"}
    for fold in range(5):
        path = root / "Train & Test Set" / "single" / "no_caption" / f"set_{fold + 1}" / "test.txt"
        path.parent.mkdir(parents=True)
        chosen = range(fold, len(records), 5)
        emotions = {i: names.get(emotion_of(records[i]), emotion_of(records[i])) for i in chosen}
        path.write_text("".join(f"{i + 1:05d}.mp4 {emotion}\n" for i, emotion in emotions.items()))
    _clips(root / "data" / "clips", "{number:05d}.mp4", records)


def make_dfec(root: Path, records: Sequence[Record]) -> None:
    """Writes test.json, and the clips at the paths that it names."""
    rows = [
        {"id": str(i), "video": f"DFEW/videos/{i + 1}.mp4", "caption": record.summary}
        for i, record in enumerate(records)
    ]
    (root / "test.json").write_text(json.dumps(rows, indent=2))
    _clips(root / "DFEW" / "videos", "{number}.mp4", records)


def make_emer(root: Path, records: Sequence[Record]) -> None:
    """Writes gt-eng.csv, and video/sample_00000001.mp4."""
    rows = []
    for number, record in enumerate(records, 1):
        emotion = emotion_of(record)
        reasons = f"{record.summary} Therefore, it is inferred that the emotional state is {emotion}."
        rows.append((f"sample_{number:08d}", emotion, "", reasons))
    _table(root / "gt-eng.csv", ["names", "emotions", "subtitles", "reasons"], rows)
    _clips(root / "video", "sample_{number:08d}.mp4", records)


def make_youtube_faces(root: Path, records: Sequence[Record]) -> None:
    """Writes two videos per person as folders of frames, their labelled faces, and splits.txt."""
    lines = ["split number, pair number, first name, second name, is same"]
    for i, record in enumerate(records):
        person = f"Person_{i + 1:04d}"
        frames = decode(record.clip, frames=FRAMES, size=FRAME_SIZE).frames
        boxes = []
        for number, frame in enumerate(frames):
            video = 2 * number // FRAMES
            path = root / "frame_images_DB" / person / str(video) / f"{video}.{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), frame[:, :, ::-1])
            half = FRAME_SIZE // 2
            boxes.append(f"{person}\\{video}\\{path.name},0,{half},{half},{FRAME_SIZE},{FRAME_SIZE},0.0,1\n")
        (root / "frame_images_DB" / f"{person}.labeled_faces.txt").write_text("".join(boxes))
        other = f"Person_{(i + 1) % len(records) + 1:04d}"
        lines += [
            f"{i % 10 + 1}, {i + 1}, {person}/0, {person}/1, 1",
            f"{i % 10 + 1}, {i + 1}, {person}/0, {other}/1, 0",
        ]
    (root / "splits.txt").write_text("\n".join(lines) + "\n")


def make_held_out_qa(root: Path, records: Sequence[Record]) -> None:
    """Writes qa.jsonl, and clips/ID.mp4."""
    rows = [
        {
            "clip": f"{i + 1:05d}",
            "video": f"clips/{i + 1:05d}.mp4",
            "summary": record.summary,
            "qa": [{"q": q.question, "a": q.answer} for q in record.questions],
        }
        for i, record in enumerate(records)
    ]
    (root / "qa.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    _clips(root / "clips", "{number:05d}.mp4", records)


MAKERS: dict[str, Callable[[Path, Sequence[Record]], None]] = {
    "dfew": make_dfew,
    "mafw": make_mafw,
    "dfec": make_dfec,
    "emer": make_emer,
    "youtube_faces": make_youtube_faces,
    "held_out_qa": make_held_out_qa,
}


def make(benchmark: str, out: Path, clips: int, seed: int = 0) -> Path:
    """Makes the miniature of a benchmark's data set; `out` must not exist."""
    if benchmark not in MAKERS:
        raise UserError(f"--benchmark={benchmark} has no miniature: choose one of {', '.join(MAKERS)}")
    if out.exists():
        raise UserError(f"--out={out} exists already: name another folder, or delete it")
    with replace_folder(out) as draft:
        MAKERS[benchmark](draft, draw(clips, seed))
        (draft / MINIATURE).write_text(f"Rendered clips in the layout of {benchmark}: figures on them mean nothing.\n")
    return out


def _clips(folder: Path, name: str, records: Sequence[Record]) -> None:
    folder.mkdir(parents=True)
    for number, record in enumerate(records, 1):
        (folder / name.format(number=number)).write_bytes(record.clip)


def _table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def main() -> None:
    """Makes the miniature that the flags name."""
    if not _BENCHMARK.value or not _OUT.value:
        raise UserError("needed: --benchmark=NAME --out=FOLDER")
    make(_BENCHMARK.value, Path(_OUT.value), _CLIPS.value, _SEED.value)
    print(_OUT.value)


if __name__ == "__main__":
    _BENCHMARK = flags.DEFINE_string("benchmark", None, f"One of {', '.join(MAKERS)}")
    _OUT = flags.DEFINE_string("out", None, "Folder to write")
    _CLIPS = flags.DEFINE_integer("clips", 40, "Number of clips, or of people in youtube_faces", lower_bound=5)
    _SEED = flags.DEFINE_integer("seed", 0, "Seed of the rendered clips")
    command_line.start(main)
