"""Evaluates DFEC (Zhao et al., 2025): descriptions of dynamic facial expressions (Table 1).

    ROOT/test.json    a list of {"id": "0", "video": "DFEW/videos/2961.mp4", "caption": "..."}
    ROOT/DFEW/videos/2961.mp4 ...    the clips that it names, copied from their original data sets

CIDEr and ROUGE-L need only the captions; correctness, detail, context, temporal (0 to 5) and AutoDQ need a judge.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from favchat_jax.errors import UserError
from favchat_jax.evaluation import published
from favchat_jax.evaluation.captions import captions_result, note_score, sample, unjudged_note
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.footage import Footage
from favchat_jax.evaluation.judge import Judge, Question
from favchat_jax.evaluation.layout import described, first_of, root_of
from favchat_jax.evaluation.metrics import event_figures
from favchat_jax.evaluation.respondents import Ask, Unanswered
from favchat_jax.evaluation.result import Figure, Result
from favchat_jax.evaluation.session import Session, present

SOURCE = "test.json is at https://github.com/Jiaxing-star/FacialDynamic, which says where its clips come from"
LAYOUT = "test.json and the clips that it names"
ASPECTS = ("correctness", "detail", "context", "temporal")


def run(config: EvaluationConfig, session: Session) -> Result:
    """Asks the model to describe each clip, and scores the descriptions."""
    root = root_of(config, LAYOUT, SOURCE)
    path = first_of(root, ["test.json"], "its captions", SOURCE)
    listed = _read(path)[: config.limit or None]
    there = present([(row["id"], root / row["video"]) for row in listed], session, root)
    asks = [Ask(id, (Footage(id, clip),), (((config.question, None),),)) for id, clip in there]
    answers = session.ask(asks, config.max_new_tokens, "describing")
    samples = [
        sample(row["id"], row["id"], config.question, row["caption"], answers[row["id"]][0])
        for row in listed
        if row["id"] in answers
    ]
    return captions_result(
        config,
        session,
        samples,
        {name: name for name in ASPECTS},
        lambda judge: _event_figures(judge, samples, config.seed),
        data=described("DFEC", root, [path], [clip for _, clip in there], len(listed)),
        published=published.rows(published.DFEC, *ASPECTS, "cider", "rouge_l", "autodq"),
    )


def _read(path: Path) -> list[dict[str, str]]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again") from None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path} is not a list of captions: copy it again")
    for number, row in enumerate(listed):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("id", "video", "caption")):
            raise UserError(f"{path}, entry {number}: id, video and caption must be text: copy the file again")
    repeated = [id for id, count in collections.Counter(row["id"] for row in listed).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: id {repeated[0]!r} occurs twice: copy the file again")
    return listed


def _event_figures(judge: Judge, samples: Sequence[dict[str, Any]], seed: int) -> tuple[dict[str, Figure], list[str]]:
    """Computes AutoDQ: the judge lists the events of both texts and says which follow from the other text."""
    texts = {(row["id"], side): row[side] for row in samples for side in ("expected", "answer")}
    found = _events(judge, texts)
    other = {"expected": "answer", "answer": "expected"}
    asked = [
        Question(
            f"{id} {side}",
            "entailment",
            {"text": texts[id, other[side]] or "(nothing)", "events": _listed(events)},
            len(events),
        )
        for (id, side), events in found.items()
        if events and not isinstance(events, Unanswered)
    ]
    verdicts = judge.ask(asked, "judging events")
    recalled, supported = [], []  # events of the reference in the answer, and of the answer in the reference
    for row in samples:
        sides = [_verdicts(found[row["id"], side], verdicts.get(f"{row['id']} {side}")) for side in other]
        if any(isinstance(side, Unanswered) for side in sides):
            note_score(row, "autodq", next(side for side in sides if isinstance(side, Unanswered)))
            continue
        row["events"] = {side: _paired(found[row["id"], side], kept) for side, kept in zip(other, sides, strict=True)}
        recalled.append(sides[0])
        supported.append(sides[1])
    return event_figures(recalled, supported, seed), unjudged_note("autodq", len(samples) - len(recalled))


def _events(judge: Judge, texts: Mapping[tuple[str, str], str]) -> dict[tuple[str, str], list[str] | Unanswered]:
    asked = [Question(" ".join(key), "events", {"text": text}) for key, text in texts.items() if text]
    found = judge.ask(asked, "finding events")
    return {key: found.get(" ".join(key), []) for key in texts}


def _verdicts(events: list[str] | Unanswered, verdicts: list[bool] | Unanswered | None) -> list[bool] | Unanswered:
    return events if isinstance(events, Unanswered) else verdicts if events else []


def _paired(events: list[str], verdicts: list[bool]) -> list[dict[str, Any]]:
    return [{"event": event, "follows": follows} for event, follows in zip(events, verdicts, strict=True)]


def _listed(events: Sequence[str]) -> str:
    return "\n".join(f"{number}. {event}" for number, event in enumerate(events, 1))
