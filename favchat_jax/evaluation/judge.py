"""Scores answers with a language model as judge, on an OpenAI-compatible server at temperature 0.

Replies must be JSON of a given form, and are cached in a file. An invalid reply is requested again with the reason. If
no reply is valid, the sample has no judgement and the figures are incomplete. The prompts follow the papers'
descriptions in our own wording. Each result records `PROMPT_VERSION`, which changes whenever a prompt changes.
"""

import dataclasses
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score
from tqdm import tqdm

from favchat_jax.data.reasoning import answer_of
from favchat_jax.evaluation.config import JudgeConfig
from favchat_jax.evaluation.respondents import Unanswered, chat_model, complete

log = logging.getLogger("favchat_jax")

PROMPT_VERSION = "1"
CHARACTERS_PER_TOKEN = 4  # of English text, for the estimate of the cost
REPLY_TOKENS = 20  # of a score and its braces, for the estimate of the cost
Check = Callable[[Any], Any]


class Malformed(Exception):
    """Raised for a reply of another form than requested."""


@dataclasses.dataclass(frozen=True)
class Rubric:
    """A kind of judgement.

    Attributes:
        task: instruction for the judge, with fields in braces.
        form: example of the JSON to reply with.
        check: returns the judgement in a parsed reply; raises Malformed with the reason if it has another form.
    """

    task: str
    form: str
    check: Check


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to the judge.

    Attributes:
        id: id of the judgement.
        rubric: name of one of `RUBRICS`.
        fields: values for the fields of the rubric's task.
        count: required number of verdicts; None for any.
    """

    id: str
    rubric: str
    fields: Mapping[str, str]
    count: int | None = None


def _score(low: int, high: int) -> Check:
    def check(reply: Any) -> float:
        score = reply.get("score") if isinstance(reply, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float) or not low <= score <= high:
            raise Malformed(f'"score" must be a number from {low} to {high}')
        return float(score)

    return check


def _events(reply: Any) -> list[str]:
    events = reply.get("events") if isinstance(reply, dict) else None
    if not isinstance(events, list) or not all(isinstance(event, str) and event.strip() for event in events):
        raise Malformed('"events" must be a list of sentences')
    return events


def _verdicts(reply: Any) -> list[bool]:
    verdicts = reply.get("verdicts") if isinstance(reply, dict) else None
    known = ("entailment", "neutral", "contradiction")
    if not isinstance(verdicts, list) or not all(verdict in known for verdict in verdicts):
        raise Malformed(f'"verdicts" must be a list of {", ".join(known)}')
    return [verdict == "entailment" for verdict in verdicts]


def _aspect(criterion: str) -> Rubric:
    """Returns the rubric that scores a description by one criterion from 0 to 5."""
    task = (
        "Judge a description of a video of a face by a reference description of the same video. "
        f"Judge {criterion} alone.\n"
        "Reference: {reference}\nDescription: {answer}\n"
        "Give a score from 0 (nothing right) to 5 (as good as the reference)."
    )
    return Rubric(task, '{{"score": 3}}', _score(0, 5))


RUBRICS = {
    # VideoChatGPT's four aspects, used by DFEC.
    "correctness": _aspect("whether what it says is correct"),
    "detail": _aspect("how much of the reference's detail it gives, and how precisely"),
    "context": _aspect("whether it understands the situation and the meaning of what is seen"),
    "temporal": _aspect("whether it tells the order and the course of what happens as the reference does"),
    # The two steps of AutoDQ.
    "events": Rubric(
        "List the events in this description of a video: each action, movement or change of expression, and each trait "
        "of a person, as a short sentence of its own that can be checked by itself.\nDescription: {text}",
        '{{"events": ["The man raises his eyebrows."]}}',
        _events,
    ),
    "entailment": Rubric(
        "For each event, in order, say how the description relates to it: entailment (the event follows from it), "
        "contradiction, or neutral (it does not say).\nDescription: {text}\nEvents:\n{events}",
        '{{"verdicts": ["entailment", "neutral"]}}',
        _verdicts,
    ),
    # The two overlaps of EMER.
    "clues": Rubric(
        "Two texts explain what a person in a video feels. Sum up the clues to the person's emotion that each gives, "
        "and score how far those of the answer overlap with those of the reference.\n"
        "Reference: {reference}\nAnswer: {answer}\nGive a score from 0 (no overlap) to 10 (the same clues).",
        '{{"score": 6}}',
        _score(0, 10),
    ),
    "emotions": Rubric(
        "Two texts explain what a person in a video feels. Name the emotional states that each concludes, and score "
        "how far those of the answer overlap with those of the reference.\n"
        "Reference: {reference}\nAnswer: {answer}\nGive a score from 0 (no overlap) to 10 (the same emotions).",
        '{{"score": 6}}',
        _score(0, 10),
    ),
    # The test of the paper's later version.
    "qa": Rubric(
        "Score an answer to a question about a video of a face by the right answer.\nQuestion: {question}\n"
        "Right answer: {reference}\nAnswer: {answer}\n"
        "Give a score from 0 (wrong or no answer) to 10 (says the same, whatever the words).",
        '{{"score": 6}}',
        _score(0, 10),
    ),
}


class Judge:
    """A judge with its cached replies and its token counts.

    Args:
        config: section `judge` of an evaluation's config.
        second: another judge that scores the same answers, to measure the agreement of the two.
    """

    def __init__(self, config: JudgeConfig, second: "Judge | None" = None):
        self._config, self._second = config, second
        self._pairs: list[tuple[float, float]] = []
        self._model = chat_model(config.url, config.model, config)
        self._cache = _Cache(Path(config.cache))
        self._tokens = {"in": 0, "out": 0}

    def ask(self, questions: Sequence[Question], step: str = "judging") -> dict[str, Any]:
        """Returns the judgement of each question by its id, or Unanswered with the reason if the judge gave none.

        Raises:
            RunError: the judge cannot be reached; all its replies are kept.
            UserError: the judge refuses the key or does not know the model.
        """
        self._estimate(questions, step)
        with ThreadPoolExecutor(self._config.parallel) as pool:
            replies = pool.map(self._judge, questions)
            bar = tqdm(replies, total=len(questions), desc=step, mininterval=1, disable=not questions)
            return {question.id: reply for question, reply in zip(questions, bar, strict=True)}

    def scores(self, questions: Sequence[Question], step: str = "judging") -> dict[str, float | Unanswered]:
        """Returns the score of each question by its id. A second judge, if any, scores the same questions."""
        scores = self.ask(questions, step)
        if self._second is not None:
            others = self._second.ask(questions, f"{step} again")
            both = [(scores[question.id], others[question.id]) for question in questions]
            self._pairs += [pair for pair in both if not any(isinstance(score, Unanswered) for score in pair)]
        return scores

    def summary(self) -> dict[str, Any]:
        """Returns the result's entry on the judge: model, prompts, tokens, cost, and agreement with a second judge."""
        summary = {
            "model": self._config.model,
            "url": self._config.url,
            "prompt_version": PROMPT_VERSION,
            "left_out": self._model.left_out,
            "tokens": dict(self._tokens),
            "cost": self._cost(self._tokens["in"], self._tokens["out"]),
        }
        if self._second is not None:
            ours, theirs = zip(*self._pairs, strict=True) if self._pairs else ((), ())
            summary["agreement"] = {"with": self._second.summary(), **agreement(ours, theirs)}
        return summary

    def _judge(self, question: Question) -> Any:
        rubric = RUBRICS[question.rubric]
        messages = [{"role": "user", "content": _prompt(question)}]
        for _ in range(self._config.attempts):
            try:
                text = self._reply(messages)
                judgement = rubric.check(_json_in(text))
                if question.count is not None and len(judgement) != question.count:
                    raise Malformed(f"{len(judgement)} verdicts are there, not {question.count}")
                return judgement
            except Unanswered as error:
                return error
            except Malformed as error:
                reason = str(error)
            messages = [
                *messages,
                {"role": "assistant", "content": text or "(nothing)"},
                {"role": "user", "content": f"That will not do: {reason}. Reply with JSON alone, as asked."},
            ]
        return Unanswered(f"the judge gave no judgement ({reason}): {text[:100]!r}")

    def _reply(self, messages: list[dict[str, Any]]) -> str:
        """Returns the reply to a conversation, from the cache if it is there, and counts its tokens."""
        key = hashlib.sha256(json.dumps([self._config.url, self._config.model, messages]).encode()).hexdigest()
        known = self._cache.get(key)
        if known is None:
            mode = {"response_format": {"type": "json_object"}} if self._config.json_mode else {}
            reply = complete(self._model, self._config.url, messages, **mode)
            tokens_in, tokens_out = reply.tokens or (0, 0)
            known = {"text": reply.text, "in": tokens_in, "out": tokens_out}
            self._cache.add(key, known)
        with self._cache.lock:
            self._tokens["in"] += known["in"]
            self._tokens["out"] += known["out"]
        return known["text"]

    def _estimate(self, questions: Sequence[Question], step: str) -> None:
        """Logs the number of questions, their tokens and the expected cost."""
        tokens = sum(len(_prompt(question)) for question in questions) // CHARACTERS_PER_TOKEN
        cost = self._cost(tokens, REPLY_TOKENS * len(questions))
        price = "" if cost is None else f", about {cost:.2f} in the currency of its prices"
        log.info("%s: %d questions to %s, about %d tokens%s", step, len(questions), self._config.model, tokens, price)

    def _cost(self, tokens_in: int, tokens_out: int) -> float | None:
        prices = self._config.price_in, self._config.price_out
        return (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6 if any(prices) else None


class _Cache:
    """Keeps replies by a hash of the request in a file, one JSON object per line."""

    def __init__(self, path: Path):
        self._path, self.lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["reply"]
            except (ValueError, KeyError):  # a process ended while it wrote this line
                continue

    def get(self, key: str) -> dict[str, Any] | None:
        return self._known.get(key)

    def add(self, key: str, reply: dict[str, Any]) -> None:
        with self.lock, self._path.open("a") as file:
            file.write(f"\n{json.dumps({'key': key, 'reply': reply})}")
            self._known[key] = reply


def agreement(one: Sequence[float], other: Sequence[float]) -> dict[str, float | int | None]:
    """Returns the agreement of two judges: correlation, quadratic kappa and mean distance, or None if undefined."""
    one, other = np.asarray(one, float), np.asarray(other, float)
    varies = len(one) > 1 and one.std() > 0 and other.std() > 0
    return {
        "n": len(one),
        "pearson": float(np.corrcoef(one, other)[0, 1]) if varies else None,
        "kappa": float(cohen_kappa_score(one.round(), other.round(), weights="quadratic")) if varies else None,
        "mean_distance": float(np.abs(one - other).mean()) if len(one) else None,
    }


def _prompt(question: Question) -> str:
    rubric = RUBRICS[question.rubric]
    return f"{rubric.task.format(**question.fields)}\nReply with JSON alone, of this form: {rubric.form.format()}"


def _json_in(text: str) -> Any:
    """Returns the last JSON object in a reply, even after a thought, inside a Markdown fence or between words."""
    text, found, place = answer_of(text), None, 0
    while (place := text.find("{", place)) >= 0:
        try:
            found, place = json.JSONDecoder().raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
    if found is None:
        raise Malformed("the JSON in the reply is broken" if "{" in text else "there is no JSON in the reply")
    return found
