"""Holds FaVChat from a clip and a question to the language model's hidden states (Section 4.1).

    frames --> UMT --------------------------> e_g --> general Q-Former --> linear --+
          |                                     |                                     +--> mixture --> Mistral
          +--> FaceXFormer --> e_1..e_N --> fusion --> facial Q-Former --> linear ----+

v2, prompt-guided at three levels (low: CA2, medium: Q-Formers, high: weight adapters):

    frames --> UMT --------------------------> e_g --> general Q-Former --> MLP --+
          |                                                                        +--> weighted sum --> Mistral
          +--> FaceXFormer --> W_1..W_N --> CA2 --> facial Q-Former --> MLP -------+

Encoders and v1's fusion run once per clip; all parts that read the question run once per question.
"""

import abc
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from favchat_jax.config import ModelConfig
from favchat_jax.models.adapters import GatedMixture, ScalarMixture, TokenMLP, WeightAdapters
from favchat_jax.models.cache import Cache
from favchat_jax.models.facexformer import FaceXFormerEncoder, LinearFuse
from favchat_jax.models.granularity import GranularityFusion, PromptGuidedFusion, add_positions
from favchat_jax.models.kernels.linear import Linear
from favchat_jax.models.mistral import LoRA, Mistral, MistralConfig
from favchat_jax.models.mistral_decoding import DecodingMistral
from favchat_jax.models.qformer import QFormer
from favchat_jax.models.umt import UMT, VISION_LAYERNORM_EPSILON

# Published normalisation of both encoders' input (ImageNet's).
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

Prompt = Int[Array, "B Q P"]  # questions as the Q-Formers read them
PromptMask = Bool[Array, "B Q P"]  # True at word pieces
Mixed = tuple[Float[Array, "B Q N D"], Float[Array, "B Q N 2"]]  # visual tokens, weights of both streams in each


class ClipFeatures(NamedTuple):
    """The features of clips, which serve any question.

    Attributes:
        general: e_g.
        facial: e*_{N+1} in v1, W_1 .. W_N in v2, with the positions of their tokens.
    """

    general: Float[Array, "B S D"]
    facial: tuple[Float[Array, "B _S D"], ...]


class Output(NamedTuple):
    """Final hidden states of every sequence, weights of both streams in each visual token, and the filled cache."""

    hidden: Float[Array, "B Q L D"]
    stream_weights: Float[Array, " B #Q N 2"]
    cache: Cache | None = None


