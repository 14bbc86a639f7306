"""Models whose answers a test writes, and sessions with them."""

from collections.abc import Callable, Sequence
from typing import Any

from favchat_jax.evaluation.respondents import Ask
from favchat_jax.evaluation.session import Session


class Scripted:
    """Answers what a function makes of an ask's id and its last question; notes the batches that it was asked."""

    def __init__(self, say: Callable[[str, str], str], size: int = 16, name: str = "scripted"):
        self._say, self._size = say, size
        self.identity: dict[str, Any] = {"name": name}
        self.batches: list[list[str]] = []
        self.questions: list[str] = []

    def prepare(self, ask: Ask) -> list[Any]:
        """Decodes the clips, as every model does."""
        return [clip.frames(2, self._size) for clip in ask.clips]

    def answer(self, asks: Sequence[Ask], frames: Sequence[Any], max_new_tokens: int) -> list[list[str]]:
        """What the function says."""
        assert len(asks) == len(frames)
        self.batches.append([ask.id for ask in asks])
        self.questions += [turns[-1][0] for ask in asks for turns in ask.conversations]
        return [[self._say(ask.id, turns[-1][0]) for turns in ask.conversations] for ask in asks]

    def likelihoods(self, asks: Sequence[Ask], frames: Sequence[Any], answers: Sequence[str]) -> list[list[float]]:
        """The likeliest answer is what the function says."""
        return [
            [-float(self._say(ask.id, ask.conversations[0][-1][0]) != answer) for answer in answers] for ask in asks
        ]


def session(model: Any, batch: int = 4, **options: Any) -> Session:
    """A session with a model and no journal."""
    return Session(model, batch=batch, **options)
