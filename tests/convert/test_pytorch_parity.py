"""The complete FaVChat matches its PyTorch counterpart: same weights and inputs, same logits, gradients and answers.

    python -m pytest tests/convert/test_pytorch_parity.py -m "slow or not slow" -rP

prints the errors: max |ours - reference| / max |reference|, of gradients the largest over all weights.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from flax.traverse_util import unflatten_dict

from configs import stage2
from favchat_jax.checkpoints.run import Assembly
from favchat_jax.config import ABLATIONS, VARIANTS, Config
from favchat_jax.convert.pytorch.inputs_favchat import Prompts
from favchat_jax.convert.torch_model import for_torch, torch_favchat
from favchat_jax.data.conversation import Conversation, PromptEncoder
from favchat_jax.generation.sampler import Sampler, Sampling
from favchat_jax.generation.weights import from_training
from favchat_jax.models import favchat
from favchat_jax.models.mistral import MistralConfig
from favchat_jax.training.step import batch_loss
from tests.convert.torch_parts import error, gradient_error, inputs
from tests.data.tokenizers_for_tests import words
from tests.models.tiny_parts import MISTRAL, MISTRAL_7B, config_json, drawn_flat, favchat_shapes, tiny_config

LIMIT = 1e-4
READ = ("frames", "tokens", "prompt", "prompt_mask")


def built(config, llm) -> favchat.FaVChat:
    """The model of a config in its training form."""
    how = {"variant": config.variant, "ablation": config.ablation, "lora_rank": config.model.lora.rank}
    return favchat.build(config.model, llm, **how)


def jax_logits(model, weights, batch):
    def run(weights):
        params = {"params": unflatten_dict(weights, sep="/")}
        output = model.apply(params, *(batch[name] for name in READ))
        return model.apply(params, output.hidden, method=lambda m, hidden: m.llm.logits(hidden))

    return rearrange(jax.jit(run)(weights), "B Q L V -> (B Q) L V")


def jax_gradient(model, weights, batch):
    """Returns the mean loss of answer tokens and its gradient for all but the language model's base; no dropout."""
    counted = batch["loss_mask"][..., 1:].sum()
    frozen = {path: leaf for path, leaf in weights.items() if path.startswith("llm/") and "lora" not in path}

    def loss(trainable, frozen):
        return batch_loss(model, {**trainable, **frozen}, batch, jax.random.key(0), 64)[0] / counted

    trainable = {path: leaf for path, leaf in weights.items() if path not in frozen}
    return jax.jit(jax.value_and_grad(loss))(trainable, frozen)


def compare(config, llm, weights, batch) -> dict[str, float]:
    """Returns the errors of logits, loss and gradient; the reference computes in float64, so that they are ours."""
    model = built(config, llm)
    logits = np.asarray(jax_logits(model, weights, batch))
    loss, gradient = jax.device_get(jax_gradient(model, weights, batch))
    reference = torch_favchat(config, config_json(llm), weights).double()
    output = reference(**for_torch(batch))
    output.loss.backward()
    return {
        "logits": error(logits, output.logits.detach()),
        "loss": error(loss, output.loss.detach()),
        "gradient": gradient_error(gradient, reference, config.model.qformer.depth - 1),
    }


def logits_error(config, llm, weights, batch) -> float:
    """Returns the error of the logits only."""
    model = built(config, llm)
    logits = np.asarray(jax_logits(model, weights, batch))
    with torch.no_grad():
        return error(logits, torch_favchat(config, config_json(llm), weights)(**for_torch(batch)).logits)


def drawn_weights(config, llm, spread, seed=0):
    return drawn_flat(favchat_shapes(built(config, llm), config.model.frames, config.model.image_size), spread, seed)


@pytest.mark.parametrize(
    ("variant", "ablation", "seed"),
    [
        *(("v1", ablation, 0) for ablation in ABLATIONS),
        ("v2", "none", 0),
        *(pytest.param("v2", "none", seed, marks=pytest.mark.slow) for seed in (1, 2)),
        *(pytest.param("v2", ablation, 0, marks=pytest.mark.slow) for ablation in ABLATIONS[1:]),
    ],
)
def test_logits_and_gradient_of_every_model_match_its_pytorch_counterpart(variant, ablation, seed):
    config = tiny_config(f"variant={variant},ablation={ablation}")
    errors = compare(config, MISTRAL, drawn_weights(config, MISTRAL, 0.3, seed), inputs(config, MISTRAL, seed=seed))
    print(variant, ablation, seed, errors)
    assert max(errors.values()) <= LIMIT


@pytest.mark.parametrize(
    ("argument", "changes", "window"),
    [
        # These sizes resample both position tables and pad windows.
        ("", {"frames": 5, "image_size": 48, "fusion.residual": False, "qformer.extra_queries": 0}, None),
        ("", {"frames": 1, "qformer.prompt": False}, 4),
        ("variant=v2", {"frames": 5, "image_size": 48, "fusion.residual": False, "qformer.extra_queries": 0}, 4),
        *((f"variant=v2,ablation={ablation}", {}, None) for ablation in ABLATIONS[1:]),
    ],
    ids=["sizes", "one frame", "sizes of v2", *(f"v2 {ablation}" for ablation in ABLATIONS[1:])],
)
def test_logits_match_pytorch_with_other_settings(argument, changes, window):
    config = tiny_config(argument).updated({f"model.{path}": value for path, value in changes.items()})
    llm = dataclasses.replace(MISTRAL, sliding_window=window)
    weights, batch = drawn_weights(config, llm, 0.3), inputs(config, llm)
    assert logits_error(config, llm, weights, batch) <= LIMIT


