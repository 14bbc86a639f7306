"""FaVChat, the whole way from a clip and a question to the language model's hidden states (Section 4.1).

    frames --> UMT --------------------------> e_g --> general Q-Former --> linear --+
          |                                     |                                     +--> mixture --> Mistral
          +--> FaceXFormer --> e_1..e_N --> fusion --> facial Q-Former --> linear ----+

v2, prompt-guided at three levels (low: CA2, medium: Q-Formers, high: weight adapters):

    frames --> UMT --------------------------> e_g --> general Q-Former --> MLP --+
          |                                                                        +--> weighted sum --> Mistral
          +--> FaceXFormer --> W_1..W_N --> CA2 --> facial Q-Former --> MLP -------+

Encoders and v1's fusion run once a clip; everything that reads the question runs once a question.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from favchat_jax.config import ModelConfig
from favchat_jax.models.adapters import GatedMixture, ScalarMixture, TokenMLP, WeightAdapters
from favchat_jax.models.facexformer import FaceXFormerEncoder, LinearFuse
from favchat_jax.models.granularity import GranularityFusion, PromptGuidedFusion, add_positions
from favchat_jax.models.kernels.linear import Linear
from favchat_jax.models.mistral import LayerCache, LoRA, Mistral, MistralConfig
from favchat_jax.models.qformer import QFormer
from favchat_jax.models.umt import UMT, VISION_LAYERNORM_EPSILON

# Published normalisation of both encoders' input (ImageNet's).
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@struct.dataclass
class ClipFeatures:
    """What the encoders make of a clip: all that later parts need of it, whatever the question.

    `facial` is what the facial Q-Former reads or, before CA2, each block's W_i.
    """

    general: Float[Array, "B S D"]
    facial: Float[Array, "B F D"] | tuple[Float[Array, "B F_i D"], ...]


@struct.dataclass
class Output:
    """Final hidden states of every question's sequence, and how much each stream weighs in each visual token."""

    hidden: Float[Array, "B Q L D"]
    stream_weights: Float[Array, "B Q N 2"]


