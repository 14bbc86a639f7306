"""The Q-Former against transformers' InstructBLIP Q-Former, with and without a prompt."""

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from favchat_jax.convert import qformer
from favchat_jax.models.qformer import QFormer
from tests.parity.conftest import SEEDS, converted, moved, saved

LAYERS, QUERIES, WORDS, VISUAL = 2, 96, 12, 1024
# Names that transformers changed.
PUBLISHED = {"attention.attention.": "attention.self.", "embeddings.layernorm.": "embeddings.LayerNorm."}


def published(state: dict, queries: torch.Tensor) -> dict:
    """Renames a state dict of transformers to the names of BLIP-2 and VideoChat2, and adds the query tokens."""
    renamed = {}
    for name, tensor in state.items():
        for new, old in PUBLISHED.items():
            name = name.replace(new, old)
        renamed[f"qformer.bert.{name}"] = tensor
    renamed["qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    return {**renamed, "query_tokens": queries[:, :32], "extra_query_tokens": queries[:, 32:]}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_qformer_computes_what_instructblips_does_with_and_without_a_prompt(seed, tmp_path, same):
    torch.manual_seed(seed)
    config = InstructBlipQFormerConfig(
        vocab_size=30523, num_hidden_layers=LAYERS, encoder_hidden_size=VISUAL, cross_attention_frequency=2
    )
    reference = moved(InstructBlipQFormerModel(config))
    queries, visual = 0.02 * torch.randn(1, QUERIES, config.hidden_size), torch.randn(2, 200, VISUAL)
    ids, lengths = torch.randint(0, 30523, (2, WORDS)), torch.tensor([[WORDS], [7]])
    mask = torch.arange(WORDS) < lengths
    with torch.no_grad():
        given = {"query_embeds": queries.expand(2, -1, -1), "encoder_hidden_states": visual}
        seen = torch.cat([torch.ones(2, QUERIES, dtype=torch.bool), mask], 1).long()
        with_prompt = reference(ids, attention_mask=seen, **given).last_hidden_state[:, :QUERIES]
        without = reference(None, **given).last_hidden_state

    file = saved(published(reference.state_dict(), queries), tmp_path / "umt_l16_qformer.pth")
    model = QFormer(depth=LAYERS)
    weights = converted(qformer.TABLE, file, qformer.weight_shapes(model, VISUAL), tmp_path / "qformer")
    ours = jax.jit(lambda weights, *inputs: model.apply({"params": weights}, *inputs))
    visual = jnp.asarray(visual.numpy())
    prompt = jnp.asarray(ids.numpy())[:, None], jnp.asarray(mask.numpy())[:, None]
    same("Q-Former, 2 layers, with a prompt", seed, ours(weights, visual, *prompt)[:, 0], with_prompt)
    same("Q-Former, 2 layers, without", seed, ours(weights, visual)[:, 0], without)
    assert (with_prompt - without).abs().max() > 1e-3
