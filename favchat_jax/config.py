"""A run's config, typed: every field with its unit and range, and every refusal of a value.

The files in `configs/` make `ml_collections` dictionaries, whose fields the command line overrides. A front door makes
a `Config` of one; the rest of the package takes a `Config` or a section of it. `configs/common.py` has the values of
each preset and the reasons for them.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from ml_collections import ConfigDict

from favchat_jax import stages
from favchat_jax.errors import UserError
from favchat_jax.section import (
    Allowed,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Section,
    Share,
    ShareBelowOne,
)

Variant = Literal["v1", "v2"]
Ablation = Literal["none", "no_face", "no_granularity", "no_moe"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["", "block", "products"]
Storage = Literal["full", "int8", "int4"]
VARIANTS, ABLATIONS = get_args(Variant), get_args(Ablation)

MEASURED = ("step", "rollouts", "total")  # figures of a held-out line, whose names no reward may have

AxisSize = Annotated[int, Allowed(lambda n: n == -1 or n > 0, ": give a number above 0, or -1 for all that are left")]
GroupSize = Annotated[int, Allowed(lambda n: n > 1, " is too small: a group of one has nothing to compare; give 2")]
Temperature = Annotated[float, Allowed(lambda t: 0 < t < math.inf, " draws equal responses: give a number above 0")]
Probability = Annotated[float, Allowed(lambda p: 0 < p <= 1, " is a probability: give more than 0, at most 1")]
Buckets = Annotated[
    tuple[int, ...],
    Allowed(
        lambda lengths: lengths and lengths[0] > 0 and list(lengths) == sorted(set(lengths)),
        ": give whole numbers above 0 in ascending order, as in (48,128)",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMTConfig(Section):
    """The general encoder.

    Attributes:
        width: channels of a token.
        depth: blocks that the published weights have.
        layers_run: blocks that are run, of `depth`.
        heads: of attention.
        patch: pixels a side.
        checkpoint_size: pixels a side that the published positions are for.
    """

    width: Count
    depth: Count
    layers_run: Count
    heads: Count
    patch: Count
    checkpoint_size: Count = 224


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceXFormerConfig(Section):
    """The facial encoder, a Swin Transformer.

    Attributes:
        patch: pixels a side.
        width: channels of the first stage; each later one has twice as many.
        depths: blocks of each stage.
        heads: of attention, of each stage.
        window: tokens a side in which attention runs.
    """

    patch: Count
    width: Count
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig(Section):
    """Eq. 2 (v1) or CA2 (v2).

    Attributes:
        heads: of cross-attention.
        residual: whether a step adds to its query; without, the equation as printed.
    """

    heads: Count
    residual: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormerConfig(Section):
    """Both Q-Formers.

    Attributes:
        width: channels of a token.
        depth: layers.
        heads: of attention.
        mlp: hidden channels of a layer's MLP.
        queries: learned queries of the published Q-Former.
        extra_queries: learned queries beside them.
        vocabulary: tokens that the prompt's embedding has.
        dropout: probability.
        prompt: whether they read the question; v2 needs it.
    """

    width: Count
    depth: Count
    heads: Count
    mlp: Count
    queries: Count
    extra_queries: CountOrZero
    vocabulary: Count
    dropout: ShareBelowOne
    prompt: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    """The mixture of the two streams.

    Attributes:
        hidden: channels inside v1's gate and experts, and inside v2's weight adapters and MLPs after the Q-Formers.
    """

    hidden: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Section):
    """Low-rank adapters of the language model.

    Attributes:
        rank: of A and B; stage 1 has no adapters.
        alpha: the product A B is scaled by alpha / rank.
        dropout: probability, before A.
        targets: linear layers that have adapters.
    """

    rank: Count
    alpha: Positive
    dropout: ShareBelowOne
    targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Sizes of the model; those of the language model are in its folder.

    Attributes:
        image_size: pixels a side of a frame.
        frames: of a clip.
        dtype: of the computation; weights that train are float32.
        remat: what a layer keeps for the backward pass: all (empty), its input (block), or its products with weights.
        no_face_taps: blocks of `umt` that stand in for e_1..e_4 in the ablation no_face, counted from 1.
    """

    image_size: Count
    frames: Count
    dtype: Dtype
    remat: Remat = "block"
    umt: UMTConfig
    no_face_taps: tuple[int, ...]
    facexformer: FaceXFormerConfig
    fusion: FusionConfig
    qformer: QFormerConfig
    adapter: AdapterConfig
    lora: LoRAConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The clips and how a batch is made of them.

    Attributes:
        name: a data set of `data/sources`, or NAME/SIZE.
        root: folder of the data set as it is published; empty for one that needs none.
        packed: folder of the packed (ArrayRecord) data sets.
        sampling: one frame of each of `frames` equal parts of a clip, at random or the middle one.
        random_crop: whether training frames are cropped at random.
        flip: whether they are mirrored at random.
        keep_features: whether what the frozen encoders make of a clip is kept in the workdir.
        questions: of a clip in a batch, at most.
        buckets: lengths in tokens that sequences are padded to, visual tokens included.
        prompt_length: tokens of a question that a Q-Former reads, cut on the left.
        workers: processes that decode clips; 0 decodes in the run's own.
    """

    name: str
    root: str = ""
    packed: str
    sampling: Literal["rand", "middle"] = "rand"
    random_crop: bool = False
    flip: bool = False
    keep_features: bool = False
    questions: Count
    buckets: Buckets
    prompt_length: Count
    workers: CountOrZero

    def __post_init__(self):
        super().__post_init__()
        if self.keep_features and (self.sampling != "middle" or self.random_crop or self.flip):
            raise UserError(
                "keep_features=True needs the same frames of a clip in every epoch: set data.sampling=middle, "
                "data.random_crop=False and data.flip=False besides"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The optimiser and its schedule (FaVChat v1, Section 5.1; the rest is VideoChat2's).

    Attributes:
        name: of the optimiser.
        learning_rate: peak of the schedule.
        encoder_rate: the encoders' rate as a share of it.
        b1, b2: decay of the moments.
        weight_decay: of matrices; biases and norm scales have none.
        clip_norm: largest global norm of a gradient.
        warmup: share of the run's steps.
        floor: rate at the end of the cosine, as a share of the peak.
    """

    name: Literal["adamw", "muon"]
    learning_rate: Positive
    encoder_rate: NotNegative
    b1: ShareBelowOne
    b2: ShareBelowOne
    weight_decay: NotNegative
    clip_norm: Positive
    warmup: Share
    floor: Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMConfig(Section):
    """The language model.

    Attributes:
        path: its Hugging Face folder.
        storage: width in which its frozen kernels lie in memory while training.
    """

    path: str
    storage: Storage = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig(Section):
    """Where weights come from; parts without a source start afresh.

    Attributes:
        umt, facexformer: weights folders.
        qformer: a weights folder, or a run of which both Q-Formers are taken.
        videochat2: weights folder in place of `umt` and `qformer`, with its projection and LoRA.
        from_run: workdir of the stage before.
    """

    umt: str = ""
    facexformer: str = ""
    qformer: str = ""
    videochat2: str = ""
    from_run: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh (`sharding.py`); one of them may be -1, all that the others leave."""

    data: AxisSize = 1
    fsdp: AxisSize = -1
    tensor: AxisSize = 1

    def __post_init__(self):
        super().__post_init__()
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise UserError(f"data={self.data}, mesh.fsdp={self.fsdp}, mesh.tensor={self.tensor}: give -1 in one place")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    """A reward of the reinforcement stage.

    Attributes:
        path: import path MODULE:FUNCTION, which may be one's own.
        weight: in the sum of all rewards.
    """

    path: str
    weight: Annotated[float, Allowed(math.isfinite, " is not a weight: give a finite number")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig(Section):
    """How samples are judged; symbols of `rl/pool.py`.

    Attributes:
        smoothing: share of the old s in the new one.
        tau_remove, tau_keep: thresholds on s.
        discovery: visits of a sample before it is judged.
        rest: iterations for which a sample that cools down is not drawn.
        published_baseline: of the published utility's margin, there a value head that no loss trains.
    """

    smoothing: ShareBelowOne = 0.8
    tau_remove: float = 0.2
    tau_keep: float = 0.8
    discovery: CountOrZero = 2
    rest: CountOrZero = 5
    published_baseline: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(Section):
    """Data-Efficient GRPO (FaVChat v2).

    Attributes:
        group: G, responses to a sample.
        beta: of the KL penalty.
        clip: epsilon of the clipped ratio.
        updates: of a batch of responses.
        max_new_tokens: of a response.
        temperature, top_p: of the draws.
        rewards: by name.
        shuffled_frames: whether responses to frames in another order are drawn too, which the temporal reward needs.
        data_efficient: False for plain GRPO over shuffled epochs.
        utility: ours, free of scale, or the published one.
        split, samples: the first usable samples of this split make the pool; 0 takes all.
        heldout_split, heldout_samples: what the policy is measured on.
        measure_every: iterations.
    """

    group: GroupSize
    beta: NotNegative
    clip: Positive
    updates: Count
    max_new_tokens: Count
    temperature: Temperature
    top_p: Probability
    rewards: Mapping[str, RewardConfig] = dataclasses.field(hash=False)
    shuffled_frames: bool
    data_efficient: bool
    utility: Literal["scale_free", "published"]
    pool: PoolConfig
    split: str
    samples: CountOrZero
    heldout_split: str
    heldout_samples: CountOrZero
    measure_every: Count

    def __post_init__(self):
        super().__post_init__()
        if not self.rewards:
            raise UserError("rewards is empty: give at least one, with its path (module:function) and weight")
        for name in self.rewards.keys() & set(MEASURED):
            raise UserError(f"rewards.{name}: a figure measured beside the rewards has this name; rename the reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """One stage of one model.

    Attributes:
        preset: sizes and sources, which `configs/common.py` names.
        variant: of the model.
        ablation: part that the model lacks (Table 6).
        stage: of training.
        seed: of all draws but those of the embedded clips.
        prompt_tokenizer: tokenizer folder for the Q-Formers' prompt; empty for the language model's.
        steps: length of the run; 0 takes `epochs`.
        epochs: length of the run over the data.
        batch: clips of a step; of the reinforcement stage, samples of an iteration.
        accumulate: parts that a batch is cut into, to save memory.
        loss_chunk: positions whose scores over the vocabulary exist at once.
        log_every, checkpoint_every: steps.
        checkpoints_kept: the newest ones.
        rl: of stage grpo.
        pretrain: what `embedded/` and the benchmark make stand-ins of; they alone read it.
    """

    preset: str
    variant: Variant
    ablation: Ablation
    stage: stages.Name
    seed: CountOrZero
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    llm: LLMConfig
    prompt_tokenizer: str = ""
    init: InitConfig
    steps: CountOrZero
    epochs: float
    batch: Count
    accumulate: Count = 1
    mesh: MeshConfig = MeshConfig()
    loss_chunk: Count
    log_every: Count
    checkpoint_every: Count
    checkpoints_kept: Count
    rl: RLConfig | None = None
    pretrain: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        super().__post_init__()
        if self.variant == "v2" and not self.model.qformer.prompt:
            raise UserError(
                "model.qformer.prompt=False leaves v2 without the question that guides it: choose variant=v1"
            )
        if self.steps == 0 and not 0 < self.epochs < math.inf:
            raise UserError(f"steps=0 and epochs={self.epochs}: one of them must be a number above 0")
        if self.data.keep_features and not stages.has_fixed_features(self.variant, self.stage):
            raise UserError(f"data.keep_features=True is for stage3 and coldstart, not for {self.stage}: leave it out")
        if self.stage == "grpo":
            self._check_reinforcement()

    def _check_reinforcement(self) -> None:
        if self.rl is None:
            raise UserError("stage=grpo needs the section rl: take configs/grpo.py")
        if self.llm.storage != "full":
            raise UserError(f"llm.storage={self.llm.storage} cannot be answered from, as stage=grpo does: leave it out")
        if self.steps < 1:
            raise UserError("steps=0: stage=grpo has no epochs; give at least 1")

    def require_sources(self) -> None:
        """Raises UserError for a source of weights or data that is not set and that only the embedded preset makes."""
        if not self.llm.path:
            raise UserError("llm.path is not set: name the Hugging Face folder of Mistral with --config.llm.path=DIR")
        if not self.data.root:
            raise UserError(f"data.root is not set: name the folder of {self.data.name} with --config.data.root=DIR")
        if self.stage != "stage1":
            return
        needed = {"umt": not self.init.videochat2, "facexformer": self.ablation != "no_face"}
        for part, is_needed in needed.items():
            if is_needed and not getattr(self.init, part):
                raise UserError(
                    f"init.{part} is not set: convert the published weights with python -m tools.convert_weights "
                    f"--kind={part} --src=FILE --out=DIR, then --config.init.{part}=DIR"
                )
        if self.variant == "v2" and not self.init.qformer:
            raise UserError(
                "init.qformer is not set, but v2 freezes its Q-Formers in stage 1: convert published ones with "
                "python -m tools.convert_weights --kind=qformer --src=FILE --out=DIR, or name a finished run of v1, "
                "then --config.init.qformer=DIR"
            )

    @property
    def lora_rank(self) -> int:
        """Rank of the language model's adapters in this stage; 0 before they start."""
        return self.model.lora.rank if stages.STAGES[self.stage].lora else 0

    @property
    def default_workdir(self) -> Path:
        """Where the stage is trained unless another folder is named."""
        return stages.default_workdir(self.preset, self.variant, self.ablation, self.stage)

    @classmethod
    def from_ml_collections(cls, config: ConfigDict) -> Self:
        """The config that a file of `configs/` and the command line give.

        Raises:
            UserError: a value is not allowed, or a field is missing or unknown.
        """
        fields = config.to_dict()
        stage, init = stages.STAGES.get(fields.get("stage")), fields.get("init", {})
        if stage and init.get("from_run") is None:  # not named: where the stage before lies by default
            kind = [fields[name] for name in ("preset", "variant", "ablation")]
            init["from_run"] = str(stages.default_workdir(*kind, stage.before)) if stage.before else ""
        return cls.read(fields)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The config of a workdir's config.json.

        Workdirs of other versions load: fields that this version lacks are ignored, missing ones have their default.

        Raises:
            UserError: a value is not allowed, or a field without a default is missing.
        """
        return cls.read(fields, ignore_unknown=True)
