"""Measures how well a detector finds faces.

python -m tools.detector_accuracy [--videos=DIR] [--faceless=FILE,...]

The videos show one person each. Frames are searched as they are, darkened to 15 %, turned by 35 degrees, and shrunk
until the face is 24 pixels high. The detector must find the face at the same place as in the unchanged frame.
Without --videos, rendered clips are searched, and rendered shapes for the frames without a face. In these, finds that
are too small to count are left out.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
from absl import flags
from jaxtyping import Float, UInt8

from favchat_jax import command_line
from favchat_jax.config import FaceConfig
from favchat_jax.data.faces.detectors import DETECTORS, Detector, load_detector, overlap
from favchat_jax.data.faces.search import fitted
from favchat_jax.embedded import drawing, face_parts
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.errors import UserError
from favchat_jax.files import replace_file

DARK = 0.15  # of the brightness
ANGLE = 35  # degrees
SMALL = 24  # pixels: height of a face
SAME = 0.3  # intersection over union of the found box and the place of the face
RENDERED = 24  # clips of each kind

Frame = UInt8[np.ndarray, "H W 3"]
Box = Float[np.ndarray, " 4"]  # top, bottom, left and right in shares of the picture
Change = Callable[[Frame, Box], tuple[Frame, Box]]


@dataclasses.dataclass
class Count:
    """Counts the finds in one kind of frames, and the seconds of processor time that they took."""

    frames: int = 0
    found: int = 0
    missed: int = 0
    wrong: int = 0
    seconds: float = 0.0

    def row(self, name: str) -> dict[str, object]:
        """Returns recall, precision and milliseconds a frame; None where nothing was there to be found."""
        faces, finds = self.found + self.missed, self.found + self.wrong
        return {
            "frames": name,
            "searched": self.frames,
            "recall": self.found / faces if faces else None,
            "precision": self.found / finds if finds and faces else None,
            "wrong_finds": self.wrong,
            "milliseconds": 1000 * self.seconds / self.frames,
        }


def darkened(frame: Frame, box: Box) -> tuple[Frame, Box]:
    """Returns the frame at DARK of its brightness, and its face's box."""
    return cv2.convertScaleAbs(frame, alpha=DARK), box


def turned(frame: Frame, box: Box) -> tuple[Frame, Box]:
    """Returns the frame turned by ANGLE about the face, whose box keeps its middle and size."""
    height, width = frame.shape[:2]
    y, x = box.reshape(2, 2).mean(axis=1) * [height, width]
    turn = cv2.getRotationMatrix2D((float(x), float(y)), ANGLE, 1)
    return cv2.warpAffine(frame, turn, (width, height), borderMode=cv2.BORDER_REPLICATE), box


def shrunk(frame: Frame, box: Box) -> tuple[Frame, Box]:
    """Returns the frame so small that its face is SMALL pixels high, in the middle of a grey one of its own size."""
    height, width = frame.shape[:2]
    scale = min(1.0, SMALL / ((box[1] - box[0]) * height))
    high, wide = round(scale * height), round(scale * width)
    top, left = (height - high) // 2, (width - wide) // 2
    picture = np.full_like(frame, 128)
    picture[top : top + high, left : left + wide] = cv2.resize(frame, (wide, high), interpolation=cv2.INTER_AREA)
    sides, places = np.array([height, height, width, width]), np.array([top, top, left, left])
    return picture, (box * [high, high, wide, wide] + places) / sides


CHANGES: dict[str, Change] = {"darkened": darkened, "turned": turned, "shrunk": shrunk}


def measure(detector: Detector, frames: Iterator[Frame], faceless: Iterator[Frame]) -> list[dict[str, object]]:
    """Returns a row for the frames as they are, one for each change, and one for the frames without a face."""
    counts = {name: Count() for name in ("as they are", *CHANGES, "without a face")}
    for frame in frames:
        boxes = _search(detector, frame, counts["as they are"])
        _count(counts["as they are"], boxes, boxes[0] if len(boxes) else None)
        if len(boxes):
            for name, change in CHANGES.items():
                picture, box = change(frame, boxes[0])
                _count(counts[name], _search(detector, picture, counts[name]), box)
    none, smallest = counts["without a face"], FaceConfig.smallest_face
    for frame in faceless:
        boxes = _search(detector, frame, none)
        none.wrong += int(np.sum((boxes[:, 1] - boxes[:, 0]) * frame.shape[0] >= smallest * min(frame.shape[:2])))
    return [count.row(name) for name, count in counts.items() if count.frames]


