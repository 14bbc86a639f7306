"""Defines the section `pretrain` of a config: sizes and training of the stand-ins for published parts."""

from dataclasses import dataclass
from typing import Self

from favchat_jax.config import Config
from favchat_jax.errors import UserError
from favchat_jax.section import Count, Positive, Section


@dataclass(frozen=True, kw_only=True)
class LanguageModelSizes(Section):
    """Holds the sizes of a small Mistral."""

    width: Count  # channels of a token
    layers: Count
    heads: Count  # attention heads
    kv_heads: Count  # heads of keys and values, each shared by a group of heads
    mlp: Count  # hidden channels of a layer's MLP
    vocabulary: Count  # number of tokens


@dataclass(frozen=True, kw_only=True)
class Pretrain(Section):
    """Holds the sizes and the training settings of the stand-ins."""

    llm: LanguageModelSizes  # sizes of the language model
    llm_steps: Count  # batches of 16 texts
    facial_steps: Count  # batches of 128 single frames
    general_steps: Count  # batches of 32 clips
    stills: Count  # faces drawn for the facial encoder in addition to those of the clips
    general_clips: Count  # clips without a face, drawn for the general encoder
    learning_rate: Positive  # Muon's peak learning rate

    @classmethod
    def of(cls, config: Config) -> Self:
        """Reads the section of a config; raises UserError for a value that is not allowed."""
        try:
            return cls.read(config.pretrain or {})
        except UserError as error:
            raise UserError(f"pretrain.{error}") from None
