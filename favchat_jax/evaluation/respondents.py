"""Who is evaluated: FaVChat from a checkpoint, or any model behind an OpenAI-compatible server."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from jaxtyping import UInt8

from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluation.config import ClientConfig, ServerConfig
from favchat_jax.evaluation.footage import Footage, beside_each_other
from favchat_jax.generation.sampler import Sampler, Sampling, Turn
from favchat_jax.openai_client import ChatModel, Completion, NoAnswer, Refused, picture

MODEL_FORM = re.compile(r"openai:(?P<url>https?://[^#\s]+)#(?P<name>\S+)")


@dataclass(frozen=True)
class Ask:
    """What is asked about one clip, or about several seen one after the other.

    Attributes:
        id: of the sample.
        clips: what is seen.
        conversations: each a list of turns whose last answer is None.
    """

    id: str
    clips: tuple[Footage, ...]
    conversations: tuple[tuple[Turn, ...], ...]


class Unanswered(Exception):
    """One question that a model did not answer, while others may be."""


class Respondent(Protocol):
    """What evaluations need of a model. `identity` names it and says what else is known of it."""

    identity: dict[str, Any]

    def prepare(self, ask: Ask) -> Any:
        """The frames of an ask as the model wants them; raises VideoError. Called from several threads."""

    def answer(self, asks: Sequence[Ask], frames: Sequence[Any], max_new_tokens: int) -> list[list[str] | Unanswered]:
        """Answers to each ask's conversations."""

    def likelihoods(self, asks: Sequence[Ask], frames: Sequence[Any], answers: Sequence[str]) -> list[list[float]]:
        """Log-probability of each of some answers to each ask's only conversation."""


class FaVChat:
    """A checkpoint. Batches are filled up, so that all have one shape and nothing compiles twice.

    Args:
        sampler: the model.
        batch: clips that are answered together.
        questions: conversations of an ask, at most.
        identity: name of the checkpoint and what is known of it.
    """

    def __init__(self, sampler: Sampler, batch: int, questions: int = 1, identity: dict[str, Any] | None = None):
        self._sampler, self._batch, self._questions = sampler, batch, questions
        self.identity = identity or {"name": "a model in memory"}

    def prepare(self, ask: Ask) -> UInt8[np.ndarray, "T H W 3"]:
        """The ask's frames, those of several clips in equal parts."""
        return beside_each_other(ask.clips, self._sampler.frames, self._sampler.image_size)

    def answer(self, asks: Sequence[Ask], frames: Sequence[np.ndarray], max_new_tokens: int) -> list[list[str]]:
        """Greedy answers."""
        conversations = [self._filled(ask) for ask in self._full(asks)]
        features = self._sampler.encode(np.stack(self._full(frames)))
        texts = self._sampler.answer(features, conversations, Sampling(max_new_tokens=max_new_tokens))
        return [said[: len(ask.conversations)] for ask, said in zip(asks, texts, strict=False)]

    def likelihoods(
        self, asks: Sequence[Ask], frames: Sequence[np.ndarray], answers: Sequence[str]
    ) -> list[list[float]]:
        """Log-probabilities of whole answers, their ends included."""
        features = self._sampler.encode(np.stack(self._full(frames)))
        turns = [ask.conversations[0] for ask in self._full(asks)]
        return self._sampler.log_likelihoods(features, turns, answers).tolist()[: len(asks)]

    def _full(self, items: Sequence[Any]) -> list[Any]:
        return [*items, *[items[0]] * (self._batch - len(items))]

    def _filled(self, ask: Ask) -> list[tuple[Turn, ...]]:
        return [*ask.conversations, *[ask.conversations[0]] * (self._questions - len(ask.conversations))]


class OpenAIServer:
    """A model behind an OpenAI-compatible server, which is sent frames as pictures, in their order.

    Args:
        model: openai:URL#NAME.
        config: section `server`: frames, size (pixels a side), timeout (seconds), retries, parallel, key_variable.

    Raises:
        UserError: `model` has another form, or the client is not installed.
    """

    def __init__(self, model: str, config: ServerConfig):
        found = MODEL_FORM.fullmatch(model)
        if found is None:
            raise UserError(
                f"--model={model} is not of the form openai:URL#NAME, as openai:http://localhost:8000/v1#NAME"
            )
        self._config, self._url = config, found["url"]
        self._model = chat_model(self._url, found["name"], config)
        self.identity = {"name": model, "frames": config.frames, "size": config.size}

    def prepare(self, ask: Ask) -> list[dict[str, Any]]:
        """The ask's frames as parts of a message."""
        return [picture(_jpeg(frame)) for frame in beside_each_other(ask.clips, self._config.frames, self._config.size)]

    def answer(
        self, asks: Sequence[Ask], frames: Sequence[list[dict[str, Any]]], max_new_tokens: int
    ) -> list[list[str] | Unanswered]:
        """Answers at temperature 0; a request that the server refuses leaves its ask without."""
        with ThreadPoolExecutor(self._config.parallel) as pool:
            return list(pool.map(lambda ask, seen: self._answer(ask, seen, max_new_tokens), asks, frames))

    def likelihoods(self, asks, frames, answers):
        """Not what a chat server tells."""
        raise UserError(f"{self.identity['name']} gives no likelihoods: choose --config.method=describe or direct")

    def _answer(self, ask: Ask, frames: list[dict[str, Any]], max_new_tokens: int) -> list[str] | Unanswered:
        try:
            return [self._complete(turns, frames, max_new_tokens) for turns in ask.conversations]
        except Unanswered as error:
            return error

    def _complete(self, turns: Sequence[Turn], frames: list[dict[str, Any]], max_new_tokens: int) -> str:
        messages = []
        for number, (question, answer) in enumerate(turns):
            content = [{"type": "text", "text": question}]
            if number == 0:
                content = frames + content
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return complete(self._model, self._url, messages, max_tokens=max_new_tokens).text.strip()


def chat_model(url: str, name: str, config: ClientConfig) -> ChatModel:
    """A model as a config's section describes its server; raises UserError where the server cannot be asked."""
    return ChatModel(url, name, config.key_variable, timeout=config.timeout, retries=config.retries)


def complete(model: ChatModel, url: str, messages: list[dict[str, Any]], **options: Any) -> Completion:
    """One chat completion at temperature 0.

    Raises:
        Unanswered: the server refuses this request or replies with something else.
        UserError: it knows no such model or key.
        RunError: it cannot be reached, or fails, however often it is tried.
    """
    try:
        reply = model.complete(messages, temperature=0, **options)
    except Refused as error:
        raise Unanswered(f"the server refused the request: {error}") from None
    except NoAnswer as error:
        raise RunError(
            f"{url} does not answer ({error}): what was answered so far is kept, run the same command again"
        ) from None
    if not reply.is_chat:
        raise Unanswered(reply.problem)
    return reply


def _jpeg(frame: UInt8[np.ndarray, "H W 3"]) -> bytes:
    _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(frame[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return encoded.tobytes()