class FaVChat(nn.Module):
    """The model of one variant and ablation; build it with `build`.

    Attributes:
        umt: general encoder.
        facexformer: facial encoder, None in the ablation `no_face`.
        fusion: Eq. 2 (v1) or CA2 (v2), or None in `no_granularity`, where FaceXFormer's own fusion stands in; in
            `no_face` it runs over blocks of the general encoder.
        general_qformer, facial_qformer: one Q-Former a stream.
        general_proj, facial_proj: one linear layer a stream, to the language model's width.
        general_mlp, facial_mlp: what v2 has after them.
        adapter: mixture of the two streams.
        llm: language model.
        dtype: dtype of the computation.
    """

    umt: UMT
    facexformer: FaceXFormerEncoder | None
    fusion: GranularityFusion | PromptGuidedFusion | None
    general_qformer: QFormer
    facial_qformer: QFormer
    general_proj: Linear
    facial_proj: Linear
    general_mlp: TokenMLP | None
    facial_mlp: TokenMLP | None
    adapter: GatedMixture | WeightAdapters | ScalarMixture
    llm: Mistral
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.vision_layernorm = nn.LayerNorm(VISION_LAYERNORM_EPSILON, dtype=self.dtype, use_fast_variance=False)
        if self.fusion is None:
            self.linear_fuse = LinearFuse(dtype=self.dtype)
            self.fuse_proj = Linear(self.umt.width, dtype=self.dtype)

    def encode(self, frames: UInt8[Array, "B T H W 3"]) -> ClipFeatures:
        """Both encoders and v1's fusion, once a clip."""
        batch, time = frames.shape[:2]
        x = (frames.astype(jnp.float32) / 255 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
        x = x.astype(self.dtype)
        general, blocks = self.umt(x)
        general = self.vision_layernorm(general)
        if self.facexformer is None:
            granularities = [rearrange(block, "B (T L) D -> B T L D", T=time) for block in blocks]
        else:
            maps = self.facexformer(rearrange(x, "B T H W C -> (B T) H W C"))
            granularities = [rearrange(m, "(B T) H W D -> B T (H W) D", B=batch) for m in maps]
        if isinstance(self.fusion, PromptGuidedFusion):
            return ClipFeatures(general, self.fusion.read_blocks(granularities))
        if self.fusion is None:
            facial = self.fuse_proj(self.linear_fuse(maps))
            facial = rearrange(facial, "(B T) H W D -> B T (H W) D", B=batch)
        else:
            facial = self.fusion(rearrange(general, "B (T S) D -> B T S D", T=time), granularities)
        return ClipFeatures(general, add_positions(facial))

    def visual_tokens(
        self,
        features: ClipFeatures,
        prompt: Int[Array, "B Q P"],
        prompt_mask: Bool[Array, "B Q P"],
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B Q N D"], Float[Array, "B Q N 2"]]:
        """The tokens that the language model sees for each question, and each stream's weight in them."""
        facial, facial_mask = features.facial, None
        if isinstance(self.fusion, PromptGuidedFusion):
            words = self.facial_qformer.embed_prompt(prompt)
            facial, facial_mask = self.fusion(facial, words, prompt_mask), prompt_mask
        general = self.general_qformer(features.general, prompt, prompt_mask, deterministic=deterministic)
        facial = self.facial_qformer(facial, prompt, prompt_mask, visual_mask=facial_mask, deterministic=deterministic)
        general, facial = self.general_proj(general), self.facial_proj(facial)
        if self.general_mlp is not None:
            general, facial = self.general_mlp(general), self.facial_mlp(facial)
        if not isinstance(self.adapter, WeightAdapters):
            return self.adapter(general, facial)
        prompts = self.general_qformer.embed_prompt(prompt), self.facial_qformer.embed_prompt(prompt)
        return self.adapter(general, facial, prompts, prompt_mask)

    def embed(self, tokens: Int[Array, "B Q L"], visual: Float[Array, "B Q N D"]) -> Float[Array, "B Q L D"]:
        """Embedded sequences; the n-th placeholder (a negative id) of a sequence is its n-th visual token."""
        return place_visual_tokens(self.llm.embed(tokens), tokens, visual.astype(self.dtype))

    def __call__(
        self,
        clips: UInt8[Array, "B T H W 3"] | ClipFeatures,
        tokens: Int[Array, "B Q L"],
        prompt: Int[Array, "B Q P"],
        prompt_mask: Bool[Array, "B Q P"],
        deterministic: bool = True,
    ) -> Output:
        """Hidden states of Q right-padded sequences about each of B clips; `llm.logits` turns them into scores.

        Clips are frames, or what `encode` made of them.
        """
        features = clips if isinstance(clips, ClipFeatures) else self.encode(clips)
        visual, stream_weights = self.visual_tokens(features, prompt, prompt_mask, deterministic)
        embeddings = rearrange(self.embed(tokens, visual), "B Q L D -> (B Q) L D")
        hidden, _ = self.llm(embeddings, deterministic=deterministic)
        if self.is_initializing():
            self.llm.logits(hidden[:, :1])  # creates the output layer's weights
        return Output(rearrange(hidden, "(B Q) L D -> B Q L D", B=tokens.shape[0]), stream_weights)

    def prefill(
        self,
        features: ClipFeatures,
        tokens: Int[Array, "B Q L"],
        prompt: Int[Array, "B Q P"],
        prompt_mask: Bool[Array, "B Q P"],
        last: Int[Array, " B*Q"],
        cache: list[LayerCache],
    ) -> tuple[Float[Array, "B*Q V"], list[LayerCache]]:
        """Reads every prompt into an empty cache; scores of the token after position `last` of each sequence."""
        visual, _ = self.visual_tokens(features, prompt, prompt_mask)
        embeddings = rearrange(self.embed(tokens, visual), "B Q L D -> (B Q) L D")
        hidden, cache = self.llm(embeddings, cache=cache)
        final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self.llm.logits(final), cache

    def log_likelihoods(
        self,
        features: ClipFeatures,
        tokens: Int[Array, "B K L"],
        prompt: Int[Array, "B 1 P"],
        prompt_mask: Bool[Array, "B 1 P"],
        places: Int[Array, "B K A"],
        scored: Bool[Array, "B K A"],
    ) -> Float[Array, "B K"]:
        """Log-probability of K continuations of one conversation about each of B clips.

        `places` says where each continuation's tokens stand in its sequence, `scored` which of those places are taken.
        """
        batch, choices = tokens.shape[:2]
        visual, _ = self.visual_tokens(features, prompt, prompt_mask)
        visual = jnp.broadcast_to(visual, (batch, choices, *visual.shape[2:]))
        hidden, _ = self.llm(rearrange(self.embed(tokens, visual), "B K L D -> (B K) L D"))
        before = rearrange(places - 1, "B K A -> (B K) A 1")
        logits = self.llm.logits(jnp.take_along_axis(hidden, before, axis=1)).astype(jnp.float32)
        said = rearrange(jnp.take_along_axis(tokens, places, axis=2), "B K A -> (B K) A 1")
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), said, axis=2)[..., 0]
        return jnp.where(scored, rearrange(chosen, "(B K) A -> B K A", B=batch), 0.0).sum(-1)

    def decode(
        self, token: Int[Array, " B"], position: Int[Array, " B"], cache: list[LayerCache]
    ) -> tuple[Float[Array, "B V"], list[LayerCache]]:
        """One more token a sequence, at its position: scores of the next, and the cache with this one in it."""
        hidden, cache = self.llm(self.llm.embed(token[:, None]), positions=position[:, None], cache=cache)
        return self.llm.logits(hidden[:, 0]), cache