def _search(detector: Detector, frame: Frame, count: Count) -> Float[np.ndarray, "N 4"]:
    """Returns the boxes of the sure finds in a frame, the largest first."""
    high, wide = fitted(frame.shape[:2], detector.SIDE, detector.LONGEST)
    picture = cv2.resize(frame, (wide, high), interpolation=cv2.INTER_AREA)
    begin = time.process_time()
    found = detector(picture)
    count.seconds += time.process_time() - begin
    count.frames += 1
    return found[found.sure].boxes


def _count(count: Count, boxes: Float[np.ndarray, "N 4"], place: Box | None) -> None:
    right = any(overlap(box, place) >= SAME for box in boxes) if place is not None else False
    count.found += right
    count.missed += not right
    count.wrong += len(boxes) - right


def _of_video(path: Path, every: int) -> Iterator[Frame]:
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % every == 0:
                yield frame.to_ndarray(format="rgb24")


def rendered(split: str, every: int) -> Iterator[Frame]:
    """Draws each `every`-th frame of the rendered clips: of faces, or of shapes."""
    for number in range(RENDERED):
        rng = rendered_faces.generator(0, "detector", split, number)
        labels = rendered_faces.FACE_LABELS if split == "faces" else rendered_faces.GENERAL_LABELS
        classes = {label: rng.choice(rendered_faces.LABELS[label]) for label in labels}
        if split == "faces":
            look = rendered_faces.sample_look(classes, rng)
            drawn = face_parts.draw_face(look, rendered_faces.sample_motion(classes, rng))
        else:
            drawn = drawing.draw_shapes(rendered_faces.sample_shapes(classes, rng))
        yield from drawn[::every]


def main() -> None:
    """Measures the detector that the flags name."""
    if _JSON.value:
        command_line.check_output("--json", _JSON.value)
    detector = load_detector(_DETECTOR.value, _DETECTOR_MODEL.value)
    cv2.setNumThreads(1)
    every = _EVERY.value
    if _VIDEOS.value:
        without = {Path(name).resolve() for name in _FACELESS.value}
        files = [path for path in sorted(Path(_VIDEOS.value).glob("*")) if path.resolve() not in without]
        if not files:
            raise UserError(f"--videos={_VIDEOS.value} holds no video: name a folder of videos of one person each")
        frames = (frame for path in files for frame in _of_video(path, every))
        faceless = (frame for path in sorted(without) for frame in _of_video(path, every))
    else:
        frames, faceless = rendered("faces", every), rendered("shapes", every)
    rows = measure(detector, frames, faceless)
    for row in rows:
        shares = ", ".join(f"{name} {row[name]:.3f}" for name in ("recall", "precision") if row[name] is not None)
        text = (
            f"{row['searched']} frames {row['frames']}: {shares}{', ' * bool(shares)}{row['wrong_finds']} wrong finds"
        )
        print(f"{text}, {row['milliseconds']:.1f} ms of processor time a frame")
    if _JSON.value:
        replace_file(_JSON.value, json.dumps(rows, indent=1))


if __name__ == "__main__":
    _VIDEOS = flags.DEFINE_string("videos", None, "Folder of videos of one person each; by default rendered clips")
    _FACELESS = flags.DEFINE_list("faceless", [], "Videos without a face that is not tiny, in the folder or elsewhere")
    _EVERY = flags.DEFINE_integer("every", 8, "Frames from one searched frame to the next", lower_bound=1)
    _DETECTOR = flags.DEFINE_enum("detector", "centerface", DETECTORS, "Face detector")
    _DETECTOR_MODEL = flags.DEFINE_string("detector_model", "", "The detector's ONNX file")
    _JSON = flags.DEFINE_string("json", None, "File for the figures")
    command_line.start(main)
