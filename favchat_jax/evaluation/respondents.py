"""Adapts the models that can be evaluated: FaVChat from a checkpoint, or any model on an OpenAI-compatible server."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from jaxtyping import UInt8

from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.reasoning import answer_of
from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluation.config import ClientConfig, ServerConfig
from favchat_jax.evaluation.footage import Footage, joined_frames, read_joined
from favchat_jax.generation.sampler import Sampler, Sampling, Turn
from favchat_jax.models.favchat import ClipFeatures
from favchat_jax.openai_client import ChatModel, Completion, NoAnswer, Refused, picture

MODEL_FORM = re.compile(r"openai:(?P<url>https?://[^#\s]+)#(?P<name>\S+)")


@dataclass(frozen=True)
class Ask:
    """A sample's questions about one clip, or about several clips shown one after the other.

    Attributes:
        id: id of the sample.
        clips: the clips.
        conversations: independent conversations; each is a list of turns, the last without an answer (None).
    """

    id: str
    clips: tuple[Footage, ...]
    conversations: tuple[tuple[Turn, ...], ...]


class Unanswered(Exception):
    """Raised or returned for a sample that a model did not answer; it may answer others."""


class Respondent(Protocol):
    """The interface of an evaluated model.

    `identity` has its "name" and further facts for the result, `notes` what a reader of its figures must know.
    `gives_likelihoods` says whether `likelihoods` and `losses` work.
    """

    identity: dict[str, Any]
    gives_likelihoods: bool

    @property
    def notes(self) -> list[str]: ...

    def prepare(self, ask: Ask) -> Any:
        """Returns an ask's frames in the model's format; several threads may call it.

        Raises:
            VideoError: a clip cannot be decoded.
        """

    def without_face(self, ask: Ask) -> list[str] | None:
        """Returns the clips of a prepared ask in which no face was found; None if none was looked for."""

    def answer(
        self, asks: Sequence[Ask], frames: Sequence[Any], max_new_tokens: int
    ) -> Sequence[list[str] | Unanswered]:
        """Returns the answers to each ask's conversations."""

    def likelihoods(self, asks: Sequence[Ask], frames: Sequence[Any], answers: Sequence[str]) -> list[list[float]]:
        """Returns the log-probabilities of the given answers to each ask's only conversation."""

    def losses(self, asks: Sequence[Ask], frames: Sequence[Any]) -> list[list[float]]:
        """Returns -log p of each conversation's last answer, averaged over its tokens, in nats."""


class FaVChat:
    """FaVChat from a checkpoint. Batches are padded to one shape, so that nothing compiles twice.

    Args:
        sampler: the model.
        batch: clips that are answered together.
        questions: most conversations of an ask.
        identity: name of the checkpoint and further facts.
        crop: how the facial encoder's crops are found; None shows it whole frames.
    """

    gives_likelihoods = True

    def __init__(
        self,
        sampler: Sampler,
        batch: int,
        questions: int = 1,
        identity: dict[str, Any] | None = None,
        crop: FaceCrop | None = None,
    ):
        self._sampler, self._batch, self._questions, self._crop = sampler, batch, questions, crop
        self._without_face: set[str] = set()  # names of clips
        self.identity, self.notes = identity or {"name": "a model in memory"}, []

    def prepare(self, ask: Ask) -> UInt8[np.ndarray, "T H W C"]:
        """Returns the ask's frames; several clips have equal shares."""
        clips = read_joined(ask.clips, self._sampler.frames, self._sampler.image_size, self._crop)
        for footage, clip in zip(ask.clips, clips, strict=True):
            if clip.tracks is not None and not clip.tracks.tracks:
                self._without_face.add(footage.name)
        return np.concatenate([clip.frames for clip in clips])

    def without_face(self, ask: Ask) -> list[str] | None:
        """See `Respondent`."""
        return [clip.name for clip in ask.clips if clip.name in self._without_face] if self._crop else None

    def answer(self, asks: Sequence[Ask], frames: Sequence[np.ndarray], max_new_tokens: int) -> list[list[str]]:
        """Returns greedy answers."""
        features, conversations = self._encoded(asks, frames)
        texts = self._sampler.answer(features, conversations, Sampling(max_new_tokens=max_new_tokens))
        return [answers[: len(ask.conversations)] for ask, answers in zip(asks, texts, strict=False)]

    def likelihoods(
        self, asks: Sequence[Ask], frames: Sequence[np.ndarray], answers: Sequence[str]
    ) -> list[list[float]]:
        """Returns the log-probabilities of the answers with their end tokens."""
        features = self._sampler.encode(np.stack(_padded(frames, self._batch)))
        turns = [ask.conversations[0] for ask in _padded(asks, self._batch)]
        return self._sampler.log_likelihoods(features, turns, answers).tolist()[: len(asks)]

    def losses(self, asks: Sequence[Ask], frames: Sequence[np.ndarray]) -> list[list[float]]:
        """Returns -log p of each conversation's last answer with its end, averaged over its tokens, in nats."""
        losses = self._sampler.losses(*self._encoded(asks, frames))
        return [row.tolist()[: len(ask.conversations)] for ask, row in zip(asks, losses, strict=False)]

    def _encoded(self, asks: Sequence[Ask], frames: Sequence[np.ndarray]) -> tuple[ClipFeatures, list[list]]:
        """Encodes a padded batch of clips; returns their features and their padded conversations."""
        conversations = [_padded(ask.conversations, self._questions) for ask in _padded(asks, self._batch)]
        return self._sampler.encode(np.stack(_padded(frames, self._batch))), conversations


