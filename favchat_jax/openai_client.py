"""A chat model behind an OpenAI-compatible server: retried with growing pauses, its key shown nowhere.

The guests that ask such servers (corpus, evaluation) share it; the core does not use it.
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
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from favchat_jax.errors import UserError

log = logging.getLogger("favchat_jax")

LARGEST_REPLY = 1 << 20  # bytes; what is asked for is a few thousand
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries, doubled each time; more where the server asks
RETRIED = (408, 409, 425, 429)  # and all from 500
LONGEST_REASON = 200  # characters of an error's message
CUT = {
    "length": "the text was cut off: it is too long",
    "content_filter": "the endpoint's filter withheld the text",
}


class NoAnswer(Exception):
    """A call that got no answer in spite of all retries; nothing was paid."""


class Refused(NoAnswer):
    """A request that the server does not take; it may take others."""


class Stopped(Exception):
    """The run is being stopped: no further call is begun."""


@dataclass(frozen=True)
class Completion:
    """The reply to a call.

    Attributes:
        text: "" if it is missing.
        problem: why the text is missing or incomplete; "" if it is complete.
        is_chat: False where the body is not a chat completion.
        tokens: asked and answered, as the server counts them; None where it does not.
        seconds: that the server took, waits and retries left out.
    """

    text: str
    problem: str
    is_chat: bool
    tokens: tuple[int, int] | None
    seconds: float


class ChatModel:
    """One model of a server; threads may share it.

    Args:
        url: of the server, /v1 included as a rule.
        name: of the model.
        key_variable: the environment variable that holds the key; own servers mostly need none.
        timeout: seconds to wait for a byte.
        retries: further tries of a call without an answer.
        label: names the server in messages, in place of its address.
        calls_per_minute: most calls started per minute, retries included.
        stop: once it is set, no further call is begun.

    Raises:
        UserError: the address or the key cannot be right, or the client library is not installed.
    """

    def __init__(
        self,
        url: str,
        name: str,
        key_variable: str,
        *,
        timeout: float,
        retries: int,
        label: str = "",
        calls_per_minute: float = math.inf,
        stop: threading.Event | None = None,
    ):
        self._name, self._key_variable, self._timeout, self._retries = name, key_variable, timeout, retries
        self._label = label or url
        self._stop = stop or threading.Event()
        self._pace = _Pace(calls_per_minute, self._stop)
        self._key = os.environ.get(key_variable, "").strip()
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{self._label} must be the http:// or https:// address of a server, /v1 included")
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise UserError(f"{key_variable} holds a character that no key has: set it again")
        self._openai = _library()
        try:
            # Retries are made here, where a stop and the pace are known.
            self._client = self._openai.OpenAI(
                base_url=url, api_key=self._key or "none", timeout=timeout, max_retries=0
            )
        except Exception:  # httpx's exceptions, which the client does not export
            raise UserError(f"{self._label} must be an address, which its host or its port is not") from None

    def complete(self, messages: list[dict[str, Any]], call: str = "", **options: Any) -> Completion:
        """The reply to `messages`.

        Args:
            messages: of the conversation.
            call: names the call, so that a gateway charges once for one whose reply was lost on the way.
            options: of the request, such as `max_tokens`.

        Raises:
            NoAnswer, Refused, Stopped: see there.
            UserError: the server refuses the key, the model or the account, so that no call can succeed.
        """
        openai = self._openai
        for retry in range(self._retries + 1):
            self._pace.wait()
            try:
                return self._send(messages, call, options)
            except openai.APIStatusError as error:
                self._check_access(error)
                said = self._shown(error).removeprefix(f"Error code: {error.status_code} - ")
                reason, asked = f"HTTP {error.status_code}: {said}", _retry_after(error)
                if error.status_code < 500 and error.status_code not in RETRIED:
                    raise Refused(reason) from None
            except openai.APITimeoutError:
                reason, asked = f"no byte within {self._timeout:g} s", 0.0
            except (openai.APIConnectionError, OSError) as error:
                reason, asked = f"no connection: {self._shown(error.__cause__ or error)}", 0.0
            if retry < self._retries:
                pause = max(asked, random.uniform(0.5, 1) * min(LONGEST_PAUSE, FIRST_PAUSE * 2**retry))
                log.info("%s; again in %.1f s", reason, pause)
                if self._stop.wait(pause):
                    raise Stopped
        raise NoAnswer(reason)

    def _send(self, messages: list[dict[str, Any]], call: str, options: dict[str, Any]) -> Completion:
        """One request. A reply that arrives is paid for, so a broken one is a reply with a problem."""
        started = time.monotonic()
        body = bytearray()
        request = {"model": self._name, "messages": messages, **options}
        headers = {"Idempotency-Key": call} if call else {}
        completions = self._client.chat.completions.with_streaming_response
        try:
            with completions.create(**request, extra_headers=headers) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > LARGEST_REPLY:
                        break
        except self._openai.OpenAIError:
            raise
        except Exception as error:  # httpx's own, which the client lets through while it reads a body
            raise ConnectionError from error
        return _read(bytes(body), time.monotonic() - started)

    def _check_access(self, error: Any) -> None:
        """Raises UserError where no call can succeed; the server's own words may repeat the key and are left out."""
        status = f"(HTTP {error.status_code})"
        if error.status_code in (401, 403):
            raise UserError(
                f"{self._label} refuses the key {status}: set {self._key_variable} to a valid one"
            ) from None
        if error.status_code == 404:
            raise UserError(
                f"{self._label} has no chat completions with model {self._name!r} {status}: "
                "check the address, which usually ends in /v1, and the model's name"
            ) from None
        if error.code == "insufficient_quota":
            raise UserError(
                f"the account of {self._key_variable} has no credit left: top it up, and the same command goes on"
            ) from None

    def _shown(self, error: BaseException) -> str:
        """An error's message on one short line, without the key."""
        words = getattr(error, "message", None) or str(error) or type(error).__name__
        words = words.replace(self._key, "(key)") if self._key else words
        return " ".join(words.split())[:LONGEST_REASON]


def picture(jpeg: bytes, **options: str) -> dict[str, Any]:
    """The part of a message that shows a JPEG file; `options` such as detail="low"."""
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **options}}


def _library() -> ModuleType:
    try:
        import openai
    except ModuleNotFoundError:
        raise UserError("the package openai is missing: pip install 'favchat_jax[evaluation]'") from None
    return openai


def _read(body: bytes, seconds: float) -> Completion:
    if len(body) > LARGEST_REPLY:
        return Completion("", f"the reply is larger than {LARGEST_REPLY >> 20} MB", False, None, seconds)
    try:
        published = json.loads(body)
        choice = published["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        reason = str(choice.get("finish_reason"))
        text.encode()  # half of a surrogate pair is no text
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Completion("", "the reply is not a chat completion", False, None, seconds)
    return Completion(text, CUT.get(reason, ""), True, _counted(published.get("usage")), seconds)


def _counted(usage: object) -> tuple[int, int] | None:
    """Tokens asked and answered, where the server counts them and the counts can be true."""
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return tuple(counts) if all(isinstance(n, int) and 0 <= n < 2**31 for n in counts) else None


def _retry_after(error: Any) -> float:
    """Seconds that the server asks for; 0 where it gives a date, which hardly any does, or no number above 0."""
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
