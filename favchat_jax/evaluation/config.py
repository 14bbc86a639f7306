"""Defines the typed config of an evaluation, every field with its unit and range; `configs/eval` has the values."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

from ml_collections import ConfigDict

from favchat_jax.errors import UserError
from favchat_jax.section import Count, CountOrZero, NotNegative, Place, Positive, Section, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkData(Section):
    """Names the place of a benchmark's clips, and says whether their faces are cropped on the way in.

    What is None is as the checkpoint was trained; see `DataConfig` and `FaceConfig`.
    """

    face_crop: bool | None = None
    detector: Literal["centerface", "scrfd"] | None = None
    detector_model: Place | None = None
    smallest_face: Share | None = None
    align_faces: bool | None = None
    root: Place = ""  # folder of the published data set; empty if the benchmark needs no folder
    name: str | None = None  # name of a data set of `data/sources`
    packed: Place | None = None  # folder of packed data sets
    split: str | None = None  # split of the data set
    images: str | None = None  # folder of YouTube Faces' frames, below `root`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientConfig(Section):
    """Holds the settings of requests to an OpenAI-compatible server."""

    parallel: Count  # simultaneous requests
    timeout: Positive  # timeout of a request in seconds
    retries: CountOrZero  # how often a failed request is repeated
    key_variable: str  # environment variable that holds the API key


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig(ClientConfig):
    """Holds the settings of the server whose model is evaluated."""

    frames: Count  # frames sent per clip
    size: Count  # side of a frame in pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig(ClientConfig):
    """Holds the settings of a language model that scores answers; an empty `model` means no judge."""

    url: str  # URL of its server
    model: str  # the model's name on the server
    cache: str  # file that keeps replies, so that no question is paid for twice
    attempts: Count  # how often a question is asked until the reply is the requested JSON
    json_mode: bool  # request JSON from the server; some servers lack this option
    price_in: NotNegative  # price of a million question tokens, for the cost in the result
    price_out: NotNegative  # price of a million reply tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Holds the config of a benchmark. Fields that default to None apply to some benchmarks only."""

    benchmark: str  # name of a module in `evaluation/benchmarks`
    seed: CountOrZero  # seed of the intervals and of random draws
    batch: Count  # clips that are answered together
    questions: Count  # most questions about one clip that are answered together
    limit: CountOrZero  # most clips (per fold), pairs or questions; 0 for all
    max_new_tokens: Count  # longest answer
    description_tokens: Count  # longest description, for method `describe` and for a describer
    data: BenchmarkData  # the clips
    server: ServerConfig  # settings for --model=openai:URL#NAME
    judge: JudgeConfig
    second_judge: JudgeConfig  # measures how far two judges agree
    question: str | None = None  # question about each clip
    describe: str | None = None  # question before `question` with method `describe`
    # How the class is found: from a description, from a direct answer, or as the likeliest name.
    method: Literal["describe", "direct", "likelihood"] | None = None
    folds: tuple[int, ...] | None = None  # folds of the test set
    pairs: Literal["segments", "splits"] | None = (
        None  # YouTube Faces' pairs: of segments, or the data set's own splits
    )
    segment: Count | None = None  # frames per segment

    def __post_init__(self):
        super().__post_init__()
        if self.second_judge.model and not self.judge.model:
            raise UserError("second_judge.model is set but judge.model is not: set the first judge too")

    @classmethod
    def from_ml_collections(cls, config: ConfigDict) -> Self:
        """Reads the config from a file of `configs/eval` with its command-line changes.

        Raises:
            UserError: a value is not allowed, or a field is missing or unknown.
        """
        return cls.read(config.to_dict())

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Reads the config stored in a result; ignores fields of other versions."""
        return cls.read(fields, ignore_unknown=True)
