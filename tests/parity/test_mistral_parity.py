"""Mistral and its LoRA against transformers and PEFT: full width, two layers, a small vocabulary to save memory."""

import dataclasses
import gc
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import MistralConfig, MistralForCausalLM

from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.table import read
from favchat_jax.checkpoints.tensors import open_tensors
from favchat_jax.convert import lora
from favchat_jax.models.mistral import LoRA, Mistral
from favchat_jax.models.mistral_decoding import DecodingMistral, decoding_form
from tests.parity.conftest import SEEDS

VOCABULARY, LENGTH, WINDOW, PADDING, PROMPT = 512, 20, 6, 5, 14
ADAPTERS = LoRA(rank=16, alpha=32.0, dropout=0.0)
WORDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))


def mistral_7b(**changes) -> MistralConfig:
    """Returns Mistral-7B's configuration with another depth and vocabulary."""
    return MistralConfig(
        **{"num_hidden_layers": 2, "vocab_size": VOCABULARY, "sliding_window": None, "rope_theta": 1e6, **changes}
    )


@torch.no_grad()
def reference_logits(model: MistralForCausalLM) -> dict[str, np.ndarray]:
    """Returns scores of the words: plain, with a window, with padding on the left and with padding on the right."""
    with torch.device("meta"):
        windowed = MistralForCausalLM(mistral_7b(sliding_window=WINDOW)).eval()
    windowed.load_state_dict(model.state_dict(), assign=True)
    windowed.model.rotary_emb = model.model.rotary_emb
    words = torch.from_numpy(WORDS)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    left, right = mask.clone(), mask.clone()
    left[0, :PADDING], right[0, -PADDING:] = 0, 0
    return {
        "full": model(words).logits.numpy(),
        "window": windowed(words).logits.numpy(),
        "left": model(words, attention_mask=left, position_ids=(left.cumsum(1) - 1).clamp(0)).logits.numpy(),
        "right": model(words, attention_mask=right).logits.numpy(),
    }


def reference_gradients(model: MistralForCausalLM, folder) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns scores with adapters and each adapter's gradient of the loss, by published name; saves the adapters."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=ADAPTERS.rank, lora_alpha=ADAPTERS.alpha, target_modules=list(ADAPTERS.targets)
    )
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros at initialisation, with which A has no gradient
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder)
    words = torch.from_numpy(WORDS)
    logits = adapted(words).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten()).backward()
    named = ((name.replace(".default", ""), p.grad) for name, p in adapted.named_parameters() if p.requires_grad)
    return logits.detach().numpy(), {name: gradient.numpy() for name, gradient in named}


@pytest.fixture(scope="module", params=SEEDS)
def case(request, tmp_path_factory):
    """A seed, the reference's numbers, and its two folders; the reference itself is deleted to save memory."""
    torch.manual_seed(request.param)
    folder = tmp_path_factory.mktemp("reference")
    model = MistralForCausalLM(mistral_7b()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) if "norm" in name else 0
    model.save_pretrained(folder / "mistral", max_shard_size="600MB")
    logits = reference_logits(model)
    adapted = reference_gradients(model, folder / "adapter")
    del model
    gc.collect()
    yield request.param, logits, adapted, folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def weights(case):
    """The folder's weights as the converter reads them, with stacked layers."""
    read = flatten_dict(mistral.read_weights(case[-1] / "mistral"), sep="/")
    return unflatten_dict({path: jnp.asarray(read.pop(path)) for path in list(read)}, sep="/")


@pytest.fixture(scope="module")
def config(case):
    return mistral.read_config(case[-1] / "mistral")


@partial(jax.jit, static_argnums=0)
def forward(model, weights, positions, valid):
    def logits(model, words):
        return model.logits(model(model.embed(words), positions=positions, valid=valid))

    return model.apply({"params": weights}, jnp.asarray(WORDS), method=logits)


