"""Chooses the samples that a report shows, with all models' answers side by side and a strip of the clip's frames."""

import base64
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from favchat_jax.evaluation.metrics import normalise

STRIP = 4  # frames shown of a clip
SIDE = 132  # side of a frame in pixels
QUALITY = 82  # JPEG quality

Sample = Mapping[str, Any]
Frames = Callable[[Mapping[str, Any], Sample], UInt8[np.ndarray, "T H W 3"] | None]


def shown(results: Sequence[Mapping[str, Any]], frames: Frames, count: int) -> list[dict[str, Any]]:
    """Makes the lists of examples of one benchmark: differing answers, failures, lowest scores and other examples.

    Args:
        results: one result per model.
        frames: returns frames of a sample's clip, or None if the clip is missing.
        count: most samples in a list.
    """
    by_model = [{sample["id"]: sample for sample in result["samples"]} for result in results]
    common = [identity for identity in by_model[0] if all(identity in samples for samples in by_model)]
    taken: set[str] = set()

    def cards(
        chosen: Callable[[list[Sample]], bool], rank: Callable[[str], float] = lambda _: 0
    ) -> list[dict[str, Any]]:
        found = [name for name in common if name not in taken and chosen([samples[name] for samples in by_model])]
        picked = _in_turn(sorted(found, key=rank), lambda name: str(by_model[0][name].get("kind")), count)
        taken.update(picked)
        return [_card(results, [samples[name] for samples in by_model], frames) for name in picked]

    def score(name: str) -> float:
        values = [value for samples in by_model for value in _numbers(samples[name]).values()]
        return float(np.mean(values)) if values else 0.0

    lists = []
    if len(results) > 1:
        differing = cards(lambda samples: len({(s["correct"], s["answer"]) for s in samples}) > 1)
        lists.append(("Side by side", "Samples that the models answered differently, each kind in turn.", differing))
    failures = cards(lambda samples: any(sample["correct"] is False for sample in samples))
    lists.append(("Failures", "Wrong answers, each kind of question in turn.", failures))
    lists.append(("Lowest scores", "", cards(lambda samples: all(_numbers(sample) for sample in samples), score)))
    lists.append(("Examples", "", cards(lambda samples: all(sample["correct"] is not False for sample in samples))))
    return [{"title": title, "lead": lead, "cards": found} for title, lead, found in lists if found]


def _in_turn(names: Sequence[str], kind: Callable[[str], str], count: int) -> list[str]:
    """Returns the first `count` names, taking one of each kind in turn."""
    queues: dict[str, deque[str]] = {}
    for name in names:
        queues.setdefault(kind(name), deque()).append(name)

    def draw() -> Iterator[str]:
        while any(queues.values()):
            yield from (queue.popleft() for queue in queues.values() if queue)

    return [name for name, _ in zip(draw(), range(count), strict=False)]


def _card(results: Sequence[Mapping[str, Any]], samples: Sequence[Sample], frames: Frames) -> dict[str, Any]:
    first = samples[0]
    pictures = frames(results[0], first)
    return {
        "id": str(first["id"]),
        "kind": _text(first.get("kind")),
        "question": _text(first["question"]),
        "expected": _text(first["expected"]),
        "frames": None if pictures is None else strip(pictures),
        "answers": [_answer(result, sample) for result, sample in zip(results, samples, strict=True)],
    }


def _answer(result: Mapping[str, Any], sample: Sample) -> dict[str, str]:
    answer, predicted = _text(sample["answer"]), _text(sample["predicted"])
    if sample["correct"] is False and not predicted:
        read = "no label found"
    else:
        read = f"read as {predicted}" if normalise(predicted) != normalise(answer) and predicted else ""
    return {
        "model": result["model"],
        "answer": answer,
        "read": read,
        "verdict": {True: "right", False: "wrong"}.get(sample["correct"], "open"),
        "scores": ", ".join(f"{name} {value:g}" for name, value in _numbers(sample).items()),
    }


def _numbers(sample: Sample) -> dict[str, float]:
    scores = sample.get("scores") or {}
    return {str(name): value for name, value in scores.items() if isinstance(value, int | float)}


def _text(value: Any) -> str:
    return "" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def strip(frames: UInt8[np.ndarray, "T H W 3"]) -> str:
    """Joins frames side by side into one JPEG in a data URI."""
    row = np.concatenate(list(frames), axis=1)
    _, encoded = cv2.imencode(".jpg", row[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()
