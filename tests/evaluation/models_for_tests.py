"""Scripted models for tests, and sessions with them."""

from collections.abc import Callable, Sequence
from typing import Any

from favchat_jax.evaluation.respondents import Ask
from favchat_jax.evaluation.session import Session


class Scripted:
    """A model that answers with `say(id, last question)`, and records its batches and questions."""

    gives_likelihoods = False

    def __init__(self, say: Callable[[str, str], str], size: int = 16, name: str = "scripted"):
        self._say, self._size = say, size
        self.identity: dict[str, Any] = {"name": name}
        self.batches: list[list[str]] = []
        self.questions: list[str] = []

    def prepare(self, ask: Ask) -> list[Any]:
        """Decodes the clips like every model."""
        return [clip.read(2, self._size).frames for clip in ask.clips]

    def without_face(self, ask: Ask) -> None:
        """Returns None, since it looks for no face."""

    def answer(self, asks: Sequence[Ask], frames: Sequence[Any], max_new_tokens: int) -> list[list[str]]:
        """Returns the function's answers."""
        assert len(asks) == len(frames)
        self.batches.append([ask.id for ask in asks])
        self.questions += [turns[-1][0] for ask in asks for turns in ask.conversations]
        return [[self._say(ask.id, turns[-1][0]) for turns in ask.conversations] for ask in asks]

    def likelihoods(self, asks: Sequence[Ask], frames: Sequence[Any], answers: Sequence[str]) -> list[list[float]]:
        """Makes the function's answer the likeliest."""
        return [
            [-float(self._say(ask.id, ask.conversations[0][-1][0]) != answer) for answer in answers] for ask in asks
        ]


def session(model: Any, batch: int = 4, **options: Any) -> Session:
    """Makes a session with a model and no journal."""
    return Session(model, batch=batch, **options)
