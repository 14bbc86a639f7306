"""An evaluation's config, typed: every field with its unit and range. The files in `configs/eval` give the values."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

from ml_collections import ConfigDict

from favchat_jax.errors import UserError
from favchat_jax.section import Count, CountOrZero, NotNegative, Positive, Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkData(Section):
    """Where a benchmark's clips lie.

    Attributes:
        root: folder of the data set as it is published; empty for one that needs none.
        name, packed, split: of a data set of `data/sources`, its packed folder and the split.
        images: folder of YouTube Faces' frames, under `root`.
    """

    root: str = ""
    name: str | None = None
    packed: str | None = None
    split: str | None = None
    images: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientConfig(Section):
    """How an OpenAI-compatible server is asked.

    Attributes:
        parallel: requests at a time.
        timeout: of a request, in seconds.
        retries: of a request that failed.
        key_variable: environment variable that holds the key.
    """

    parallel: Count
    timeout: Positive
    retries: CountOrZero
    key_variable: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig(ClientConfig):
    """The server whose model is evaluated.

    Attributes:
        frames: of a clip that it is sent.
        size: pixels a side of a frame.
    """

    frames: Count
    size: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig(ClientConfig):
    """A language model that scores answers; without a `model` there is no judge.

    Attributes:
        url: of its server.
        model: its name there.
        cache: file that keeps replies, so that no question is paid for twice.
        attempts: at a reply that is the JSON asked for.
        json_mode: whether the server is asked for JSON; some know no such option.
        price_in, price_out: of a million tokens, for the cost in the result.
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
    """A benchmark's config. Fields that default to None are of some benchmarks alone.

    Attributes:
        benchmark: its name, one of `evaluation/benchmarks`.
        seed: of intervals and of what is drawn.
        batch: clips that are answered together.
        questions: of a clip that are answered together, at most.
        limit: clips (of a fold), pairs or questions; 0 for all.
        max_new_tokens: of an answer.
        description_tokens: of a description that a class is inferred from, or that a describer gives.
        data: the clips.
        server: for --model=openai:URL#NAME.
        judge, second_judge: the second shows how far two judges agree.
        question: asked about each clip.
        describe: asked before `question`, by the method `describe`.
        method: how a class is found: from a description, asked for directly, or as the likeliest name.
        folds: of the test set.
        pairs: YouTube Faces' pairs of segments, or the data set's own splits.
        segment: frames of a segment.
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
            raise UserError("second_judge.model is set without judge.model: name the first judge too")

    @classmethod
    def from_ml_collections(cls, config: ConfigDict) -> Self:
        """The config that a file of `configs/eval` and the command line give.

        Raises:
            UserError: a value is not allowed, or a field is missing or unknown.
        """
        return cls.read(config.to_dict())

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The config that a result was made with; fields of other versions are ignored."""
        return cls.read(fields, ignore_unknown=True)
