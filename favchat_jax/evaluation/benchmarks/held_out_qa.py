"""Runs the test of the paper's later version: questions about your own clips, scored from 0 to 10 by a judge.

    ROOT/qa.jsonl    lines of clips: {"clip": ID, "video": "clips/ID.mp4", "qa": [{"q": ..., "a": ...}], ...}
    ROOT/clips/ID.mp4

A checkpoint's figures include `loss`, which is low where the model expects the reference answers. It shows how far a
model has learned its own clips, and what that does to its answers about others.

The layout is that of clips for training (`data.root` of celebvhq). The authors' 2,000 samples are not published. With
more than `limit` questions, `limit` of them are drawn by the seed.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from favchat_jax.data.sources.celebvhq import read_texts
from favchat_jax.errors import UserError
from favchat_jax.evaluation import published
from favchat_jax.evaluation.captions import captions_result, sample
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.footage import Footage
from favchat_jax.evaluation.layout import described, first_of, root_of
from favchat_jax.evaluation.metrics import mean_figure
from favchat_jax.evaluation.respondents import Ask
from favchat_jax.evaluation.result import Figure, Result
from favchat_jax.evaluation.session import Session, present

SOURCE = "write one line per clip with clip, video, and qa, a list of q and a"
LAYOUT = "qa.jsonl and clips/"


def run(config: EvaluationConfig, session: Session) -> Result:
    """Asks the model the questions and scores its answers."""
    root = root_of(config, LAYOUT, SOURCE)
    path = first_of(root, ["qa.jsonl"], "its questions", SOURCE)
    clips = _drawn(_read(path), config.limit, config.seed)
    there = present([(name, root / clip["video"]) for name, clip in clips.items()], session, root)
    asks = [ask for name, video in there for ask in _asks(name, video, clips[name]["qa"], config.questions)]
    replies = session.ask([_unanswered(ask) for ask in asks], config.max_new_tokens)
    weighed = [ask for ask in asks if ask.id in replies and session.respondent.gives_likelihoods]
    samples = _samples(asks, replies, session.losses(weighed) if weighed else {})
    listed = sum(len(clip["qa"]) for clip in clips.values())
    data = described("held-out questions", root, [path], [video for _, video in there], listed)
    rows = published.rows(published.HELD_OUT_QA, "score")
    figures = {"loss": _mean_loss(samples, config.seed)} if weighed else {}
    return captions_result(config, session, samples, {"score": "qa"}, known=figures, data=data, published=rows)


def _samples(asks: list[Ask], replies: dict[str, list[str]], losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns a row for each answered question; a clip's questions are numbered in their order."""
    samples, numbers = [], Counter[str]()
    for ask in asks:
        clip = ask.clips[0].name
        for i, ((question, reference),) in enumerate(ask.conversations):
            if ask.id in replies:
                row = sample(f"{clip} {numbers[clip]}", clip, question, str(reference), replies[ask.id][i])
                samples.append({**row, "scores": {"loss": losses[ask.id][i]}} if ask.id in losses else row)
            numbers[clip] += 1
    return samples


def _mean_loss(samples: list[dict[str, Any]], seed: int) -> Figure:
    return mean_figure([row["scores"]["loss"] for row in samples], seed, clusters=[row["clip"] for row in samples])


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the video and the questions of each clip, whose lines are joined."""
    clips = {
        clip: {
            "video": texts.video or f"clips/{clip}.mp4",
            "qa": [{"q": pair.question, "a": pair.answer} for pair in texts.questions],
        }
        for clip, texts in read_texts(path, None).items()
    }
    if not any(clip["qa"] for clip in clips.values()):
        raise UserError(f"{path} holds no questions: {SOURCE}")
    return clips


def _drawn(clips: dict[str, dict[str, Any]], limit: int, seed: int) -> dict[str, dict[str, Any]]:
    """Draws at most `limit` of all questions without replacement; 0 keeps all."""
    places = [(name, i) for name, clip in clips.items() for i in range(len(clip["qa"]))]
    if limit and limit < len(places):
        kept = np.random.default_rng(seed).choice(len(places), limit, replace=False)
        places = [places[i] for i in sorted(kept)]
    chosen = set(places)
    drawn = {
        name: {**clip, "qa": [pair for i, pair in enumerate(clip["qa"]) if (name, i) in chosen]}
        for name, clip in clips.items()
    }
    return {name: clip for name, clip in drawn.items() if clip["qa"]}


def _asks(name: str, video: Path, pairs: list[dict[str, str]], most: int) -> list[Ask]:
    """Groups a clip's questions, with their answers, into asks of at most `most`, which share the clip's encoding."""
    parts = [pairs[start : start + most] for start in range(0, len(pairs), most)]
    return [
        Ask(f"{name} {number}" if number else name, (Footage(name, video),), tuple(((q["q"], q["a"]),) for q in part))
        for number, part in enumerate(parts)
    ]


def _unanswered(ask: Ask) -> Ask:
    return dataclasses.replace(ask, conversations=tuple(((question, None),) for ((question, _),) in ask.conversations))
