"""An OpenAI-compatible endpoint, asked within limits and never twice for the same.

OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL name it, and nothing of them but the model is written anywhere.
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

FAILURES_IN_ROW = 10  # calls without an answer, all their retries included, after which the endpoint is given up
IMAGE_TOKENS = 85  # what GPT-4o counts for an image of `detail: low`
PARAMETERS = {"max_tokens": 1200}  # every compatible server knows this name; a good answer has at most 600


class OutOfBudget(Exception):
    """One more call could cost more than the limit."""


@dataclass(frozen=True)
class Limits:
    """What a run may use; prices are dollars for a million tokens."""

    concurrency: int = 8
    calls_per_minute: float = 500.0
    spend: float = 10.0  # dollars, of all runs on one corpus folder together; 0 is no limit
    input_price: float = 2.5  # GPT-4o's
    output_price: float = 10.0
    retries: int = 5
    timeout: float = 120.0  # seconds without a byte

    def dollars(self, input_tokens: float, output_tokens: float) -> float:
        """Price of so many tokens."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6


class Endpoint:
    """The endpoint of the environment.

    `ask` may be called from several threads. What it raises as UserError or RunError ends the run: every further call
    would fail in the same way.
    """

    def __init__(self, calls: Calls, limits: Limits, stop: threading.Event):
        self._calls, self._limits, self._stop = calls, limits, stop
        self._budget = _Budget(
            limits, sum(limits.dollars(t.input_tokens, t.output_tokens) for t in calls.totals().values())
        )
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
        """Dollars of all runs on this folder together."""
        return self._budget.spent

    def ask(self, step: str, key: str, system: str, text: str, images: Callable[[], Sequence[bytes]]) -> Reply:
        """The reply to a call, from the file of calls where it was made before; `images` gives JPEG files.

        Raises:
          NoAnswer, Stopped, OutOfBudget: see there.
          UserError: the endpoint refuses the key, the model or the account.
          RunError: the endpoint has not answered several calls in a row.
        """
        # Clips of equal content ask for the same: the second waits for the first's answer.
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
                    f"reason: {error}; what is paid for is kept, and the same command goes on"
                ) from None
            raise
        self._failures = 0
        tokens = reply.tokens or (math.ceil(expected), math.ceil(len(reply.text) / 4))
        return Reply(reply.text, reply.problem, *tokens, reply.seconds)


def model_of_environment() -> str:
    """The model that OPENAI_MODEL names."""
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
    """What is spent and what the calls that are under way may cost at most."""

    def __init__(self, limits: Limits, spent: float):
        self.spent, self._limit, self._reserved = spent, limits.spend or math.inf, 0.0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def reserved(self, dollars: float) -> Iterator[None]:
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
