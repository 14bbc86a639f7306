"""The whole FaVChat against its PyTorch counterpart: same weights and inputs, same logits, gradients and answers.

    python -m pytest tests/convert/test_pytorch_parity.py -m "slow or not slow" -rP

prints the errors: max |ours - reference| / max |reference|, of gradients the largest over all weights.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from flax.traverse_util import unflatten_dict

from configs import stage2
from favchat_jax.models import favchat
from favchat_jax.models.favchat import ABLATIONS
from favchat_jax.models.mistral import MistralConfig
from favchat_jax.training.step import batch_loss
from tests.convert.torch_parts import error, for_torch, gradient_error, inputs, torch_favchat
from tests.models.tiny_parts import MISTRAL, MISTRAL_7B, drawn_flat, favchat_shapes, tiny_config

LIMIT = 1e-4
READ = ("frames", "tokens", "prompt", "prompt_mask")


def jax_logits(model, weights, batch):
    def run(weights):
        params = {"params": unflatten_dict(weights, sep="/")}
        output = model.apply(params, *(batch[name] for name in READ))
        return model.apply(params, output.hidden, method=lambda m, hidden: m.llm.logits(hidden))

    return rearrange(jax.jit(run)(weights), "B Q L V -> (B Q) L V")


def jax_gradient(model, weights, batch):
    """The mean loss of answer tokens and its gradient for all that stage 2 trains; the configs here have no dropout."""
    counted = batch["loss_mask"][..., 1:].sum()
    frozen = {path: leaf for path, leaf in weights.items() if path.startswith("llm/") and "lora" not in path}

    def loss(trainable, frozen):
        return batch_loss(model, {**trainable, **frozen}, batch, jax.random.key(0), 64)[0] / counted

    trainable = {path: leaf for path, leaf in weights.items() if path not in frozen}
    return jax.jit(jax.value_and_grad(loss))(trainable, frozen)


def compare(config, llm, weights, batch) -> dict[str, float]:
    """The errors of logits, loss and gradient."""
    model = favchat.build(config.model, llm, ablation=config.ablation, lora_rank=config.model.lora.rank)
    logits = np.asarray(jax_logits(model, weights, batch))
    loss, gradient = jax.device_get(jax_gradient(model, weights, batch))
    reference = torch_favchat(config, llm, weights)
    output = reference(**for_torch(batch))
    output.loss.backward()
    return {
        "logits": error(logits, output.logits.detach()),
        "loss": error(loss, output.loss.detach()),
        "gradient": gradient_error(gradient, reference, config.model.qformer.depth - 1),
    }


def drawn_weights(config, llm, spread, seed=0):
    model = favchat.build(config.model, llm, ablation=config.ablation, lora_rank=config.model.lora.rank)
    return drawn_flat(favchat_shapes(model, config.model.frames, config.model.image_size), spread, seed)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_has_the_logits_and_the_gradient_of_its_pytorch_counterpart(ablation):
    config = tiny_config(f"ablation={ablation}")
    errors = compare(config, MISTRAL, drawn_weights(config, MISTRAL, 0.3), inputs(config, MISTRAL))
    print(ablation, errors)
    assert max(errors.values()) <= LIMIT


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        # Both position tables are resampled and windows padded.
        ({"frames": 5, "image_size": 48, "fusion.residual": False, "qformer.extra_queries": 0}, None),
        ({"frames": 1, "qformer.prompt": False}, 4),
    ],
    ids=["sizes", "one frame"],
)
def test_other_settings_mean_the_same_in_pytorch(changes, window):
    config, llm = tiny_config(), dataclasses.replace(MISTRAL, sliding_window=window)
    config.model.update_from_flattened_dict(changes)
    weights, batch = drawn_weights(config, llm, 0.3), inputs(config, llm)
    with torch.no_grad():
        reference = torch_favchat(config, llm, weights)(**for_torch(batch)).logits
    model = favchat.build(config.model, llm, lora_rank=config.model.lora.rank)
    assert error(jax_logits(model, weights, batch), reference) <= LIMIT


def paper_width():
    """The paper preset, every part as wide as there, two layers each, without dropout; few words and two frames."""
    config = stage2.get_config("preset=paper")
    model = config.model
    model.update({"dtype": "float32", "remat": False, "frames": 2})
    model.umt.update({"depth": 3, "layers_run": 2})
    model.facexformer.depths = (2, 2, 2, 2)
    model.qformer.update({"depth": 2, "vocabulary": 600, "dropout": 0.0})
    model.lora.dropout = 0.0
    fields = {"num_hidden_layers": 2, "vocab_size": 600}
    return config, MistralConfig.from_json({**MISTRAL_7B, **fields})
