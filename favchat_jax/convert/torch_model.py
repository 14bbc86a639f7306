"""Builds the PyTorch FaVChat in memory with this project's weights and inputs, to compare the two implementations.

It imports PyTorch and PEFT, so the package imports this module only on demand.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import peft
import torch

from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.table import write
from favchat_jax.config import Config
from favchat_jax.convert import exported, favchat, lora
from favchat_jax.convert.pytorch.configuration_favchat import FaVChatConfig
from favchat_jax.convert.pytorch.modeling_favchat import FaVChatForConditionalGeneration

# Prefixes of the language model's base weights in a PEFT model.
LLM = ("base_model.model.model.", "base_model.model.lm_head.")
IN_MEMORY = dataclasses.replace(lora.TABLE, rows=lora.rows("default"))


def published(weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Renames weights or gradients by path to the parameters of a PEFT model, and empties `weights`.

    Emptying keeps a large model from being in memory twice.
    """
    tensors = {}
    while weights:
        path, leaf = weights.popitem()
        if path.endswith(("lora_a", "lora_b")):
            tensors |= write(IN_MEMORY, {path: leaf})
        else:
            table = mistral.TABLE if path.startswith("llm/") else favchat.TABLE
            written = write(table, {path.removeprefix("llm/"): leaf})
            tensors |= {f"base_model.model.{name}": tensor for name, tensor in written}
    return {name: torch.tensor(tensors.pop(name)) for name in list(tensors)}


def torch_favchat(config: Config, llm: Mapping[str, Any], weights: dict[str, Any]) -> peft.PeftModel:
    """Builds the PyTorch model of a config with PEFT's adapters from exactly the given weights.

    All weights that stage 2 trains have gradients.

    Args:
        config: config of a run.
        llm: fields of the language model's config.json.
        weights: all weights by path; the dictionary is emptied.
    """
    wrapped = unfilled_favchat(config, llm)
    # PEFT renames an adapted layer's own weight to base_layer.
    tensors = {name.replace(".base_layer.", "."): name for name in wrapped.state_dict()}
    wrapped.load_state_dict({tensors[name]: tensor for name, tensor in published(weights).items()}, assign=True)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(not is_base(name))
    return wrapped


def unfilled_favchat(config: Config, llm: Mapping[str, Any]) -> peft.PeftModel:
    """Builds the PyTorch model of a config with PEFT's adapters, whose weights have no memory yet."""
    settings = FaVChatConfig(**exported.favchat_config(config, llm, "float32"))
    with torch.device("meta"):
        model = FaVChatForConditionalGeneration(settings)
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)  # a buffer that the weights do not contain
    section = config.model.lora
    adapters = peft.LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=list(section.targets))
    with torch.device("meta"):
        return peft.get_peft_model(model, adapters).eval()


def is_base(name: str) -> bool:
    """Returns whether a parameter of the PEFT model is one of the language model's own, which never train."""
    return "lora_" not in name and name.startswith(LLM)


def for_torch(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Converts a batch to the PyTorch model's arguments."""

    def rows(name: str) -> torch.Tensor:
        return torch.tensor(batch[name].reshape(-1, batch[name].shape[-1]))

    tokens = rows("tokens").long()
    return {
        "input_ids": tokens,
        "frames": torch.tensor(batch["frames"]),
        "prompt_ids": rows("prompt").long(),
        "prompt_mask": rows("prompt_mask"),
        "labels": tokens.masked_fill(~rows("loss_mask"), -100),
    }