class OpenAIServer:
    """A model on an OpenAI-compatible server, which receives the frames as pictures in order.

    Args:
        model: openai:URL#NAME.
        config: section `server` of an evaluation's config.

    Raises:
        UserError: `model` has another form, or the client library is not installed.
    """

    gives_likelihoods = False

    def __init__(self, model: str, config: ServerConfig):
        found = MODEL_FORM.fullmatch(model)
        if found is None:
            raise UserError(
                f"--model={model} is not of the form openai:URL#NAME: write for example "
                "openai:http://localhost:8000/v1#NAME"
            )
        self._config, self._url = config, found["url"]
        self._model = chat_model(self._url, found["name"], config)
        self.identity = {"name": model, "frames": config.frames, "size": config.size}

    @property
    def notes(self) -> list[str]:
        """Remarks on the answers so far, for a reader of the figures."""
        refuses_temperature = "temperature" in self._model.left_out
        return [f"{self.identity['name']} takes no temperature: its answers are drawn"] if refuses_temperature else []

    def prepare(self, ask: Ask) -> list[dict[str, Any]]:
        """Returns the ask's frames as parts of a message."""
        frames = joined_frames(ask.clips, self._config.frames, self._config.size)
        return [picture(_jpeg(frame)) for frame in frames]

    def without_face(self, ask: Ask) -> None:
        """Returns None: servers receive whole frames."""

    def answer(
        self, asks: Sequence[Ask], frames: Sequence[list[dict[str, Any]]], max_new_tokens: int
    ) -> list[list[str] | Unanswered]:
        """Returns answers at temperature 0, or Unanswered for an ask that the model or its server does not answer."""

        def answer_one(ask: Ask, pictures: list[dict[str, Any]]) -> list[str] | Unanswered:
            try:
                return [self._complete(turns, pictures, max_new_tokens) for turns in ask.conversations]
            except Unanswered as error:
                return error

        with ThreadPoolExecutor(self._config.parallel) as pool:
            return list(pool.map(answer_one, asks, frames))

    def likelihoods(self, asks, frames, answers=()):
        """Raises UserError, as `losses` does, since chat servers do not report likelihoods."""
        raise UserError(f"{self.identity['name']} gives no likelihoods: choose --config.method=describe or direct")

    losses = likelihoods

    def _complete(self, turns: Sequence[Turn], frames: list[dict[str, Any]], max_new_tokens: int) -> str:
        messages = []
        for number, (question, answer) in enumerate(turns):
            content = [{"type": "text", "text": question}]
            if number == 0:
                content = frames + content
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        reply = complete(self._model, self._url, messages, max_tokens=max_new_tokens)
        if not answer_of(reply.text):
            problem = reply.problem or "the reply is a thought without an answer"
            hint = f"; its limit is max_new_tokens={max_new_tokens}" if reply.is_cut else ""
            raise Unanswered(problem + hint)
        return reply.text


def _padded(items: Sequence[Any], length: int) -> list[Any]:
    """Returns the items, padded with the first one."""
    return [*items, *[items[0]] * (length - len(items))]


def chat_model(url: str, name: str, config: ClientConfig) -> ChatModel:
    """Returns a model on a server with the config's settings; raises UserError for a malformed address or key."""
    return ChatModel(url, name, config.key_variable, timeout=config.timeout, retries=config.retries)


def complete(model: ChatModel, url: str, messages: list[dict[str, Any]], **options: Any) -> Completion:
    """Returns one chat completion at temperature 0.

    Raises:
        Unanswered: the server refuses this request, or its reply is not a chat completion.
        UserError: the server refuses the key or does not know the model.
        RunError: the server cannot be reached or fails after all retries.
    """
    try:
        reply = model.complete(messages, temperature=0, **options)
    except Refused as error:
        raise Unanswered(f"the server refused the request: {error}") from None
    except NoAnswer as error:
        raise RunError(
            f"{url} does not answer ({error}): all answers so far are kept, run the same command again"
        ) from None
    if not reply.is_chat:
        raise Unanswered(reply.problem)
    return reply


def _jpeg(frame: UInt8[np.ndarray, "H W 3"]) -> bytes:
    _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(frame[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return encoded.tobytes()