@pytest.mark.parametrize(
    ("variant", "ablation", "seed"),
    [("v1", "none", 0), ("v1", "no_face", 0), *(("v2", "none", seed) for seed in (0, 1, 2))],
)
def test_greedy_answers_are_the_same_over_64_tokens(variant, ablation, seed, tmp_path):
    config = tiny_config(f"variant={variant},ablation={ablation}").updated({"llm.path": str(tmp_path)})
    (tmp_path / "config.json").write_text(json.dumps(config_json(MISTRAL)))
    weights, batch = drawn_weights(config, MISTRAL, 0.3, seed), inputs(config, MISTRAL, seed=seed)
    tokenizer = words(*(f"word{i}" for i in range(MISTRAL.vocab_size - 3)), "<end>")
    tokenizer.eos_token = "<end>"  # outside the model's vocabulary, so that no answer ends
    visual, length = config.model.qformer.queries + config.model.qformer.extra_queries, config.data.prompt_length
    model = favchat.build(config.model, MISTRAL, variant=variant, ablation=ablation)
    conversation, prompt = Conversation(tokenizer, visual), PromptEncoder(tokenizer, length)
    parts = Assembly(config, MISTRAL, model, tokenizer, conversation, prompt)
    sampler = Sampler(parts, from_training(weights, config, MISTRAL))
    questions = [["word3 word5 word5", "word7 word8 word9"], ["word11 word2 word2", "word4 word1 word6"]]
    asked = [[[(question, None)] for question in row] for row in questions]
    blocks = sampler.blocks(sampler.encode(batch["frames"]), asked, Sampling(max_new_tokens=64), 63)
    ours = np.concatenate(list(blocks), axis=1)

    rows = [question for row in questions for question in row]
    prompts = Prompts(tokenizer, tokenizer, visual, length, longest=10**6)
    prompt_ids, prompt_mask = (torch.stack(x) for x in zip(*map(prompts.for_qformer, rows), strict=True))
    tokens = torch.stack([prompts.conversation((), question, config.model.frames) for question in rows])
    theirs = torch_favchat(config, config_json(MISTRAL), weights).generate(
        input_ids=tokens,
        frames=torch.tensor(batch["frames"]),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    np.testing.assert_array_equal(theirs, ours)
    assert ours.shape == (4, 64) and len({tuple(row) for row in ours}) == 4, "four answers, none like another"


def wide(variant: str = "v1", share: int = 1, mlp: int = 14336):
    """The paper preset in float32 with two layers a part, two frames, few words and no dropout.

    Args:
        variant: v1 or v2.
        share: every width and number of heads is the paper's over this.
        mlp: Mistral's hidden width before that; its weights are two thirds of all at two layers.
    """
    config = stage2.get_config(f"preset=paper,variant={variant}")
    model = config.model
    model.update({"dtype": "float32", "remat": "", "frames": 2})
    model.umt.update({"depth": 3, "layers_run": 2, "width": 1024 // share, "heads": 16 // share})
    heads = tuple(count // share for count in (4, 8, 16, 32))
    model.facexformer.update({"depths": (2, 2, 2, 2), "width": 128 // share, "heads": heads})
    model.fusion.heads = 16 // share
    model.qformer.update({"depth": 2, "vocabulary": 600, "dropout": 0.0})
    model.qformer.update({"width": 768 // share, "heads": 12 // share, "mlp": 3072 // share})
    model.adapter.hidden = 1024 // share
    model.lora.dropout = 0.0
    llm = {"hidden_size": 4096, "intermediate_size": mlp, "num_attention_heads": 32, "num_key_value_heads": 8}
    llm = {name: size // share for name, size in llm.items()}
    llm = MistralConfig.from_json({**MISTRAL_7B, **llm, "num_hidden_layers": 2, "vocab_size": 600})
    return Config.from_ml_collections(config), llm


# At full width the gradient takes 9 GiB and minutes. So the usual tests use half of every width. The slow tests use the
# full width with a narrow Mistral MLP for the gradient (6.4 GiB), and the full width for the logits (4.5 GiB).
SIZES = [
    pytest.param({"share": 2}, 0, id="half-0"),
    *(pytest.param({"share": 2}, seed, id=f"half-{seed}", marks=pytest.mark.slow) for seed in (1, 2)),
    pytest.param({"mlp": 2048}, 0, id="narrow MLP-0", marks=pytest.mark.slow),
    *(
        pytest.param({"variant": "v2", "share": 2}, seed, id=f"half of v2-{seed}", marks=pytest.mark.slow)
        for seed in (0, 1, 2)
    ),
    pytest.param({"variant": "v2", "mlp": 2048}, 0, id="narrow MLP of v2-0", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "seed"), SIZES)
def test_near_the_papers_width_logits_and_gradient_match_the_pytorch_counterpart(size, seed):
    config, llm = wide(**size)
    batch = inputs(config, llm, clips=1, questions=1, seed=seed)
    if config.variant == "v2":  # with a single word, attention over words is constant and its gradients vanish
        batch["prompt_mask"][..., :2] = True
    errors = compare(config, llm, drawn_weights(config, llm, 0.02, seed), batch)
    print(size, seed, errors)
    assert max(errors.values()) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_at_the_papers_width_logits_match_the_pytorch_counterpart(variant, seed):
    config, llm = wide(variant)
    batch = inputs(config, llm, clips=1, questions=1, seed=seed)
    found = logits_error(config, llm, drawn_weights(config, llm, 0.02, seed), batch)
    print(variant, seed, found)
    assert found <= LIMIT
