"""Implements the public API, which `favchat_jax` exports: checkpoints that answer questions about videos."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict, Unpack, overload

import numpy as np
from jaxtyping import Float, UInt8

from favchat_jax.checkpoints.run import Run, load_run
from favchat_jax.data.conversation import ContextError
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError
from favchat_jax.generation.sampler import Sampler, Sampling, Turn
from favchat_jax.models.favchat import ClipFeatures

BATCH = 8  # number of clips, or of questions about one clip, in a batch
DECODERS = 4  # threads that decode a batch


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedClip:
    """A clip that the encoders have read. Pass it instead of a file, and further questions do not run them again.

    Attributes:
        frames: sampled frames, RGB, resized to the model's square input.
        seconds: time of each frame from the start of the video.
        features: the encoders' output, a batch of one.
    """

    frames: UInt8[np.ndarray, "T H W 3"]
    seconds: Float[np.ndarray, " T"]
    features: ClipFeatures


# A path or the bytes of a file that FFmpeg reads (a video, a single image), or the result of `Model.encode`.
Video = str | os.PathLike[str] | bytes | EncodedClip
Turns = Sequence[tuple[str, str]]  # questions with their answers


class Options(TypedDict, total=False):
    """Options of sampling.

    Attributes:
        max_new_tokens: longest answer, in tokens; 64 by default.
        temperature: 0, the default, takes the likeliest token; a higher one divides the scores before a token is drawn.
        top_p: draw among the likeliest tokens whose probabilities add up to this; 1 by default.
        seed: seed of sampled tokens; 0 by default.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def load(checkpoint: str | os.PathLike[str]) -> "Model":
    """Loads a checkpoint that answers questions.

    Args:
        checkpoint: workdir of a stage, or a folder that `tools.export_orbax` wrote.

    Raises:
        UserError: the folder is missing, damaged or of another kind; the message says what to do.
    """
    return Model(load_run(Path(checkpoint).expanduser()))


