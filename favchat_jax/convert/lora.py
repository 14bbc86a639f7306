"""Table of the language model's adapters under PEFT's names (`adapter_model.safetensors`), and their description file.

PEFT stores A as [r, in] and B as [out, r] below each adapted layer; here they are [in, r] and [r, out].
"""

from typing import Any

from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.table import Row, Shape, Table, prefixed
from favchat_jax.models.mistral import LoRA, MistralConfig


def rows(adapter: str = "") -> tuple[Row, ...]:
    """Returns the rows of every layer that can have an adapter; their paths start with `llm/`.

    Args:
        adapter: name between `lora_A` and `weight` in a PEFT model in memory (`default`); empty for a saved folder.
    """
    layers = [("lm_head", "lm_head")]
    for part, names in mistral.PROJECTIONS.items():
        layers += [(f"model.layers.{{i}}.{part}.{name}", f"layers/{part}/{name}") for name in names]
    name = f"{adapter}." if adapter else ""
    pairs = (
        Row(f"{published}.lora_{letter}.{name}weight", f"{path}/lora_{letter.lower()}", "transposed")
        for published, path in layers
        for letter in "AB"
    )
    return prefixed(pairs, published="base_model.model.", path="llm/")


TABLE = Table(
    "PEFT's LoRA",
    rows(),
    ignored=((r"base_model\.model\.lm_head\.base_layer\.weight", "PEFT's copy of the base's output layer"),),
    hint="it is of another rank, or of another language model",
)


def adapter_config(lora: LoRA, base: str) -> dict[str, Any]:
    """Returns the content of PEFT's `adapter_config.json` for these adapters.

    Args:
        lora: rank, alpha, dropout and targets.
        base: folder or name of the adapted language model.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def weight_shapes(config: MistralConfig, lora: LoRA) -> dict[str, Shape]:
    """Returns path -> shape of the adapters only; their paths start with `llm/`."""
    shapes = mistral.weight_shapes(config, lora)
    return {f"llm/{path}": shape for path, shape in shapes.items() if path.endswith(("lora_a", "lora_b"))}