def place_visual_tokens(
    embeddings: Float[Array, "*B L D"], tokens: Int[Array, "*B L"], visual: Float[Array, "*B N D"]
) -> Float[Array, "*B L D"]:
    """Embedded sequences with the n-th visual token in the place of each one's n-th placeholder (a negative id)."""
    placeholder = tokens < 0
    nth = jnp.clip(jnp.cumsum(placeholder, axis=-1) - 1, 0, visual.shape[-2] - 1)
    return jnp.where(placeholder[..., None], jnp.take_along_axis(visual, nth[..., None], axis=-2), embeddings)


def build(
    model: ModelConfig,
    llm: MistralConfig,
    *,
    variant: str = "v1",
    ablation: str = "none",
    lora_rank: int,
    scan: bool = True,
) -> FaVChat:
    """The model that a config's `model` section describes.

    Args:
        model: the section.
        llm: sizes of the language model, from its folder.
        variant: v1 or v2.
        ablation: none, no_face, no_granularity or no_moe (Table 6); for v2 the last two are without CA2 and without
            weight adapters.
        lora_rank: 0 in stage 1, which has no adapters.
        scan: False for decoding.
    """
    dtype = jnp.dtype(model.dtype)
    taps = tuple(model.no_face_taps) if ablation == "no_face" else ()
    qformer = dict(vars(model.qformer), remat=model.remat, dtype=dtype)
    # Visual tokens start as large as word embeddings. At the size of a Q-Former's normed output they would drown what
    # the language model's layers add to them.
    word_scale = nn.initializers.variance_scaling(1 / llm.hidden_size, "fan_in", "normal")
    return FaVChat(
        umt=UMT(**vars(model.umt), taps=taps, remat=model.remat, dtype=dtype),
        facexformer=None
        if ablation == "no_face"
        else FaceXFormerEncoder(**vars(model.facexformer), remat=model.remat, dtype=dtype),
        fusion=_fusion(model, variant, ablation, dtype),
        general_qformer=QFormer(**qformer),
        facial_qformer=QFormer(**qformer),
        general_proj=Linear(llm.hidden_size, dtype=dtype, kernel_init=word_scale),
        facial_proj=Linear(llm.hidden_size, dtype=dtype, kernel_init=word_scale),
        general_mlp=TokenMLP(model.adapter.hidden, dtype) if variant == "v2" else None,
        facial_mlp=TokenMLP(model.adapter.hidden, dtype) if variant == "v2" else None,
        adapter=_adapter(model, variant, ablation, dtype),
        llm=Mistral(
            llm,
            LoRA(lora_rank, model.lora.alpha, model.lora.dropout, tuple(model.lora.targets)),
            dtype=dtype,
            scan=scan,
            remat=model.remat,
        ),
        dtype=dtype,
    )


def _fusion(model: ModelConfig, variant: str, ablation: str, dtype: jnp.dtype):
    if ablation == "no_granularity":
        return None
    if variant == "v1":
        return GranularityFusion(model.umt.width, dtype=dtype, **vars(model.fusion))
    blocks = len(model.no_face_taps) if ablation == "no_face" else len(model.facexformer.depths)
    return PromptGuidedFusion(blocks, model.umt.width, dtype=dtype, **vars(model.fusion))


def _adapter(model: ModelConfig, variant: str, ablation: str, dtype: jnp.dtype):
    if ablation == "no_moe":
        return ScalarMixture()
    return (GatedMixture if variant == "v1" else WeightAdapters)(model.adapter.hidden, dtype=dtype)
