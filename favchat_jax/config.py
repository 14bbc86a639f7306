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
Finite = Annotated[float, Allowed(math.isfinite, " is not a weight: give a finite number")]
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
    """The general encoder."""

    width: Count  # channels of a token
    depth: Count  # blocks that the published weights have
    layers_run: Count  # blocks that are run, of `depth`
    heads: Count  # of attention
    patch: Count  # pixels a side
    checkpoint_size: Count = 224  # pixels a side that the published positions are for


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceXFormerConfig(Section):
    """The facial encoder, a Swin Transformer."""

    patch: Count  # pixels a side
    width: Count  # channels of the first stage; each later one has twice as many
    depths: tuple[int, ...]  # blocks of each stage
    heads: tuple[int, ...]  # of attention, of each stage
    window: Count  # tokens a side in which attention runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig(Section):
    """Eq. 2 (v1) or CA2 (v2)."""

    heads: Count  # of cross-attention
    residual: bool  # whether a step adds to its query; without, the equation as printed


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormerConfig(Section):
    """Both Q-Formers."""

    width: Count  # channels of a token
    depth: Count  # layers
    heads: Count  # of attention
    mlp: Count  # hidden channels of a layer's MLP
    queries: Count  # learned queries of the published Q-Former
    extra_queries: CountOrZero  # learned queries beside them
    vocabulary: Count  # tokens that the prompt's embedding has
    dropout: ShareBelowOne  # probability
    prompt: bool  # whether they read the question; v2 needs it


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    """The mixture of the two streams."""

    hidden: Count  # channels inside v1's gate and experts, and inside v2's weight adapters and MLPs after the Q-Formers


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Section):
    """Low-rank adapters of the language model."""

    rank: Count  # of A and B; stage 1 has no adapters
    alpha: Positive  # the product A B is scaled by alpha / rank
    dropout: ShareBelowOne  # probability, before A
    targets: tuple[str, ...]  # linear layers that have adapters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Sizes of the model; those of the language model are in its folder."""

    image_size: Count  # pixels a side of a frame
    frames: Count  # of a clip
    dtype: Dtype  # of the computation; weights that train are float32
    # What a layer keeps for the backward pass: all (empty), its input (block), or its products with weights.
    remat: Remat = "block"
    umt: UMTConfig
    no_face_taps: tuple[int, ...]  # blocks of `umt` that stand in for e_1..e_4 in the ablation no_face, counted from 1
    facexformer: FaceXFormerConfig
    fusion: FusionConfig
    qformer: QFormerConfig
    adapter: AdapterConfig
    lora: LoRAConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The clips and how a batch is made of them."""

    name: str  # a data set of `data/sources`, or NAME/SIZE
    root: str = ""  # folder of the published data set; empty if the data set needs no folder
    packed: str  # folder of the packed (ArrayRecord) data sets
    # One frame of each of `frames` equal parts of a clip, at random or the middle one.
    sampling: Literal["rand", "middle"] = "rand"
    random_crop: bool = False  # whether training frames are cropped at random
    flip: bool = False  # whether they are mirrored at random
    keep_features: bool = False  # whether what the frozen encoders make of a clip is kept in the workdir
    questions: Count  # of a clip in a batch, at most
    buckets: Buckets  # lengths in tokens that sequences are padded to, visual tokens included
    prompt_length: Count  # tokens of a question that a Q-Former reads, cut on the left
    workers: CountOrZero  # processes that decode clips; 0 decodes in the run's own

    def __post_init__(self):
        super().__post_init__()
        if self.keep_features and (self.sampling != "middle" or self.random_crop or self.flip):
            raise UserError(
                "keep_features=True needs the same frames of a clip in every epoch: set data.sampling=middle, "
                "data.random_crop=False and data.flip=False besides"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The optimiser and its schedule (FaVChat v1, Section 5.1; the rest is VideoChat2's)."""

    name: Literal["adamw", "muon"]
    learning_rate: Positive  # peak of the schedule
    encoder_rate: NotNegative  # the encoders' rate as a share of it
    b1: ShareBelowOne  # decay of the first moment
    b2: ShareBelowOne  # decay of the second
    weight_decay: NotNegative  # of matrices; biases and norm scales have none
    clip_norm: Positive  # largest global norm of a gradient
    warmup: Share  # share of the run's steps
    floor: Share  # rate at the end of the cosine, as a share of the peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMConfig(Section):
    """The language model."""

    path: str  # its Hugging Face folder
    storage: Storage = "full"  # width in which its frozen kernels lie in memory while training


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig(Section):
    """Where weights come from; parts without a source start afresh."""

    umt: str = ""  # weights folder
    facexformer: str = ""  # weights folder
    qformer: str = ""  # a weights folder, or a workdir whose two Q-Formers are used
    videochat2: str = ""  # weights folder in place of `umt` and `qformer`, with its projection and LoRA
    from_run: str = ""  # workdir of the stage before


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh (`sharding.py`); one of them may be -1: all remaining devices."""

    data: AxisSize = 1
    fsdp: AxisSize = -1
    tensor: AxisSize = 1

    def __post_init__(self):
        super().__post_init__()
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise UserError(f"data={self.data}, mesh.fsdp={self.fsdp}, mesh.tensor={self.tensor}: give -1 in one place")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    """A reward of the reinforcement stage."""

    path: str  # import path MODULE:FUNCTION, which may be one's own
    weight: Finite  # in the sum of all rewards


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig(Section):
    """How samples are judged; symbols of `rl/pool.py`."""

    smoothing: ShareBelowOne = 0.8  # share of the old s in the new one
    tau_remove: float = 0.2  # a sample is discarded at or below this s
    tau_keep: float = 0.8  # a sample cools down above this s
    discovery: CountOrZero = 2  # visits of a sample before it is judged
    rest: CountOrZero = 5  # iterations for which a sample that cools down is not drawn
    published_baseline: float = 0.0  # of the published utility's margin, there a value head that no loss trains


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(Section):
    """Data-Efficient GRPO (FaVChat v2)."""

    group: GroupSize  # G, responses to a sample
    beta: NotNegative  # of the KL penalty
    clip: Positive  # epsilon of the clipped ratio
    updates: Count  # of a batch of responses
    max_new_tokens: Count  # of a response
    temperature: Temperature  # of the draws
    top_p: Probability  # nucleus of the draws
    rewards: Mapping[str, RewardConfig] = dataclasses.field(hash=False)  # by name
    shuffled_frames: bool  # whether responses to frames in another order are drawn too, which the temporal reward needs
    data_efficient: bool  # False for plain GRPO over shuffled epochs
    utility: Literal["scale_free", "published"]  # ours, free of scale, or the published one
    pool: PoolConfig
    split: str  # whose first usable samples make the pool
    samples: CountOrZero  # of the pool; 0 takes all
    heldout_split: str  # that the policy is measured on
    heldout_samples: CountOrZero  # that it is measured on; 0 takes all
    measure_every: Count  # iterations

    def __post_init__(self):
        super().__post_init__()
        if not self.rewards:
            raise UserError("rewards is empty: give at least one, with its path (module:function) and weight")
        for name in self.rewards.keys() & set(MEASURED):
            raise UserError(f"rewards.{name}: a figure measured beside the rewards has this name; rename the reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """One stage of one model."""

    preset: str  # sizes and sources, which `configs/common.py` names
    variant: Variant  # of the model
    ablation: Ablation  # part that the model lacks (Table 6)
    stage: stages.Name  # of training
    seed: CountOrZero  # of all draws but those of the embedded clips
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    llm: LLMConfig
    prompt_tokenizer: str = ""  # tokenizer folder for the Q-Formers' prompt; empty for the language model's
    init: InitConfig
    steps: CountOrZero  # length of the run; 0 takes `epochs`
    epochs: float  # length of the run over the data
    batch: Count  # clips of a step; of the reinforcement stage, samples of an iteration
    accumulate: Count = 1  # parts that a batch is cut into, to save memory
    mesh: MeshConfig = MeshConfig()
    loss_chunk: Count  # positions whose scores over the vocabulary exist at once
    log_every: Count  # steps
    checkpoint_every: Count  # steps
    checkpoints_kept: Count  # the newest ones
    rl: RLConfig | None = None  # of stage grpo
    # How `embedded/` makes stand-ins for published parts; it alone reads this section.
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
        if self.stage == "grpo" and self.reinforcement and self.llm.storage != "full":
            raise UserError(f"llm.storage={self.llm.storage} cannot be answered from, as stage=grpo does: leave it out")
        if self.stage == "grpo" and self.steps < 1:
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
    def reinforcement(self) -> RLConfig:
        """The section `rl`; raises UserError unless it is there."""
        if self.rl is None:
            raise UserError("stage=grpo needs the section rl: take configs/grpo.py")
        return self.rl

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
        if init.get("from_run") is None:  # not set: the default workdir of the stage before
            preset, variant, ablation = (str(fields.get(name)) for name in ("preset", "variant", "ablation"))
            before = stage and stage.before
            init["from_run"] = str(stages.default_workdir(preset, variant, ablation, before)) if before else ""
        return cls.read(fields)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The config of a workdir's config.json.

        Workdirs of other versions load: fields that this version lacks are ignored, missing ones have their default.

        Raises:
            UserError: a value is not allowed, or a field without a default is missing.
        """
        return cls.read(fields, ignore_unknown=True)
