"""Evaluates YouTube Faces (Wolf et al., 2011): do two clips show the same person (Table 5)?

    ROOT/frame_images_DB/Aaron_Eckhart/0/0.555.jpg ...    or aligned_images_DB/, whose frames show only the face
    ROOT/splits.txt    for `pairs=splits`; lines such as: 1, 1, Sadie_Frost/1, Sadie_Frost/5, 1

`pairs=segments` is the paper's test: two segments of 36 frames for each of 1,595 people, 3,190 in all. The paper does
not say how it pairs them. Here each person's two segments form a pair. They come from two videos, or from the beginning
and the end of an only video. Each person's first segment also forms a pair with another person's second, drawn by the
seed. `pairs=splits` is the data set's own test: 5,000 pairs of complete videos in ten parts.

The model sees both clips' frames in time order as one video. With `method=likelihood` the ROC curve is drawn from the
log-probability of "yes" minus that of "no", otherwise from the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from favchat_jax.errors import UserError
from favchat_jax.evaluation import published
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.footage import Footage, pictures
from favchat_jax.evaluation.labels import says_same
from favchat_jax.evaluation.layout import described, first_of, root_of
from favchat_jax.evaluation.metrics import auc, mean_figure, roc, statistic_figure
from favchat_jax.evaluation.respondents import Ask
from favchat_jax.evaluation.result import Result, make_result
from favchat_jax.evaluation.session import Session
from favchat_jax.files import is_hidden, read_lines

SOURCE = "ask for it at https://www.cs.tau.ac.il/~wolf/ytfaces"
LAYOUT = "frame_images_DB/ and splits.txt"
ANSWERS = ("Yes", "No")


@dataclass(frozen=True)
class Pair:
    """Two clips and whether they show the same person; a missing clip is None."""

    id: str
    clips: tuple[Footage | None, Footage | None]
    same: bool
    part: str


def run(config: EvaluationConfig, session: Session) -> Result:
    """Asks the model about each pair, and scores its answers."""
    if config.method not in ("direct", "likelihood"):
        raise UserError(f"method={config.method} is not for pairs: choose direct or likelihood")
    root = root_of(config, LAYOUT, SOURCE)
    images = first_of(root, [config.data.images], "its frames", SOURCE)
    annotations = [] if config.pairs == "segments" else [first_of(root, ["splits.txt"], "its pairs", SOURCE)]
    pairs = _read(annotations[0], images) if annotations else _segments(images, config.segment, config.seed)
    pairs = pairs[: config.limit or None]
    there = _present(pairs, session, images)
    samples = _samples(config, session, there)
    same, scores = np.array([row["expected"] == "yes" for row in samples]), np.array([row["score"] for row in samples])
    undecided = sum(row["predicted"] is None for row in samples)
    return make_result(
        config.benchmark,
        samples,
        {
            "accuracy": _accuracy(samples, config.seed),
            "auc": statistic_figure(lambda picked: auc(same[picked], scores[picked]), len(samples), config.seed),
        },
        groups=_parts(samples, config.seed),
        curves={"roc": roc(same, scores)},
        missing=session.missing,
        notes=[f"{undecided} of {len(samples)} answers say neither yes nor no and count as wrong"] if undecided else [],
        data=described("YouTube Faces", root, annotations, _folders(there), len(pairs)),
        published=published.rows(published.VERIFICATION, "accuracy", first=int(session.is_described)),
    )


def _samples(config: EvaluationConfig, session: Session, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    asks = [Ask(pair.id, pair.clips, (((config.question, None),),)) for pair in pairs]
    if config.method == "likelihood":
        weights = session.likelihoods(asks, ANSWERS)
        outcomes = {id: ("", yes > no, yes - no) for id, (yes, no) in weights.items()}
    else:
        answers = {id: answer for id, (answer,) in session.ask(asks, config.max_new_tokens).items()}
        verdicts = {id: says_same(answer) for id, answer in answers.items()}
        outcomes = {id: (answers[id], same, {True: 1.0, False: 0.0, None: 0.5}[same]) for id, same in verdicts.items()}
    rows = []
    for pair in pairs:
        if pair.id in outcomes:
            answer, same, score = outcomes[pair.id]
            rows.append(
                {
                    "id": pair.id,
                    "kind": pair.part,
                    "question": config.question,
                    "expected": "yes" if pair.same else "no",
                    "answer": answer or ANSWERS[not same],
                    "predicted": None if same is None else "yes" if same else "no",
                    "correct": same is pair.same,
                    "score": float(score),
                }
            )
    return rows


def _accuracy(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    return mean_figure([row["correct"] for row in rows], seed, scale=100)


def _parts(samples: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    groups = {}
    for part in dict.fromkeys(row["kind"] for row in samples):
        rows = [row for row in samples if row["kind"] == part]
        groups[part] = {"n": len(rows), "figures": {"accuracy": _accuracy(rows, seed)}}
    return groups


def _present(pairs: Sequence[Pair], session: Session, images: Path) -> list[Pair]:
    there = [pair for pair in pairs if None not in pair.clips]
    for pair in pairs:
        if None in pair.clips:
            session.leave_out(pair.id, f"one of its clips is not in {images}")
    if not there:
        raise UserError(f"{images} holds none of the {len(pairs)} pairs: copy the data set's frames there ({SOURCE})")
    return there


def _folders(pairs: Sequence[Pair]) -> list[Path]:
    return sorted({clip.content for pair in pairs for clip in pair.clips})


def _read(path: Path, images: Path) -> list[Pair]:
    """Reads the pairs of splits.txt; a header line is skipped."""
    pairs = []
    for number, line in read_lines(path):
        fields = [field.strip() for field in line.split(",")]
        if number == 1 and not fields[0].isdigit():
            continue
        if len(fields) != 5 or fields[4] not in ("0", "1"):
            raise UserError(
                f"{path}, line {number}: expected part, number, two clips and 0 or 1, not {line.strip()!r}: "
                "copy the file again"
            )
        part, _, one, other, same = fields
        clips = tuple(_full_clip(images / name, name) for name in (one, other))
        pairs.append(Pair(f"{one} {other}", clips, same == "1", f"split {part}"))
    return pairs


def _full_clip(folder: Path, name: str) -> Footage | None:
    return Footage(name, folder) if folder.is_dir() else None


def _segments(images: Path, length: int, seed: int) -> list[Pair]:
    people = {}
    for person in _folders_in(images):
        videos = sorted(_folders_in(person), key=lambda path: (len(path.name), path.name))
        if videos:
            people[person.name] = _two_segments(videos, length)
    if len(people) < 2:
        raise UserError(
            f"{images} holds {len(people)} people, but pairs need two: copy the data set's frames there ({SOURCE})"
        )
    names = list(people)
    order = np.random.default_rng(seed).permutation(len(names))  # a cycle: no one is paired with themselves
    others = {names[a]: names[b] for a, b in zip(order, np.roll(order, -1), strict=True)}
    same = [Pair(f"{name} {name}", people[name], True, "same") for name in names]
    different = [Pair(f"{a} {b}", (people[a][0], people[b][1]), False, "different") for a, b in others.items()]
    return [pair for both in zip(same, sorted(different, key=lambda pair: pair.id), strict=True) for pair in both]


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path))


def _two_segments(videos: Sequence[Path], length: int) -> tuple[Footage, Footage]:
    one, other = videos[0], videos[min(1, len(videos) - 1)]
    last = max(0, len(pictures(other)) - length) if one == other else 0
    names = [f"{path.parent.name}/{path.name}" for path in (one, other)]
    return Footage(f"{names[0]} from 0", one, 0, length), Footage(f"{names[1]} from {last}", other, last, length)
