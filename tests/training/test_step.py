import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from favchat_jax.training import assembly, loop, stages
from favchat_jax.training.step import batch_loss, chunked_cross_entropy, make_step, new_state, next_token_targets


@pytest.fixture(scope="module")
def scene(small_world):
    """Model, weights and a batch of stage 2."""
    config = small_world.config("stage2")
    parts = assembly.assemble(config)
    with contextlib.closing(loop.open_batches(config, parts)) as batches:
        batch = {name: array for name, array in next(batches).arrays.items() if name != "length"}
    weights = assembly.initial_weights(config, parts.model)
    loss = jax.jit(lambda weights, batch: batch_loss(parts.model, weights, batch, jax.random.key(0), chunk=64)[0])
    return parts.model, weights, batch, loss


def example(length: int):
    """Hidden states, targets, which of them count, and an output layer."""
    rng = np.random.default_rng(length)
    hidden = jnp.array(rng.normal(size=(3, length, 8)), jnp.float32)
    targets = jnp.array(rng.integers(0, 11, (3, length)))
    counted = jnp.array(rng.random((3, length)) < 0.4)
    return hidden, targets, counted, jnp.array(rng.normal(size=(8, 11)), jnp.float32)


def plain(kernel, hidden, targets, counted):
    log_probabilities = jax.nn.log_softmax(hidden @ kernel)
    return -jnp.sum(jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0] * counted)


@pytest.mark.parametrize(("length", "chunk"), [(12, 4), (13, 4), (13, 1), (3, 8), (8, 8)])
def test_cross_entropy_in_chunks_equals_the_plain_one_in_value_and_gradients(length, chunk):
    hidden, targets, counted, kernel = example(length)

    def chunked(kernel, hidden):
        return chunked_cross_entropy(lambda x: x @ kernel, hidden, targets, counted, chunk)

    (loss, hits), gradients = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)(kernel, hidden)
    expected, expected_gradients = jax.value_and_grad(plain, argnums=(0, 1))(kernel, hidden, targets, counted)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert hits == np.sum((np.argmax(hidden @ kernel, -1) == targets) & counted)


def test_the_loss_of_a_case_worked_out_by_hand():
    # Two words, scores (0, 0), (0, log 3), (0, log 3): the second word has probability 1/2, 3/4, 3/4.
    scores = jnp.log(jnp.array([[[1.0, 1.0], [1.0, 3.0], [1.0, 3.0]]]))
    targets, counted = jnp.array([[1, 1, 0]]), jnp.array([[False, True, True]])
    loss, hits = chunked_cross_entropy(lambda x: x, scores, targets, counted, chunk=2)
    np.testing.assert_allclose(loss, np.log(4 / 3) + np.log(4), rtol=1e-6)
    assert hits == 1


def test_targets_that_do_not_count_change_nothing():
    hidden, targets, counted, kernel = example(9)
    other = jnp.where(counted, targets, (targets + 5) % 11)
    first, second = (chunked_cross_entropy(lambda x: x @ kernel, hidden, t, counted, 4) for t in (targets, other))
    assert first == second


def test_a_position_predicts_the_next_token_and_counts_where_that_is_part_of_an_answer():
    tokens, mask = jnp.array([[5, 6, 7, 8]]), jnp.array([[False, False, True, True]])
    targets, counted = next_token_targets(tokens, mask)
    assert targets.tolist() == [[6, 7, 8, 0]]
    assert counted.tolist() == [[False, True, True, False]]


def test_padding_and_empty_rows_do_not_touch_the_loss_and_answers_do(scene):
    _, weights, batch, loss = scene
    before = loss(weights, batch)
    ends = [int(np.flatnonzero(row).max()) if row.any() else -1 for row in batch["loss_mask"].reshape(-1, 160)]
    tokens = batch["tokens"].copy()
    for row, end in zip(tokens.reshape(-1, 160), ends, strict=True):
        row[end + 1 :] = 7
    assert not np.array_equal(tokens, batch["tokens"])
    assert loss(weights, {**batch, "tokens": tokens}) == before
    answer = batch["tokens"].copy()
    answer[batch["loss_mask"]] = 7
    assert loss(weights, {**batch, "tokens": answer}) != before


def test_the_fresh_model_is_as_unsure_as_a_uniform_guess(scene):
    _, weights, batch, loss = scene
    per_token = loss(weights, batch) / batch["loss_mask"].sum()
    assert 0.8 * np.log(512) < per_token < 1.2 * np.log(512)


def test_gradients_accumulated_over_parts_equal_those_of_the_whole_batch(scene):
    model, weights, batch, _ = scene
    trainable, frozen = stages.split(weights, "v1", "stage2")
    answers = batch["loss_mask"].sum(axis=(1, 2))
    assert answers[:2].sum() != answers[2:].sum(), "parts of equal size would not show a wrong weighting"
    results = []
    for accumulate in (1, 2):
        optimizer = optax.sgd(1.0)
        step = make_step(model, optimizer, lambda _: 1.0, accumulate=accumulate, chunk=64)
        state = new_state(jax.tree.map(jnp.copy, trainable), optimizer, 0)
        results.append(step(state, frozen, batch))
    (whole, whole_metrics), (parts, parts_metrics) = results
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(parts_metrics[name], value, rtol=1e-3, err_msg=name)
    assert whole_metrics["gradient_norm"] > 0
    for path, leaf in whole.trainable.items():
        np.testing.assert_allclose(parts.trainable[path], leaf, atol=2e-5, err_msg=path)


def test_stream_weights_are_averaged_over_the_questions_that_were_asked(scene):
    model, weights, batch, _ = scene
    _, sums = batch_loss(model, weights, batch, jax.random.key(0), chunk=64)
    asked = batch["loss_mask"].any(-1).sum()
    assert sums["questions"] == asked
    np.testing.assert_allclose(sums["streams"], [asked / 2, asked / 2], rtol=1e-5)  # a fresh gate is undecided