COUNTED = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))
EVERYTHING = np.ones((2, LENGTH), bool)


def test_the_folder_is_sharded_and_every_key_of_it_is_used(case):
    folder = case[-1] / "mistral"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == open_tensors(folder).keys()


def test_logits_are_those_of_transformers(case, config, weights, same):
    seed, logits, *_ = case
    same("Mistral, logits", seed, forward(Mistral(config), weights, COUNTED, EVERYTHING), logits["full"])


def test_logits_with_a_sliding_window_are_those_of_transformers(case, config, weights, same):
    seed, logits, *_ = case
    model = Mistral(dataclasses.replace(config, sliding_window=WINDOW))
    same("Mistral, sliding window", seed, forward(model, weights, COUNTED, EVERYTHING), logits["window"])
    assert np.abs(logits["window"] - logits["full"]).max() > 1e-2


def test_logits_of_padded_sequences_are_those_of_transformers(case, config, weights, same):
    seed, logits, *_ = case
    shift = np.array([[PADDING], [0]])
    result = forward(Mistral(config), weights, np.maximum(COUNTED - shift, 0), shift <= COUNTED)
    same("Mistral, padding on the left", seed, result[0, PADDING:], logits["left"][0, PADDING:])
    same("Mistral, padding on the left", seed, result[1], logits["left"][1])
    result = forward(Mistral(config), weights, COUNTED, LENGTH - shift > COUNTED)
    same("Mistral, padding on the right", seed, result[0, :-PADDING], logits["right"][0, :-PADDING])
    same("Mistral, padding on the right", seed, result[1], logits["right"][1])


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "windowed"])
def test_decoding_with_a_cache_gives_the_logits_of_transformers_full_pass(window, case, config, weights, same):
    seed, logits, *_ = case
    model = DecodingMistral(dataclasses.replace(config, sliding_window=window))
    ours = decoding_form(weights, config, alpha=1.0)

    @jax.jit
    def step(ours, words, positions, cache):
        def run(model):
            hidden, new = model.extend(model.embed(words), cache, positions)
            return model.logits(hidden), new

        return model.apply({"params": ours}, method=run)

    result, cache = step(ours, WORDS[:, :PROMPT], COUNTED[:, :PROMPT], model.empty_cache(2, LENGTH))
    steps = [result]
    for i in range(PROMPT, LENGTH):
        result, cache = step(ours, WORDS[:, i : i + 1], COUNTED[:, i : i + 1], cache)
        steps.append(result)
    name = "Mistral, decoding with a cache" + (", sliding window" if window else "")
    same(name, seed, np.concatenate(steps, axis=1), logits["window" if window else "full"])


def test_lora_computes_and_learns_what_pefts_does(case, config, weights, same):
    seed, _, (logits, gradients), folder = case
    file = folder / "adapter" / "adapter_model.safetensors"
    shapes = lora.weight_shapes(config, ADAPTERS)
    adapters = read(lora.TABLE, open_tensors(file).items(), shapes, file)
    adapters = {path.removeprefix("llm/"): leaf for path, leaf in adapters.items()}
    model, base = Mistral(config, ADAPTERS), flatten_dict(weights, sep="/")

    @jax.jit
    def logits_of(adapters, base):
        tree = unflatten_dict({**base, **adapters}, sep="/")
        return model.apply({"params": tree}, WORDS, method="read")

    @jax.jit
    @jax.grad
    def gradient_of(adapters, base):
        scores = jax.nn.log_softmax(logits_of(adapters, base)[:, :-1])
        return -jnp.take_along_axis(scores, WORDS[:, 1:, None], axis=-1).mean()

    same("LoRA, logits", seed, logits_of(adapters, base), logits)
    expected = read(lora.TABLE, gradients.items(), shapes, "PEFT's gradients")
    for path, ours in gradient_of(adapters, base).items():
        same("LoRA, gradient of each A and B", seed, ours, expected[f"llm/{path}"])
