"""Draws of tokens: temperature, top-k, top-p and the repetition penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.generation.decoding import draw
from favchat_jax.generation.sampler import Sampling

SHARES = np.array([0.15, 0.5, 0.05, 0.3])
ROWS = 20_000


def drawn(scores, written=(), **how):
    """Draws one token per row; `written` are the tokens that each answer has already."""
    scores = jnp.asarray(scores, jnp.float32)
    seen = jnp.zeros(scores.shape, bool).at[:, jnp.array(written, int)].set(True)
    return draw(scores, seen, jax.random.key(0), Sampling(**how).drawing())


def frequencies(written=(), **how):
    """Returns how often `draw` takes each of four tokens whose probabilities are SHARES."""
    return np.bincount(drawn(np.tile(np.log(SHARES), (ROWS, 1)), written, **how), minlength=4) / ROWS


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_tokens_are_drawn_as_often_as_the_softmax_at_that_temperature_says(temperature):
    expected = SHARES ** (1 / temperature)
    np.testing.assert_allclose(frequencies(temperature=temperature), expected / expected.sum(), atol=0.015)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.9}, [1, 3, 0]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 0]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of the two likeliest, 0.5 / 0.8 reaches 0.6
    ],
)
def test_top_p_and_top_k_leave_the_likeliest_tokens(how, kept):
    expected = np.where(np.isin(np.arange(4), kept), SHARES, 0)
    np.testing.assert_allclose(frequencies(temperature=1.0, **how), expected / expected.sum(), atol=0.015)


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 1.0, "top_p": 0.01}, {"temperature": 1.0, "top_p": 0.0}, {"temperature": 1.0, "top_k": 1}],
)
def test_at_temperature_0_or_a_small_nucleus_the_likeliest_token_is_drawn(how):
    scores = jax.random.normal(jax.random.key(1), (50, 30))
    np.testing.assert_array_equal(drawn(scores, **how), scores.argmax(-1))


@pytest.mark.parametrize("penalty", [0.7, 1.3, 3.0])
def test_draws_follow_the_processors_of_transformers(penalty):
    from torch import tensor
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    written, how = [1, 2], {"temperature": 1.7, "top_k": 5, "top_p": 0.8}
    scores = np.random.default_rng(0).normal(0, 2, (1, 8)).astype(np.float32)
    ids = tensor([written])
    processed = penalised = RepetitionPenaltyLogitsProcessor(penalty)(ids, tensor(scores))
    for warper in (TemperatureLogitsWarper(1.7), TopKLogitsWarper(5), TopPLogitsWarper(0.8)):
        processed = warper(ids, processed)
    tokens = drawn(np.tile(scores, (ROWS, 1)), written, repetition_penalty=penalty, **how)
    shares = processed.softmax(-1).numpy()[0]
    np.testing.assert_allclose(np.bincount(tokens, minlength=8) / ROWS, shares, atol=0.015)
    assert int(drawn(scores, written, repetition_penalty=penalty)[0]) == int(penalised.argmax())
