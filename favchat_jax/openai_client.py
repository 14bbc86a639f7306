"""Sends requests to a chat model on an OpenAI-compatible server, with retries; no message or file shows the key.

The rooms that call such servers (corpus, evaluation) share it; the core does not use it.
"""

import base64
import contextlib
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Set
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from favchat_jax.errors import UserError

log = logging.getLogger("favchat_jax")

LARGEST_REPLY = 1 << 20  # bytes; a usual reply has a few thousand
FIRST_PAUSE = 1.0  # seconds before the first retry; each further pause is twice as long
LONGEST_PAUSE = 60.0  # seconds; a server may request a longer pause
RETRIED = (408, 409, 425, 429)  # HTTP statuses that are retried, in addition to all from 500 on
LONGEST_REASON = 200  # characters of an error's message
# Options that some models refuse -> the name under which they take them, or None if they do not.
REPLACEMENTS = {"max_tokens": "max_completion_tokens", "temperature": None, "response_format": None}
# Words of an error about what was asked, not about how.
ABOUT_CONTENT = re.compile("image|picture|video|content|context|prompt|polic|safety|length|too long", re.IGNORECASE)
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, where a model's tokens ended within one


class NoAnswer(Exception):
    """Raised for a call that got no answer after all retries; it costs nothing."""


class Refused(NoAnswer):
    """Raised for a request that the server rejects; it may accept others. `option` is the one that it names, or ""."""

    def __init__(self, reason: str, option: str = ""):
        super().__init__(reason)
        self.option = option


class Stopped(Exception):
    """Raised for a call that does not start because the run is being stopped."""


@dataclass(frozen=True)
class Completion:
    """The reply to a call.

    Attributes:
        text: the text; "" if it is missing or withheld.
        problem: why the text is missing or incomplete; "" if it is complete.
        is_cut: whether the tokens ran out.
        is_chat: whether the body is a chat completion.
        tokens: the server's counts of prompt tokens and completion tokens; None without valid counts.
        seconds: time of the request, without pauses and retries.
    """

    text: str
    problem: str
    is_cut: bool
    is_chat: bool
    tokens: tuple[int, int] | None
    seconds: float


class ChatModel:
    """A model on a server; threads may share it.

    Options that the model refuses, such as a temperature, are renamed or left out from then on.

    Args:
        url: address of the server, which usually ends in /v1.
        name: name of the model on the server.
        key_variable: environment variable that holds the key; many local servers need none.
        timeout: seconds to wait for a byte.
        retries: retries of a call without an answer.
        label: name of the server in messages, by default its address.
        calls_per_minute: most calls started per minute, including retries.
        stop: once it is set, no further call starts.

    Raises:
        UserError: the address or the key is malformed, or the client library is not installed.
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
        self._replaced: dict[str, str | None] = {}  # what the model refused, as in `REPLACEMENTS`
        self._has_answered = False
        self._stop = stop or threading.Event()
        self._pace = _Pace(calls_per_minute, self._stop)
        self._key = os.environ.get(key_variable, "").strip()
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{self._label} must be the http:// or https:// address of a server, /v1 included")
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise UserError(f"{key_variable} holds a character that cannot be part of a key: set it again")
        self._openai = _library()
        try:
            # `complete` does the retries, since it respects a stop and the rate limit.
            self._client = self._openai.OpenAI(
                base_url=url, api_key=self._key or "none", timeout=timeout, max_retries=0
            )
        except Exception:  # httpx's exceptions, which the client does not export
            raise UserError(f"{self._label} must be an address: correct its host or its port") from None

    @property
    def left_out(self) -> list[str]:
        """The options that the model refuses and that are not sent, in alphabetical order."""
        return sorted(name for name, other in self._replaced.items() if other is None)

    def complete(self, messages: list[dict[str, Any]], call: str = "", **options: Any) -> Completion:
        """Returns the model's reply to a conversation.

        Args:
            messages: messages of the conversation.
            call: idempotency key, so that a gateway charges only once for a call whose reply was lost.
            options: options of the request, such as `max_tokens`.

        Raises:
            NoAnswer: the call got no answer after all retries.
            Refused: the server rejects this request.
            Stopped: the run is being stopped.
            UserError: the server refuses the key, the model or the account, so no call can succeed.
        """
        replaced, first = dict(self._replaced), None
        while True:
            sent = {taken: x for name, x in options.items() if (taken := replaced.get(name, name)) is not None}
            try:
                reply = self._request(messages, call, sent)
            except Refused as error:
                first = first or error
                refused = self._refused(error, REPLACEMENTS.keys() & options.keys() - replaced.keys())
                if not refused:
                    raise first from None
                replaced |= {name: REPLACEMENTS[name] for name in refused}
            else:
                for name in replaced.keys() - self._replaced.keys():
                    log.warning("%s refuses %s: %s from now on", self._label, name, replaced[name] or "it is left out")
                self._replaced, self._has_answered = self._replaced | replaced, True
                return reply

    def _refused(self, error: Refused, options: Set[str]) -> Set[str]:
        """Returns which of these options an error names; all, if it may mean any of them."""
        named = {name for name in options if name == error.option or name in str(error)}
        is_clear = named or error.option or self._has_answered or ABOUT_CONTENT.search(str(error))
        return named if is_clear else options

    def _request(self, messages: list[dict[str, Any]], call: str, options: dict[str, Any]) -> Completion:
        """Sends a request until it is answered or all retries have failed; errors as in `complete`."""
        openai = self._openai
        for retry in range(self._retries + 1):
            self._pace.wait()
            try:
                return self._send(messages, call, options)
            except openai.APIStatusError as error:
                self._check_access(error)
                message = self._shown(error).removeprefix(f"Error code: {error.status_code} - ")
                reason, requested = f"HTTP {error.status_code}: {message}", _retry_after(error)
                if error.status_code < 500 and error.status_code not in RETRIED:
                    raise Refused(reason, str(error.param or "")) from None
            except openai.APITimeoutError:
                reason, requested = f"no byte within {self._timeout:g} s", 0.0
            except (openai.APIConnectionError, OSError) as error:
                reason, requested = f"no connection: {self._shown(error.__cause__ or error)}", 0.0
            if retry < self._retries:
                pause = max(requested, random.uniform(0.5, 1) * min(LONGEST_PAUSE, FIRST_PAUSE * 2**retry))
                log.info("%s; next try in %.1f s", reason, pause)
                if self._stop.wait(pause):
                    raise Stopped
        raise NoAnswer(reason)

    def _send(self, messages: list[dict[str, Any]], call: str, options: dict[str, Any]) -> Completion:
        """Sends one request. A malformed reply is returned with its problem, since it has been charged."""
        started = time.monotonic()
        body = bytearray()
        request = {"model": self._name, "messages": _whole(messages), **options}
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
        except Exception as error:  # httpx's exceptions, which the client does not convert while it reads a body
            raise ConnectionError from error
        return _read(bytes(body), time.monotonic() - started)

    def _check_access(self, error: Any) -> None:
        """Raises UserError if no call can succeed. It omits the server's own message, which may repeat the key."""
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
                f"the account of {self._key_variable} has no credit left: top it up, then run the same command again"
            ) from None

    def _shown(self, error: BaseException) -> str:
        """Returns an error's message on one short line, without the key."""
        words = getattr(error, "message", None) or str(error) or type(error).__name__
        words = words.replace(self._key, "(key)") if self._key else words
        return " ".join(words.split())[:LONGEST_REASON]


