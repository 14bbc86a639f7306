"""Calls an OpenAI-compatible endpoint within limits; a call with a stored reply is never repeated.

OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL name the endpoint. Only the model's name is written to any file.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from favchat_jax.corpus.calls import Calls, Reply
from favchat_jax.errors import RunError, UserError
from favchat_jax.openai_client import ChatModel, NoAnswer, Stopped, picture

FAILURES_IN_ROW = 10  # consecutive calls without an answer, each with all its retries, that end a run
IMAGE_TOKENS = 85  # GPT-4o's count for an image with `detail: low`
PARAMETERS = {"max_tokens": 1200}  # every compatible server knows this name; a good answer has at most 600


class OutOfBudget(Exception):
    """Raised for a call that could exceed the spending limit."""


@dataclass(frozen=True)
class Limits:
    """Holds the limits of a run, and the prices in dollars per million tokens."""

    concurrency: int = 8  # simultaneous calls
    calls_per_minute: float = 500.0  # including retries
    spend: float = 10.0  # dollars for all runs on one corpus folder; 0 is no limit
    input_price: float = 2.5  # GPT-4o's
    output_price: float = 10.0  # GPT-4o's
    retries: int = 5  # of a call without an answer
    timeout: float = 120.0  # seconds to wait for a byte of an answer

    def dollars(self, input_tokens: float, output_tokens: float) -> float:
        """Returns the price of a number of tokens."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6


class Endpoint:
    """Calls the endpoint that the environment names; threads may share it.

    Args:
        calls: stored replies.
        limits: limits of the run.
        stop: once it is set, no further call starts.

    Raises:
        UserError: a variable of the environment is missing or invalid.
    """

    def __init__(self, calls: Calls, limits: Limits, stop: threading.Event):
        self._calls, self._limits, self._stop = calls, limits, stop
        spent = sum(limits.dollars(total.input_tokens, total.output_tokens) for total in calls.totals().values())
        self._budget = _Budget(limits, spent)
        self._failures = 0
        self._asking: dict[str, threading.Lock] = {}
        _variable("OPENAI_API_KEY")
        self._client = ChatModel(
            _variable("OPENAI_BASE_URL"),
            model_of_environment(),
            "OPENAI_API_KEY",
            timeout=limits.timeout,
            retries=limits.retries,
            label="the endpoint of OPENAI_BASE_URL",
            calls_per_minute=limits.calls_per_minute,
            stop=stop,
        )

    @property
    def spent(self) -> float:
        """Returns the dollars paid by all runs on this folder."""
        return self._budget.spent

    def ask(self, step: str, key: str, system: str, text: str, images: Callable[[], Sequence[bytes]]) -> Reply:
        """Returns the reply to a call, from the stored replies if the call was made before.

        Args:
          step: name of the step, for the statistics.
          key: hash of the request.
          system: system prompt.
          text: text of the request.
          images: returns the request's JPEG files; it is called only for a new request.

        Raises:
          NoAnswer: this call got no answer.
          Stopped: the run is being stopped.
          OutOfBudget: the call could exceed the spending limit.
          UserError: the endpoint refuses the key, the model or the account, so no further call can succeed.
          RunError: the endpoint has not answered several calls in a row.
        """
        # Two clips of equal content make the same request; the second waits for the reply to the first.
        with self._asking.setdefault(key, threading.Lock()):
            reply = self._calls.find(key)
            if reply is None:
                reply = self._pay(step, key, system, text, images)
                self._asking.pop(key, None)
        return reply

    def _pay(self, step: str, key: str, system: str, text: str, images: Callable[[], Sequence[bytes]]) -> Reply:
        if self._stop.is_set():
            raise Stopped
        pictures = images()
        expected = len(system + text) / 4 + IMAGE_TOKENS * len(pictures)
        with self._budget.reserved(self._limits.dollars(expected, PARAMETERS["max_tokens"])):
            reply = self._complete(_messages(system, text, pictures), key, expected)
            self._calls.store(key, step, reply)
            self._budget.spend(self._limits.dollars(reply.input_tokens, reply.output_tokens))
        return reply

    def _complete(self, messages: list[dict], key: str, expected: float) -> Reply:
        try:
            reply = self._client.complete(messages, key, **PARAMETERS)
        except NoAnswer as error:
            self._failures += 1
            if self._failures >= FAILURES_IN_ROW:
                raise RunError(
                    f"the endpoint has left {FAILURES_IN_ROW} calls in a row without an answer, the last for this "
                    f"reason: {error}; all paid replies are kept, and the same command resumes"
                ) from None
            raise
        self._failures = 0
        tokens = reply.tokens or (math.ceil(expected), math.ceil(len(reply.text) / 4))
        return Reply(reply.text, reply.problem, *tokens, reply.seconds)


def model_of_environment() -> str:
    """Returns the name of the model, from OPENAI_MODEL."""
    return _variable("OPENAI_MODEL")


def _variable(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise UserError(
            f"{name} is not set: export OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL, or give --backend=template"
        )
    return value


def _messages(system: str, text: str, pictures: Sequence[bytes]) -> list[dict]:
    content: list[dict] = [{"type": "text", "text": text}]
    content += [picture(jpeg, detail="low") for jpeg in pictures]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


class _Budget:
    """Tracks the dollars spent and the most that calls in progress may cost."""

    def __init__(self, limits: Limits, spent: float):
        self.spent, self._limit, self._reserved = spent, limits.spend or math.inf, 0.0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def reserved(self, dollars: float) -> Iterator[None]:
        """Reserves the most that a call may cost while it is in progress; raises OutOfBudget at the limit."""
        with self._lock:
            if self.spent + self._reserved + dollars > self._limit:
                raise OutOfBudget
            self._reserved += dollars
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= dollars

    def spend(self, dollars: float) -> None:
        with self._lock:
            self.spent += dollars
