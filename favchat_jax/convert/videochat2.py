"""Table of a checkpoint of VideoChat2's stage 2 or 3 (github: OpenGVLab/Ask-Anything, video_chat2, Mistral).

It holds the general encoder, the Q-Former and its query tokens, the linear layer `mistral_proj`, and from stage 3 on
PEFT's LoRA. The language model is frozen in training, so it is not in the file but comes from its own folder.
"""

from favchat_jax.checkpoints.table import Shape, Table, linear, prefixed
from favchat_jax.convert import lora, qformer, umt
from favchat_jax.models.mistral import LoRA, MistralConfig
from favchat_jax.models.qformer import QFormer
from favchat_jax.models.umt import UMT

TABLE = Table(
    "VideoChat2",
    (
        *umt.ROWS,
        *prefixed(qformer.ROWS, path="qformer/"),
        *linear("mistral_proj", "proj"),
        *prefixed(lora.rows("default"), published="mistral_model."),
    ),
    ignored=(
        *umt.IGNORED,
        *qformer.IGNORED,
        (r"mistral_model\.(?!.*\.lora_).*", "the language model's base, which comes from its own folder"),
    ),
    optional=(*qformer.OPTIONAL, (r"llm/.*lora_[ab]", "stage 2 trains no LoRA; newly initialised")),
    hint="it is not of UMT-L, BERT-base, Mistral-7B and LoRA of rank 16",
)

MISTRAL = MistralConfig()
LORA = LoRA(rank=16, alpha=32.0, dropout=0.1)


def weight_shapes(
    encoder: UMT | None = None, reader: QFormer | None = None, llm: MistralConfig = MISTRAL, adapters: LoRA = LORA
) -> dict[str, Shape]:
    """Returns path -> shape of all weights in the checkpoint; sizes default to the published ones."""
    encoder, reader = encoder or UMT(), reader or QFormer()
    return {
        **umt.weight_shapes(encoder),
        **{f"qformer/{path}": shape for path, shape in qformer.weight_shapes(reader, encoder.width).items()},
        "proj/kernel": (reader.width, llm.hidden_size),
        "proj/bias": (llm.hidden_size,),
        **lora.weight_shapes(llm, adapters),
    }
