"""An OpenAI-compatible endpoint, asked within limits and never twice for the same.

OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL name it, and nothing of them but the model is written anywhere.
"""

import base64
import contextlib
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import openai

from favchat_jax.corpus.calls import Calls, Reply
from favchat_jax.errors import RunError, UserError

log = logging.getLogger("favchat_jax")

LARGEST_REPLY = 1 << 20  # bytes; what is asked for is a few thousand
FAILURES_IN_ROW = 10  # calls without an answer, all their retries included, after which the endpoint is given up
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries, doubled each time; more where the endpoint asks
IMAGE_TOKENS = 85  # what GPT-4o counts for an image of `detail: low`
PARAMETERS = {"max_tokens": 1200}  # every compatible server knows this name; a good answer has at most 600
RETRIED = (408, 409, 425, 429)  # and all from 500


class NoAnswer(Exception):
    """A call that got no answer in spite of all retries, or that the endpoint refuses; nothing was paid."""


class Stopped(Exception):
    """The run is being stopped: no further call is begun."""


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
        self._model = model_of_environment()
        self._calls, self._limits, self._stop = calls, limits, stop
        self._budget = _Budget(
            limits, sum(limits.dollars(t.input_tokens, t.output_tokens) for t in calls.totals().values())
        )
        self._pace = _Pace(limits.calls_per_minute, stop)
        self._failures = 0
        self._asking: dict[str, threading.Lock] = {}
        url, self._key = _variable("OPENAI_BASE_URL"), _variable("OPENAI_API_KEY")
        if not url.startswith(("http://", "https://")):
            raise UserError("OPENAI_BASE_URL must be the http:// or https:// address of an endpoint, /v1 included")
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise UserError("OPENAI_API_KEY holds a character that no key has: set it again")
        # Retries are made here, where a stop, the pace and the limits are known.
        try:
            self._client = openai.OpenAI(base_url=url, api_key=self._key, timeout=limits.timeout, max_retries=0)
        except Exception:  # httpx's own, of which the client exports none
            raise UserError("OPENAI_BASE_URL must be an address, which its host or its port is not") from None

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
            reply = self._retried(_messages(system, text, pictures), key, expected)
            self._calls.store(key, step, reply)
            self._budget.spend(self._limits.dollars(reply.input_tokens, reply.output_tokens))
        return reply

    def _retried(self, messages: list[dict], key: str, expected: float) -> Reply:
        for retry in range(self._limits.retries + 1):
            self._pace.wait()
            try:
                reply = self._send(messages, key, expected)
            except openai.APIStatusError as error:
                self._check_refusal(error)
                reason, asked = f"HTTP {error.status_code}: {self._shown(error)}", _retry_after(error)
                if error.status_code < 500 and error.status_code not in RETRIED:
                    break
            except openai.APITimeoutError:
                reason, asked = f"no byte within {self._limits.timeout:g} s", 0.0
            except (openai.APIConnectionError, OSError) as error:
                reason, asked = f"no connection: {self._shown(error.__cause__ or error)}", 0.0
            else:
                self._failures = 0
                return reply
            if retry < self._limits.retries:
                pause = max(asked, random.uniform(0.5, 1) * min(LONGEST_PAUSE, FIRST_PAUSE * 2**retry))
                log.info("%s; again in %.1f s", reason, pause)
                if self._stop.wait(pause):
                    raise Stopped
        self._failures += 1
        if self._failures >= FAILURES_IN_ROW:
            raise RunError(
                f"the endpoint has left {FAILURES_IN_ROW} calls in a row without an answer, the last for this reason: "
                f"{reason}; what is paid for is kept, and the same command goes on"
            )
        raise NoAnswer(reason)

    def _send(self, messages: list[dict], key: str, expected: float) -> Reply:
        """One request. A reply that arrives is paid for, so a broken one is a reply with a problem."""
        started = time.monotonic()
        request = {"model": self._model, "messages": messages, **PARAMETERS}
        # A gateway that knows this header charges once for a call whose reply was lost on the way.
        headers = {"Idempotency-Key": key}
        body = bytearray()
        completions = self._client.chat.completions.with_streaming_response
        try:
            with completions.create(**request, extra_headers=headers) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > LARGEST_REPLY:
                        break
        except openai.OpenAIError:
            raise
        except Exception as error:  # httpx's own, which the client lets through while it reads a body
            raise ConnectionError from error
        text, problem, used = _read(bytes(body))
        tokens = used or (math.ceil(expected), math.ceil(len(text) / 4))
        return Reply(text, problem, *tokens, time.monotonic() - started)

    def _check_refusal(self, error: openai.APIStatusError) -> None:
        """Raises UserError where no call can succeed; the endpoint's own words may repeat the key and are left out."""
        if error.status_code in (401, 403):
            raise UserError(
                f"the endpoint refuses the key (HTTP {error.status_code}): set OPENAI_API_KEY to a valid one"
            ) from None
        if error.status_code == 404:
            raise UserError(
                f"the endpoint has no chat completions with model {self._model!r} (HTTP 404): "
                "check OPENAI_BASE_URL, which ends in /v1 as a rule, and OPENAI_MODEL"
            ) from None
        if error.code == "insufficient_quota":
            raise UserError("the account of OPENAI_API_KEY has no credit left: top it up, and the same command goes on")

    def _shown(self, error: BaseException) -> str:
        """An error's words on one short line, without the key."""
        words = getattr(error, "message", None) or str(error) or type(error).__name__
        return " ".join(words.replace(self._key, "(key)").split())[:200]


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
    for picture in pictures:
        url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url, "detail": "low"}})
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def _read(body: bytes) -> tuple[str, str, tuple[int, int] | None]:
    """Text, problem and tokens of a response."""
    if len(body) > LARGEST_REPLY:
        return "", f"the reply is larger than {LARGEST_REPLY >> 20} MB", None
    try:
        published = json.loads(body)
        choice = published["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        reason = str(choice.get("finish_reason"))
        text.encode()  # half of a surrogate pair is no text
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return "", "the reply is not a chat completion", None
    cut = {
        "length": "the text was cut off: it is too long",
        "content_filter": "the endpoint's filter withheld the text",
    }
    return text, cut.get(reason, ""), _counted(published.get("usage"))


def _counted(usage: object) -> tuple[int, int] | None:
    """Tokens asked and answered, where the endpoint counts them and the counts can be true."""
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return tuple(counts) if all(isinstance(n, int) and 0 <= n < 2**31 for n in counts) else None


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds that the endpoint asks for; 0 where it gives a date, which hardly any does, or no number above 0."""
    with contextlib.suppress(ValueError):
        asked = float(error.response.headers.get("retry-after", 0))
        return min(asked, 600.0) if asked > 0 else 0.0
    return 0.0


class _Pace:
    """Lets one call through after the other, no faster than so many a minute."""

    def __init__(self, calls_per_minute: float, stop: threading.Event):
        self._gap, self._stop = 60 / calls_per_minute, stop
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            mine = max(now, self._next)
            self._next = mine + self._gap
        if self._stop.wait(mine - now):
            raise Stopped


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
