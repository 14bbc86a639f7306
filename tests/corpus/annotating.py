"""Runs annotate for the tests: against a server on loopback, with limits that do not slow it down."""

import json
from collections import Counter

from favchat_jax.corpus.annotate import annotate
from favchat_jax.corpus.endpoint import Limits
from tests.corpus.chat_server import Answer, good

KEY = "sk-not-to-be-seen"
LIMITS = Limits(concurrency=2, calls_per_minute=60_000, retries=2, timeout=20)


def run(out, limits=LIMITS, attempts=3, backend="openai", dry_run=False) -> None:
    annotate(out, backend, limits, attempts, dry_run)


def unannotated(out) -> dict[str, str]:
    rows = map(json.loads, (out / "unannotated.jsonl").read_text().splitlines())
    return {row["id"]: row["reason"] for row in rows}


def failing(times: int, answer: Answer):
    """Returns a server's behaviour: `answer` for the first `times` requests, good answers after that."""
    return lambda asked, number: answer if number < times else good(asked, number)


def for_step(step: str, answer: Answer, times: int = 10**6):
    """Returns a server's behaviour: `answer` for the first `times` calls of a step, good answers otherwise."""
    seen = Counter()

    def respond(asked, number):
        seen[asked.step] += 1
        return answer if asked.step == step and seen[step] <= times else good(asked, number)

    return respond
