"""Runs the test of the paper's later version: questions about your own clips, scored from 0 to 10 by a judge.

    ROOT/qa.jsonl    lines of clips: {"clip": ID, "video": "clips/ID.mp4", "qa": [{"q": ..., "a": ...}], ...}
    ROOT/clips/ID.mp4

The layout is that of clips for training (`data.root` of celebvhq). The authors' 2,000 samples are not published. With
more than `limit` questions, `limit` of them are drawn by the seed.
"""

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
from favchat_jax.evaluation.respondents import Ask
from favchat_jax.evaluation.result import Result
from favchat_jax.evaluation.session import Session, present

SOURCE = "write one line per clip with clip, video, and qa, a list of q and a"
LAYOUT = "qa.jsonl and clips/"


def run(config: EvaluationConfig, session: Session) -> Result:
    """Asks the model the questions and scores its answers."""
    root = root_of(config, LAYOUT, SOURCE)
    path = first_of(root, ["qa.jsonl"], "its questions", SOURCE)
    clips = _drawn(_read(path), config.limit, config.seed)
    there = present([(name, root / clip["video"]) for name, clip in clips.items()], session, root)
    asks = [_ask(name, video, clips[name]["qa"], config.questions) for name, video in there]
    replies = session.ask([ask for parts in asks for ask in parts], config.max_new_tokens)
    samples = []
    for (name, _), parts in zip(there, asks, strict=True):
        answers = [answer for ask in parts for answer in replies.get(ask.id, [None] * len(ask.conversations))]
        pairs = zip(clips[name]["qa"], answers, strict=True)
        samples += [
            sample(f"{name} {number}", name, pair["q"], pair["a"], answer)
            for number, (pair, answer) in enumerate(pairs)
            if answer is not None
        ]
    listed = sum(len(clip["qa"]) for clip in clips.values())
    data = described("held-out questions", root, [path], [video for _, video in there], listed)
    rows = published.rows(published.HELD_OUT_QA, "score")
    return captions_result(config, session, samples, {"score": "qa"}, data=data, published=rows)


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


def _ask(name: str, video: Path, pairs: list[dict[str, str]], most: int) -> list[Ask]:
    """Groups a clip's questions into asks of at most `most`; the questions of an ask share the clip's encoding."""
    parts = [pairs[start : start + most] for start in range(0, len(pairs), most)]
    return [
        Ask(f"{name} {number}" if number else name, (Footage(name, video),), tuple(((q["q"], None),) for q in part))
        for number, part in enumerate(parts)
    ]
