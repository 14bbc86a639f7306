"""The typed config of an evaluation: every field with its unit and range. Files in `configs/eval` give the values."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

from ml_collections import ConfigDict

from favchat_jax.errors import UserError
from favchat_jax.section import Count, CountOrZero, NotNegative, Positive, Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkData(Section):
    """Where a benchmark's clips are stored.

    Attributes:
        root: folder of the published data set; empty for a benchmark that needs none.
        name, packed, split: a data set of `data/sources`, the folder of packed data sets, and the split.
        images: folder of YouTube Faces' frames below `root`.
    """

    root: str = ""
    name: str | None = None
    packed: str | None = None
    split: str | None = None
    images: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientConfig(Section):
    """How requests to an OpenAI-compatible server are made.

    Attributes:
        parallel: simultaneous requests.
        timeout: timeout of a request in seconds.
        retries: how often a failed request is repeated.
        key_variable: environment variable that holds the API key.
    """

    parallel: Count
    timeout: Positive
    retries: CountOrZero
    key_variable: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig(ClientConfig):
    """The server whose model is evaluated.

    Attributes:
        frames: frames sent per clip.
        size: side of a frame in pixels.
    """

    frames: Count
    size: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig(ClientConfig):
    """A language model that scores answers; an empty `model` means no judge.

    Attributes:
        url: URL of its server.
        model: the model's name on the server.
        cache: file that keeps replies, so that no question is paid for twice.
        attempts: how often a question is asked until the reply is the requested JSON.
        json_mode: whether to request JSON from the server; some servers lack this option.
        price_in, price_out: price of a million tokens, for the cost in the result.
    """

    url: str
    model: str
    cache: str
    attempts: Count
    json_mode: bool
    price_in: NotNegative
    price_out: NotNegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """The config of a benchmark. Fields that default to None apply to some benchmarks only.

    Attributes:
        benchmark: name of a module in `evaluation/benchmarks`.
        seed: seed of the intervals and of everything drawn at random.
        batch: clips that are answered together.
        questions: most questions about one clip that are answered together.
        limit: most clips (per fold), pairs or questions; 0 for all.
        max_new_tokens: longest answer in tokens.
        description_tokens: longest description in tokens, for method `describe` and for a describer.
        data: the clips.
        server: settings for --model=openai:URL#NAME.
        judge, second_judge: the second measures how far two judges agree.
        question: question about each clip.
        describe: question before `question` with method `describe`.
        method: how the class is found: from a description, from a direct answer, or as the likeliest name.
        folds: folds of the test set.
        pairs: YouTube Faces' pairs: of segments, or the data set's own splits.
        segment: frames per segment.
    """

    benchmark: str
    seed: CountOrZero
    batch: Count
    questions: Count
    limit: CountOrZero
    max_new_tokens: Count
    description_tokens: Count
    data: BenchmarkData
    server: ServerConfig
    judge: JudgeConfig
    second_judge: JudgeConfig
    question: str | None = None
    describe: str | None = None
    method: Literal["describe", "direct", "likelihood"] | None = None
    folds: tuple[int, ...] | None = None
    pairs: Literal["segments", "splits"] | None = None
    segment: Count | None = None

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
