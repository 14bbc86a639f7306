"""The section `pretrain` of a config: sizes and training of the embedded preset's stand-ins for published parts."""

from dataclasses import dataclass
from typing import Self

from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.section import Count, Positive, Section


@dataclass(frozen=True, kw_only=True)
class LanguageModelSizes(Section):
    """Sizes of a small Mistral.

    Attributes:
        width: channels of a token.
        layers: number of layers.
        heads, kv_heads: attention heads; groups of heads share keys and values.
        mlp: hidden channels of a layer's MLP.
        vocabulary: number of tokens.
    """

    width: Count
    layers: Count
    heads: Count
    kv_heads: Count
    mlp: Count
    vocabulary: Count


@dataclass(frozen=True, kw_only=True)
class Pretrain(Section):
    """The stand-ins' sizes and training.

    Attributes:
        llm: sizes of the language model.
        llm_steps: batches of 16 texts.
        facial_steps: batches of 128 single frames.
        general_steps: batches of 32 clips.
        stills: faces drawn for the facial encoder in addition to those of the clips.
        general_clips: clips without a face, drawn for the general encoder.
        learning_rate: Muon's peak learning rate.
    """

    llm: LanguageModelSizes
    llm_steps: Count
    facial_steps: Count
    general_steps: Count
    stills: Count
    general_clips: Count
    learning_rate: Positive

    @classmethod
    def of(cls, config: Config) -> Self:
        """Reads the section of a config; raises UserError for a value that is not allowed."""
        try:
            return cls.read(config.pretrain or {})
        except UserError as error:
            raise UserError(f"pretrain.{error}") from None
