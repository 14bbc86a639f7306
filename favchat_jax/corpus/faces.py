"""Detects faces in frames. Haar cascades need no download; SCRFD finds more faces (paper, Section 3.1).

Haar cascades weigh differences in brightness, so they miss dark skin and dim light more often than bright faces.
Frames without a find are therefore searched again, with dark tones spread and for faces in profile. SCRFD (AntelopeV2's
`scrfd_10g_bnkps.onnx`, which you download yourself) has less of this weakness.
"""

from pathlib import Path
from typing import Protocol

import av
import cv2
import numpy as np
from jaxtyping import Float

from favchat_jax.data.video import SMALLEST_SIDE
from favchat_jax.errors import UserError, one_line

DETECTORS = ("haar", "scrfd")


class Detector(Protocol):
    """Finds the faces of a frame."""

    def __call__(self, frame: av.VideoFrame) -> Float[np.ndarray, "N 4"]:
        """Returns faces as top, bottom, left, right in shares of the picture, the largest first."""


def make_detector(name: str, model: str, smallest: float) -> Detector:
    """Returns the detector with the given name.

    Args:
        name: one of DETECTORS.
        model: the ONNX file of `scrfd`.
        smallest: height of the smallest face that counts, as a share of the picture's shorter side.

    Raises:
        UserError: the name is unknown, or the model is missing or of another kind.
    """
    if name == "haar":
        return Haar(smallest)
    if name == "scrfd":
        return Scrfd(model, smallest)
    raise UserError(f"--detector={name} is unknown: choose one of {', '.join(DETECTORS)}")


class Haar:
    """Detects faces by OpenCV's Haar cascades on grey pictures whose shorter side has 360 pixels."""

    SIDE = 360
    LONGEST = 4 * SIDE  # pixels; at SIDE a banner would take minutes a frame
    MARGIN = 90  # pixels of stretched border, so that faces that fill the picture are found
    SPREAD = (255 * (np.arange(256) / 255) ** 0.5).astype(np.uint8)  # makes dark tones lighter

    def __init__(self, smallest: float):
        cv2.setNumThreads(1)  # parallel work is up to the pipeline's workers
        folder = Path(cv2.data.haarcascades)
        self._frontal, self._profile = (
            cv2.CascadeClassifier(str(folder / f"haarcascade_{name}.xml"))
            for name in ("frontalface_alt2", "profileface")
        )
        self._smallest = smallest

    def __call__(self, frame: av.VideoFrame) -> Float[np.ndarray, "N 4"]:
        """See `Detector`."""
        scale = min(self.SIDE / min(frame.width, frame.height), self.LONGEST / max(frame.width, frame.height))
        width, height = (max(SMALLEST_SIDE, round(side * scale)) for side in (frame.width, frame.height))
        least = {"minSize": (max(20, round(self._smallest * min(width, height))),) * 2}
        grey = frame.reformat(width, height, "gray").to_ndarray()
        margins = [self.MARGIN] * 4
        plain = cv2.copyMakeBorder(grey, *margins, cv2.BORDER_REPLICATE)
        found = self._frontal.detectMultiScale(plain, 1.1, 3, **least)
        if not len(found):
            found = self._frontal.detectMultiScale(cv2.LUT(plain, self.SPREAD), 1.05, 2, **least)
        if not len(found):
            found = self._profile.detectMultiScale(plain, 1.1, 2, **least)
        if not len(found):  # the cascade finds faces turned to one side only
            found = self._profile.detectMultiScale(plain[:, ::-1].copy(), 1.1, 2, **least)
            if len(found):
                found[:, 0] = plain.shape[1] - found[:, 0] - found[:, 2]
        left, top, wide, high = (np.array(found, np.float64).reshape(-1, 4) - [self.MARGIN, self.MARGIN, 0, 0]).T
        boxes = np.stack([top / height, (top + high) / height, left / width, (left + wide) / width], axis=1)
        return _largest_first(boxes.clip(0, 1))


class Scrfd:
    """Detects faces by InsightFace's SCRFD (Guo et al., 2021) from its ONNX file, on one thread.

    The picture is fitted into the upper left of a square. At strides 8, 16 and 32, each cell has two anchors. Each
    anchor has a score and the distances to the four sides of its box, in strides.
    """

    SIDE = 640
    STRIDES = (8, 16, 32)
    ANCHORS = 2
    SCORE, OVERLAP = 0.5, 0.4  # InsightFace's thresholds

    def __init__(self, model: str, smallest: float):
        if not Path(model).is_file():
            raise UserError(f"--detector_model={model}: no such file; name AntelopeV2's scrfd_10g_bnkps.onnx")
        try:
            import onnxruntime
        except ImportError:
            raise UserError("--detector=scrfd needs onnxruntime: pip install 'favchat_jax[corpus]'") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no class
            reason = one_line(error)
            raise UserError(f"--detector_model={model} is not an ONNX model ({reason}): fetch it again") from None
        if len(self._session.get_outputs()) not in (2 * len(self.STRIDES), 3 * len(self.STRIDES)):
            raise UserError(f"--detector_model={model} is not an SCRFD of three strides: take scrfd_10g_bnkps.onnx")
        self._input = self._session.get_inputs()[0].name
        self._smallest = smallest

    def __call__(self, frame: av.VideoFrame) -> Float[np.ndarray, "N 4"]:
        """See `Detector`."""
        scale = self.SIDE / max(frame.width, frame.height)
        width, height = (max(SMALLEST_SIDE, round(side * scale)) for side in (frame.width, frame.height))
        square = np.zeros((self.SIDE, self.SIDE, 3), np.uint8)
        square[:height, :width] = frame.reformat(width, height, "rgb24").to_ndarray()
        pixels = ((square.astype(np.float32) - 127.5) / 128).transpose(2, 0, 1)[None]
        outputs = [output.reshape(-1, output.shape[-1]) for output in self._session.run(None, {self._input: pixels})]
        boxes, scores = zip(*map(self._decode, self.STRIDES, outputs[:3], outputs[3:6]), strict=True)
        boxes, scores = np.concatenate(boxes), np.concatenate(scores)
        corners = np.stack([boxes[:, 2], boxes[:, 0], boxes[:, 3] - boxes[:, 2], boxes[:, 1] - boxes[:, 0]], axis=1)
        chosen = np.array(cv2.dnn.NMSBoxes(corners.tolist(), scores.tolist(), self.SCORE, self.OVERLAP), int).ravel()
        boxes = boxes[chosen].reshape(-1, 4)
        boxes = boxes[boxes[:, 1] - boxes[:, 0] >= self._smallest * min(width, height)]
        return _largest_first((boxes / [height, height, width, width]).clip(0, 1))

    def _decode(
        self, stride: int, scores: Float[np.ndarray, "A 1"], distances: Float[np.ndarray, "A 4"]
    ) -> tuple[Float[np.ndarray, "K 4"], Float[np.ndarray, " K"]]:
        """Returns boxes (top, bottom, left, right, in pixels of the square) and scores over the threshold."""
        cells = self.SIDE // stride
        y, x = np.divmod(np.arange(cells * cells).repeat(self.ANCHORS), cells)
        left, top, right, bottom = distances.T * stride
        boxes = np.stack([y * stride - top, y * stride + bottom, x * stride - left, x * stride + right], axis=1)
        sure = scores[:, 0] >= self.SCORE
        return boxes[sure].astype(np.float64), scores[sure, 0]


def _largest_first(boxes: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 4"]:
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    return boxes[np.argsort(-areas, kind="stable")]
