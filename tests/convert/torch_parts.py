"""Inputs for our model and its PyTorch counterpart, and the error between their outputs."""

import re
from typing import Any

import jax
import numpy as np
import torch

from favchat_jax.config import Config
from favchat_jax.convert.torch_model import published
from favchat_jax.models.mistral import MistralConfig


def inputs(config: Config, llm: MistralConfig, *, clips=2, questions=2, words=9, seed=0) -> dict[str, np.ndarray]:
    """Makes a training batch of random frames, words, prompts of different lengths and answers."""
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


def error(ours: Any, reference: Any) -> float:
    """Returns max |ours - reference| / max |reference|."""
    ours, reference = (np.asarray(jax.device_get(x), np.float64) for x in (ours, reference))
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


# Gradients that vanish: a key bias shifts all of a query's scores equally, and nothing reads the prompt after a
# Q-Former's last layer.
VANISHING = r".*\.key\.bias|.*qformer\.bert\.encoder\.layer\.{last}\.(intermediate|output)\..*"


def gradient_error(ours: dict[str, Any], reference: torch.nn.Module, last: int) -> float:
    """Returns the largest `error` of a weight's gradient.

    Args:
        ours: gradients by path, for exactly the weights that have a gradient in the reference.
        reference: the PyTorch model after its backward pass.
        last: index of the Q-Formers' last layer.
    """
    ours = published(dict(ours))
    theirs = {n.replace(".base_layer.", "."): p.grad for n, p in reference.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    vanishing = {name for name in ours if re.fullmatch(VANISHING.replace("{last}", str(last)), name)}
    for name in vanishing:
        assert max(float(g[name].abs().max()) for g in (ours, theirs)) < 1e-6 * largest, name
    return max(error(ours[name], theirs[name]) for name in ours.keys() - vanishing)
