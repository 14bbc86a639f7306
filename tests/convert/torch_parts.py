"""The PyTorch FaVChat with this project's weights, the same inputs for both, and how far apart their numbers are."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import peft
import torch
from ml_collections import ConfigDict

from favchat_jax.convert import exported, favchat, lora, mistral
from favchat_jax.convert.pytorch.configuration_favchat import FaVChatConfig
from favchat_jax.convert.pytorch.modeling_favchat import FaVChatForConditionalGeneration
from favchat_jax.convert.table import write
from favchat_jax.models.mistral import MistralConfig
from tests.models.tiny_parts import config_json

# Names of the language model's base in a PEFT model.
LLM = ("base_model.model.model.", "base_model.model.lm_head.")
IN_MEMORY = dataclasses.replace(lora.TABLE, rows=lora.rows("default"))


def published(weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights by path, or gradients of them, under the names of a PEFT model's parameters; empties `weights`.

    A large model exists in one of the two forms at a time.
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


def torch_favchat(config: ConfigDict, llm: MistralConfig, weights: dict[str, Any]) -> peft.PeftModel:
    """The PyTorch model of a config with PEFT's adapters, on exactly the weights given: none is missing or left over.

    All that stage 2 trains has gradients; `weights` are used up.
    """
    settings = FaVChatConfig(**exported.favchat_config(config, config_json(llm), "float32"))
    with torch.device("meta"):
        model = FaVChatForConditionalGeneration(settings)
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)  # a buffer that no weight fills
    section = config.model.lora
    adapters = peft.LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=list(section.targets))
    wrapped = peft.get_peft_model(model, adapters).eval()
    # PEFT calls an adapted layer's own weight base_layer.
    tensors = {name.replace(".base_layer.", "."): name for name in wrapped.state_dict()}
    wrapped.load_state_dict({tensors[name]: tensor for name, tensor in published(weights).items()}, assign=True)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in name or not name.startswith(LLM))
    return wrapped


def inputs(config: ConfigDict, llm: MistralConfig, *, clips=2, questions=2, words=9, seed=0) -> dict[str, np.ndarray]:
    """A batch of the training step: random frames, words, prompts of different lengths and answers."""
    rng = np.random.default_rng(seed)
    size, vocabulary = config.model.image_size, config.model.qformer.vocabulary
    visual = config.model.qformer.queries + config.model.qformer.extra_queries
    tokens = rng.integers(0, llm.vocab_size, (clips, questions, visual + words))
    tokens[:, :, 2 : 2 + visual] = -1
    prompt = 4
    return {
        "frames": rng.integers(0, 256, (clips, config.model.frames, size, size, 3), np.uint8),
        "tokens": tokens.astype(np.int32),
        "loss_mask": np.broadcast_to(np.arange(visual + words) >= visual + words - 4, tokens.shape),
        "prompt": rng.integers(0, vocabulary, (clips, questions, prompt)).astype(np.int32),
        "prompt_mask": np.arange(prompt) < rng.integers(1, prompt + 1, (clips, questions, 1)),
    }


def for_torch(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same batch as the PyTorch model takes it."""

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


def error(ours: Any, reference: Any) -> float:
    """max |ours - reference| / max |reference|."""
    ours, reference = (np.asarray(jax.device_get(x), np.float64) for x in (ours, reference))
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


# Gradients that vanish: a bias of keys shifts all of a query's scores alike, and nothing reads the prompt after a
# Q-Former's last layer.
VANISHING = r".*\.key\.bias|.*qformer\.bert\.encoder\.layer\.{last}\.(intermediate|output)\..*"


def gradient_error(ours: dict[str, Any], reference: torch.nn.Module, last: int) -> float:
    """The largest `error` of the gradients, weight by weight; `last` is the Q-Formers' last layer.

    Args:
        ours: gradients by path, of all that the reference has gradients for and of nothing else.
    """
    ours = published(dict(ours))
    theirs = {n.replace(".base_layer.", "."): p.grad for n, p in reference.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    vanishing = {name for name in ours if re.fullmatch(VANISHING.replace("{last}", str(last)), name)}
    for name in vanishing:
        assert max(float(g[name].abs().max()) for g in (ours, theirs)) < 1e-6 * largest, name
    return max(error(ours[name], theirs[name]) for name in ours.keys() - vanishing)
