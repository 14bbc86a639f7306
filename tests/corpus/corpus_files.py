"""Raw videos for the tests: rendered faces and shapes as long as real clips, and sources laid out as published."""

import hashlib
import json
from pathlib import Path

import numpy as np

from favchat_jax.embedded import drawing, face_parts
from favchat_jax.embedded import faces as rendered_faces

FRAMES = 40


def face_video(index: int, frames: int = FRAMES) -> bytes:
    """Returns an mp4 of a rendered face that is in no split of the embedded data."""
    rng = rendered_faces.generator(0, "corpus", "face", index)
    classes = _classes(rendered_faces.FACE_LABELS, rng)
    look, motion = rendered_faces.sample_look(classes, rng), rendered_faces.sample_motion(classes, rng, frames)
    return rendered_faces.encode(face_parts.draw_face(look, motion))


def shapes_video(index: int, frames: int = FRAMES) -> bytes:
    """Returns an mp4 of shapes that move to and fro; every fourth index gives noise instead."""
    rng = rendered_faces.generator(0, "corpus", "shapes", index)
    if index % 4 == 3:
        return rendered_faces.encode(rng.integers(0, 256, (frames, drawing.SIZE, drawing.SIZE, 3), np.uint8))
    shapes = rendered_faces.sample_shapes(_classes(rendered_faces.GENERAL_LABELS, rng), rng)
    there = drawing.draw_shapes(shapes)
    moves = np.concatenate([there, there[::-1]])
    return rendered_faces.encode(moves[np.arange(frames) % len(moves)])


def _classes(labels: tuple[str, ...], rng: np.random.Generator) -> dict[str, str]:
    known = rendered_faces.LABELS
    return {label: known[label][rng.integers(len(known[label]))] for label in labels}


def write(path: Path, content: bytes | str) -> Path:
    """Writes a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def celebvhq_entry(**changes) -> dict:
    """Returns a clip's entry in CelebV-HQ's annotation file: brown hair, talks, happy."""
    entry = {
        "ytb_id": "video",
        "duration": {"start_sec": 0.5, "end_sec": 1.5},
        "bbox": {"top": 0.0, "bottom": 0.5, "left": 0.25, "right": 1.0},
        "attributes": {
            "appearance": [int(i == 13) for i in range(40)],
            "action": [int(i == 29) for i in range(35)],
            "emotion": {"sep_flag": False, "labels": "happy"},
        },
    }
    return {**entry, **changes}


def celebvhq_info(**clips: dict) -> str:
    """Returns the text of the annotation file."""
    return json.dumps({"meta_info": {}, "clips": clips})


def annotate(out: Path, ids: list[str], **changes) -> None:
    """Writes texts for clips, as `annotate` does."""
    lines = []
    for clip in ids:
        questions = [{"question": "What is the hair like?", "answer": f"It is brown, {clip}.", "kind": "hair"}]
        text = {"summary": f"A happy person with brown hair talks, {clip}.", "questions": questions, "problems": []}
        made = {"key": "k", "backend": "template", "model": "", "prompts": "p", "features": {}, "attempts": 1}
        lines.append(json.dumps({"id": clip, **made, **text, **changes}))
    write(out / "annotations.jsonl", "\n".join(lines) + "\n")


def contents(out: Path) -> dict[str, str]:
    """Returns the hash of every file below a folder, by path."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