def picture(jpeg: bytes, **options: str) -> dict[str, Any]:
    """Returns the part of a message that shows a JPEG file, with options such as detail="low"."""
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **options}}


def _whole(content: Any) -> Any:
    """Returns the parts of a message with a sign for each half of a character, which UTF-8 cannot hold."""
    if isinstance(content, dict):
        return {name: _whole(part) for name, part in content.items()}
    if isinstance(content, list):
        return [_whole(part) for part in content]
    return SURROGATE.sub("\ufffd", content) if isinstance(content, str) else content


def _library() -> ModuleType:
    try:
        import openai
    except ModuleNotFoundError:
        raise UserError("the package openai is missing: pip install 'favchat_jax[evaluation]'") from None
    return openai


def _read(body: bytes, seconds: float) -> Completion:
    if len(body) > LARGEST_REPLY:
        return Completion("", f"the reply is larger than {LARGEST_REPLY >> 20} MB", False, False, None, seconds)
    try:
        published = json.loads(body)
        choice = published["choices"][0]
        text, refusal = (_text(choice["message"].get(name)) for name in ("content", "refusal"))
        reason = str(choice.get("finish_reason"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Completion("", "the reply is not a chat completion", False, False, None, seconds)
    problem = _problem(text, refusal, reason)
    text = "" if refusal or reason == "content_filter" else _whole(text)
    return Completion(text, problem, reason == "length", True, _token_counts(published.get("usage")), seconds)


def _problem(text: str, refusal: str, reason: str) -> str:
    """Returns why a text is missing or incomplete, or ""; `reason` is the server's finish reason."""
    if refusal:
        return f"the model refuses to answer: {_whole(' '.join(refusal.split()))[:LONGEST_REASON]}"
    if reason == "content_filter":
        return "the endpoint's filter withheld the text"
    if not text:
        return "all tokens went into a thought before the text" if reason == "length" else "the text is empty"
    if reason == "length":
        return "the text was cut off: it is too long"
    return "the text holds half of a character" if SURROGATE.search(text) else ""


def _text(content: Any) -> str:
    """Returns the text of a message, which some servers send in parts; raises TypeError for another form."""
    if isinstance(content, list):
        content = "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    if not isinstance(content, str | None):
        raise TypeError
    return (content or "").strip()


def _token_counts(usage: object) -> tuple[int, int] | None:
    """Returns the server's counts of prompt tokens and completion tokens, or None if a count is missing or invalid."""
    counts = usage if isinstance(usage, dict) else {}
    found = [n for name in ("prompt_tokens", "completion_tokens") if isinstance(n := counts.get(name), int)]
    return (found[0], found[1]) if len(found) == 2 and all(0 <= n < 2**31 for n in found) else None


def _retry_after(error: Any) -> float:
    """Returns the pause in seconds that the server requests, at most 600; 0 for a date or an invalid number."""
    with contextlib.suppress(ValueError):
        seconds = float(error.response.headers.get("retry-after", 0))
        return min(seconds, 600.0) if seconds > 0 else 0.0
    return 0.0


class _Pace:
    """Spaces calls evenly, so that no more than a given number start per minute."""

    def __init__(self, calls_per_minute: float, stop: threading.Event):
        self._gap, self._stop = 60 / calls_per_minute, stop
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Waits for the next free place; raises Stopped once the stop is set."""
        with self._lock:
            now = time.monotonic()
            mine = max(now, self._next)
            self._next = mine + self._gap
        if self._stop.wait(mine - now):
            raise Stopped