class Model:
    """A checkpoint that answers questions about videos; make one with `favchat_jax.load`.

    The first call of each method compiles, which takes seconds (embedded model) to minutes (7 B).

    Args:
        run: a loaded run.

    Attributes:
        config: the config that the run was trained with.
        sampler: generates answers for code that builds its own batches.
    """

    def __init__(self, run: Run):
        self.config = run.config
        self.sampler = Sampler(run.parts, run.weights)

    def __repr__(self) -> str:
        config = self.config
        return f"Model(preset={config.preset}, variant={config.variant}, ablation={config.ablation}, {config.stage})"

    @overload
    def answer(self, video: Video, question: str, *, history: Turns = (), **sampling: Unpack[Options]) -> str: ...

    @overload
    def answer(
        self,
        video: Video | Sequence[Video],
        question: str | Sequence[str],
        *,
        history: Turns = (),
        **sampling: Unpack[Options],
    ) -> str | list[str]: ...

    def answer(self, video, question, *, history=(), **sampling):
        """Answers one question about one video, or many at once.

        Args:
            video: one video, or a list.
            question: one question, or a list. One video takes any number of questions. A list of videos takes one
                question for all, or one for each.
            history: earlier questions with their answers.
            sampling: see `Options`.

        Returns:
            The answer to one question about one video; otherwise a list with the answer to each pair.

        Raises:
            UserError: a video cannot be read, a question is empty, a text is longer than the context, or the lists have
                different lengths.
        """
        drawing = Sampling(**sampling)
        if not isinstance(video, list | tuple):
            return self._about_one(video, question, history, drawing)
        questions = [question] * len(video) if isinstance(question, str) else list(question)
        if len(questions) != len(video):
            raise UserError(f"{len(video)} videos and {len(questions)} questions: give one question for each video")
        answers = []
        for pairs in _batches(list(zip(video, questions, strict=True))):
            with ThreadPoolExecutor(DECODERS) as pool:
                frames = list(pool.map(lambda pair: self._frames(pair[0])[0], pairs))
            features = self.sampler.encode(np.stack(_filled(frames, len(video))))
            conversations = [[_asked(history, asked)] for _, asked in _filled(pairs, len(video))]
            said = self.sampler.answer(features, conversations, drawing)
            answers += [texts[0] for texts in said[: len(pairs)]]
        return answers

    def stream(self, video: Video, question: str, *, history: Turns = (), **sampling: Unpack[Options]) -> Iterator[str]:
        """Yields the answer to one question piece by piece; takes the arguments of `answer` and raises its errors."""
        turns = _asked(history, question)
        yield from self.sampler.stream(self.encode(video).features, turns, Sampling(**sampling))

    def dialogue(self, video: Video, **sampling: Unpack[Options]) -> "Dialogue":
        """Starts a conversation about one video, whose answers have the turns before in mind; see `Dialogue`."""
        return Dialogue(self, self.encode(video), **sampling)

    def stream_weights(self, video: Video, question: str) -> tuple[float, float]:
        """Returns the weights of the general and the facial stream, w_1 and w_2 of Eq. 3.

        They are averages over visual tokens in v1, and the question's weights in v2.
        """
        general, facial = self.sampler.stream_weights(self.encode(video).features, [[question]])[0, 0]
        return float(general), float(facial)

    def encode(self, video: Video) -> EncodedClip:
        """Runs the encoders on a video once, for any number of questions.

        Raises:
            UserError: the video cannot be read.
        """
        if isinstance(video, EncodedClip):
            return video
        frames, seconds = self._frames(video)
        return EncodedClip(frames, seconds, self.sampler.encode(frames[None]))

    def _frames(self, video: Video) -> tuple[UInt8[np.ndarray, "T H W 3"], Float[np.ndarray, " T"]]:
        if isinstance(video, EncodedClip):
            return video.frames, video.seconds
        clip = decode(
            video if isinstance(video, bytes) else Path(video), frames=self.sampler.frames, size=self.sampler.image_size
        )
        return clip.frames, clip.seconds

    def _about_one(
        self, video: Video, question: str | Sequence[str], history: Turns, sampling: Sampling
    ) -> str | list[str]:
        questions = [question] if isinstance(question, str) else list(question)
        features, answers = self.encode(video).features, []
        for asked in _batches(questions):
            conversations = [_asked(history, one) for one in _filled(asked, len(questions))]
            answers += self.sampler.answer(features, [conversations], sampling)[0][: len(asked)]
        return answers[0] if isinstance(question, str) else answers


class Dialogue:
    """A conversation about one clip. Each answer has the turns before it in mind, as far as the context reaches.

    Args:
        model: the checkpoint that answers.
        clip: the clip.
        sampling: see `Options`.

    Attributes:
        turns: questions and answers that the next answer has in mind, the oldest first.
    """

    def __init__(self, model: Model, clip: EncodedClip, **sampling: Unpack[Options]):
        self._model, self._clip, self._sampling = model, clip, sampling
        self.turns: list[tuple[str, str]] = []

    def reset(self) -> None:
        """Forgets all turns."""
        self.turns = []

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece. Where the context is full, the oldest turns are forgotten.

        An empty answer does not become a turn.

        Raises:
            UserError: the question is empty, or alone is longer than the context.
        """
        turns = self.turns
        while True:
            try:
                answer = self._model.stream(self._clip, question, history=turns, **self._sampling)
                pieces = [next(answer)]
                break
            except ContextError:
                if not turns:
                    raise
                turns = turns[1:]
        yield pieces[0]
        for piece in answer:
            pieces.append(piece)
            yield piece
        said = "".join(pieces).strip()
        self.turns = turns + ([(question, said)] if said else [])


def _asked(history: Turns, question: str) -> list[Turn]:
    return [*history, (question, None)]


def _batches(items: list) -> Iterator[list]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _filled(batch: list, total: int) -> list:
    """Fills up a batch if there are several, so that all have one shape and compile once."""
    return [*batch, *[batch[-1]] * (BATCH - len(batch))] if total > BATCH else batch