class FaVChat(nn.Module):
    """Base class of both variants: the encoders, one Q-Former per stream, and the language model (see `build`).

    A variant adds `encode`, which runs once per clip, and `visual_tokens`, which runs once per question.

    Attributes:
        umt: general encoder.
        facexformer: facial encoder.
        general_qformer, facial_qformer: one Q-Former per stream.
        general_proj, facial_proj: one linear layer per stream, to the language model's width.
        llm: language model, in its training form or its decoding form.
        ablation: replaced part (Table 6). In `no_face`, blocks of `umt` replace those of `facexformer`; in
            `no_granularity`, FaceXFormer's own fusion replaces `fusion`; in `no_moe`, `adapter` is a `ScalarMixture`.
        dtype: dtype of the computation.
    """

    umt: UMT
    facexformer: FaceXFormerEncoder
    general_qformer: QFormer
    facial_qformer: QFormer
    general_proj: Linear
    facial_proj: Linear
    llm: Mistral | DecodingMistral
    ablation: str
    dtype: DTypeLike

    def setup(self):
        self.vision_layernorm = nn.LayerNorm(VISION_LAYERNORM_EPSILON, dtype=self.dtype, use_fast_variance=False)
        if self.ablation == "no_granularity":
            self.linear_fuse = LinearFuse(dtype=self.dtype)
            self.fuse_proj = Linear(self.umt.width, dtype=self.dtype)

    def encoders(
        self, frames: UInt8[Array, "B T H W C"]
    ) -> tuple[Float[Array, "B T S D"], list[Float[Array, "B T _H _W _D"]]]:
        """Returns e_g of the general encoder, and e_1 .. e_N of the facial encoder's blocks, fine to coarse (Eq. 1).

        Frames of six channels hold the face behind the whole picture. The facial encoder then reads the face.
        """
        batch, time, height = frames.shape[:3]
        x = normalise(frames[..., :3]).astype(self.dtype)
        e_g, blocks = self.umt(x)
        e_g = rearrange(self.vision_layernorm(e_g), "B (T S) D -> B T S D", T=time)
        if self.ablation == "no_face":
            rows = height // self.umt.patch
            return e_g, [rearrange(block, "B (T H W) D -> B T H W D", T=time, H=rows) for block in blocks]
        faces = x if frames.shape[-1] == 3 else normalise(frames[..., 3:]).astype(self.dtype)
        maps = self.facexformer(rearrange(faces, "B T H W C -> (B T) H W C"))
        return e_g, [rearrange(e_i, "(B T) H W D -> B T H W D", B=batch) for e_i in maps]

    def facexformer_fusion(self, e: list[Float[Array, "B T _H _W _D"]]) -> Float[Array, "B T _S D"]:
        """Returns FaceXFormer's own fusion of its blocks, at the width of e_g (`no_granularity`)."""
        fused = self.fuse_proj(self.linear_fuse([rearrange(e_i, "B T H W D -> (B T) H W D") for e_i in e]))
        return rearrange(fused, "(B T) H W D -> B T (H W) D", B=e[0].shape[0])

    @abc.abstractmethod
    def encode(self, frames: UInt8[Array, "B T H W C"]) -> ClipFeatures:
        """Computes the features of clips."""

    @abc.abstractmethod
    def visual_tokens(
        self, features: ClipFeatures, prompt: Prompt, prompt_mask: PromptMask, deterministic: bool = True
    ) -> Mixed:
        """Returns E, and the weights of the general and the facial stream in each token."""

    def embed(self, tokens: Int[Array, "B Q L"], visual: Float[Array, " B #Q N D"]) -> Float[Array, "B Q L D"]:
        """Embeds sequences; the n-th placeholder (a negative id) of a sequence becomes its n-th visual token."""
        visual = jnp.broadcast_to(visual, (*tokens.shape[:2], *visual.shape[2:]))
        return place_visual_tokens(self.llm.embed(tokens), tokens, visual.astype(self.dtype))

    def __call__(
        self,
        clips: UInt8[Array, "B T H W C"] | ClipFeatures,
        tokens: Int[Array, "B Q L"],
        prompt: Int[Array, " B #Q P"],
        prompt_mask: Bool[Array, " B #Q P"],
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> Output:
        """Returns the hidden states of Q right-padded sequences about each of B clips; `logits` makes scores of them.

        Args:
            clips: frames, or their features from `encode`.
            tokens: ids, with a placeholder for each visual token.
            prompt: the questions as the Q-Formers read them, or one question per clip for all its sequences.
            prompt_mask: True at word pieces.
            cache: empty, to be filled for decoding.
            deterministic: no dropout.
        """
        features = clips if isinstance(clips, ClipFeatures) else self.encode(clips)
        visual, stream_weights = self.visual_tokens(features, prompt, prompt_mask, deterministic)
        embeddings = rearrange(self.embed(tokens, visual), "B Q L D -> (B Q) L D")
        if cache is None:
            hidden = self.llm(embeddings, deterministic=deterministic)
        else:
            hidden, cache = cast(Any, self.llm).extend(embeddings, cache)
        if self.is_initializing():
            self.llm.logits(hidden[:, :1])  # creates the output layer's weights
        return Output(rearrange(hidden, "(B Q) L D -> B Q L D", B=tokens.shape[0]), stream_weights, cache)

    def logits(self, hidden: Float[Array, "... D"], deterministic: bool = True) -> Float[Array, "... V"]:
        """Returns scores over the vocabulary."""
        return self.llm.logits(hidden, deterministic)

    def decode(
        self, token: Int[Array, " R"], position: Int[Array, " R"], cache: Cache
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Reads one more token per sequence, at its position; returns the next one's scores and the extended cache."""
        hidden, cache = cast(Any, self.llm).extend(self.llm.embed(token[:, None]), cache, position[:, None])
        return self.llm.logits(hidden[:, 0]), cache


class FaVChatV1(FaVChat):
    """Variant 1, which combines both streams in a gated mixture of experts.

    Attributes:
        fusion: Eq. 2.
        adapter: Eq. 3.
    """

    fusion: GranularityFusion
    adapter: GatedMixture | ScalarMixture

    def encode(self, frames: UInt8[Array, "B T H W C"]) -> ClipFeatures:
        """Returns e_g and e*_{N+1}."""
        e_g, e = self.encoders(frames)  # Eq. 1
        granular = self.ablation != "no_granularity"
        fused = self.fusion(e_g, tokens_of(e)) if granular else self.facexformer_fusion(e)  # Eq. 2
        return ClipFeatures(rearrange(e_g, "B T S D -> B (T S) D"), (add_positions(fused),))

    def visual_tokens(
        self, features: ClipFeatures, prompt: Prompt, prompt_mask: PromptMask, deterministic: bool = True
    ) -> Mixed:
        """Returns E and (w_1, w_2), the weights of the general and the facial stream in each token."""
        (e_fused,) = features.facial
        E_g = self.general_qformer(features.general, prompt, prompt_mask, deterministic=deterministic)
        E_N1 = self.facial_qformer(e_fused, prompt, prompt_mask, deterministic=deterministic)
        return self.adapter(self.general_proj(E_g), self.facial_proj(E_N1))  # Eq. 3


class FaVChatV2(FaVChat):
    """Variant 2, in which the question guides the facial stream (CA2), both Q-Formers, and the streams' weights.

    Attributes:
        fusion: CA2.
        general_mlp, facial_mlp: one MLP per stream, after its linear layer.
        adapter: weight adapters.
    """

    fusion: PromptGuidedFusion
    general_mlp: TokenMLP
    facial_mlp: TokenMLP
    adapter: WeightAdapters | ScalarMixture

    def encode(self, frames: UInt8[Array, "B T H W C"]) -> ClipFeatures:
        """Returns e_g and W_1 .. W_N."""
        e_g, e = self.encoders(frames)
        granular = self.ablation != "no_granularity"
        facial = self.fusion.read_blocks(tokens_of(e)) if granular else (add_positions(self.facexformer_fusion(e)),)
        return ClipFeatures(rearrange(e_g, "B T S D -> B (T S) D"), facial)

    def visual_tokens(
        self, features: ClipFeatures, prompt: Prompt, prompt_mask: PromptMask, deterministic: bool = True
    ) -> Mixed:
        """Returns E and (W_g, W_f), the weights of the general and the facial stream for each question."""
        p_g, p_f = self.general_qformer.embed_prompt(prompt), self.facial_qformer.embed_prompt(prompt)
        facial_mask = None
        if self.ablation == "no_granularity":
            (facial,) = features.facial
        else:
            facial, facial_mask = self.fusion(features.facial, p_f, prompt_mask), prompt_mask  # h_N, one token per word
        E_g = self.general_qformer(features.general, prompt, prompt_mask, deterministic=deterministic)
        E_f = self.facial_qformer(facial, prompt, prompt_mask, visual_mask=facial_mask, deterministic=deterministic)
        return self.adapter(
            self.general_mlp(self.general_proj(E_g)), self.facial_mlp(self.facial_proj(E_f)), (p_g, p_f), prompt_mask
        )


def tokens_of(e: list[Float[Array, "B T _H _W _D"]]) -> list[Float[Array, "B T _S _D"]]:
    """Lays the rows and columns of each map in one sequence."""
    return [rearrange(e_i, "B T H W D -> B T (H W) D") for e_i in e]


def normalise(frames: UInt8[Array, "... H W 3"]) -> Float[Array, "... H W 3"]:
    """Normalises frames as both encoders were trained on them."""
    return (frames.astype(jnp.float32) / 255 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)


def place_visual_tokens(
    embeddings: Float[Array, "*B L D"], tokens: Int[Array, "*B L"], visual: Float[Array, "*B N D"]
) -> Float[Array, "*B L D"]:
    """Replaces the n-th placeholder (a negative id) of each embedded sequence with its n-th visual token."""
    placeholder = tokens < 0
    nth = jnp.clip(jnp.cumsum(placeholder, axis=-1) - 1, 0, visual.shape[-2] - 1)
    return jnp.where(placeholder[..., None], jnp.take_along_axis(visual, nth[..., None], axis=-2), embeddings)


def build(
    model: ModelConfig,
    llm: MistralConfig,
    *,
    variant: str = "v1",
    ablation: str = "none",
    lora_rank: int = 0,
    storage: str = "full",
    decoding: bool = False,
) -> FaVChat:
    """Builds the model that a config's `model` section describes.

    Args:
        model: the section.
        llm: sizes of the language model, from its folder.
        variant: v1 or v2.
        ablation: none, no_face, no_granularity or no_moe (Table 6); for v2 the last two are without CA2 and without
            weight adapters.
        lora_rank: of the language model's adapters; 0 in stage 1.
        storage: width of the language model's frozen kernels (`kernels/quantized.py`).
        decoding: whether the language model is in its decoding form, in which full kernels include the adapters.
    """
    dtype = jnp.dtype(model.dtype)
    common: dict[str, Any] = {"remat": model.remat, "dtype": dtype}
    taps = tuple(model.no_face_taps) if ablation == "no_face" else ()
    adapters = LoRA(lora_rank, model.lora.alpha, model.lora.dropout, tuple(model.lora.targets))
    # Visual tokens start as large as word embeddings. At the size of a Q-Former's normed output they would drown what
    # the language model's layers add to them.
    word_scale = nn.initializers.variance_scaling(1 / llm.hidden_size, "fan_in", "normal")
    language_model: Mistral | DecodingMistral
    if decoding:
        language_model = DecodingMistral(llm, dtype, storage, adapters)
    else:
        language_model = Mistral(llm, adapters, storage=storage, **common)
    shared: dict[str, Any] = {
        "umt": UMT(**vars(model.umt), taps=taps, **common),
        "facexformer": FaceXFormerEncoder(**vars(model.facexformer), **common),
        "general_qformer": QFormer(**vars(model.qformer), **common),
        "facial_qformer": QFormer(**vars(model.qformer), **common),
        "general_proj": Linear(llm.hidden_size, dtype=dtype, kernel_init=word_scale),
        "facial_proj": Linear(llm.hidden_size, dtype=dtype, kernel_init=word_scale),
        "llm": language_model,
        "ablation": ablation,
        "dtype": dtype,
    }
    hidden, fusion = model.adapter.hidden, (model.umt.width, model.fusion.heads, model.fusion.residual, dtype)
    if variant == "v1":
        mixture = ScalarMixture() if ablation == "no_moe" else GatedMixture(hidden, dtype)
        return FaVChatV1(**shared, fusion=GranularityFusion(*fusion), adapter=mixture)
    return FaVChatV2(
        **shared,
        fusion=PromptGuidedFusion(*fusion, blocks=len(taps or model.facexformer.depths)),
        general_mlp=TokenMLP(hidden, dtype),
        facial_mlp=TokenMLP(hidden, dtype),
        adapter=ScalarMixture() if ablation == "no_moe" else WeightAdapters(hidden, dtype),
    )
