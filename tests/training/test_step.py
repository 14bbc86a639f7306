import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.initial import initial_weights, new_state
from favchat_jax.models.favchat import Output
from favchat_jax.training.batches import open_batches
from favchat_jax.training.step import batch_loss, chunked_cross_entropy, make_step, next_token_targets


@pytest.fixture(scope="module")
def scene(small_world):
    """Model, weights and a batch of stage 2."""
    config = small_world.config("stage2")
    parts = assembly.assemble(config)
    with contextlib.closing(open_batches(parts)) as batches:
        batch = {name: array for name, array in next(batches).arrays.items() if name != "length"}
    weights = initial_weights(parts)
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


WORDS, HEAD = "llm/embed_tokens/embedding", "llm/lm_head/kernel"


class Bigrams:
    """Stands in for the model: the next word's scores follow from the last word alone, the clip is ignored."""

    def apply(self, variables, *inputs, method=None, **_):
        params = variables["params"]
        if method is not None:
            return inputs[0] @ params["llm"]["lm_head"]["kernel"]
        _, tokens, prompt, _ = inputs
        streams = jnp.broadcast_to(jnp.array([1.0, 0.0]), (*prompt.shape[:2], 3, 2))
        return Output(params["llm"]["embed_tokens"]["embedding"][jnp.maximum(tokens, 0)], streams)


def test_gradients_accumulated_over_parts_equal_those_of_the_whole_batch(scene):
    _, _, batch, _ = scene
    mask = np.array(batch["loss_mask"])
    mask[0, 1:] = False  # parts with equally many answers would not show a wrong weighting
    batch = {**batch, "loss_mask": mask}
    answers = mask.sum(axis=(1, 2))
    assert answers[::2].sum() != answers[1::2].sum()
    rng = np.random.default_rng(0)
    trainable = {WORDS: jnp.array(rng.normal(size=(512, 4)), jnp.float32)}
    frozen = {HEAD: jnp.array(rng.normal(size=(4, 512)), jnp.float32)}
    results = []
    for accumulate in (1, 2, 4):
        step = make_step(Bigrams(), optax.sgd(1.0), lambda _: 1.0, accumulate=accumulate, chunk=64)
        results.append(step(new_state(jax.tree.map(jnp.copy, trainable), optax.sgd(1.0), 0), frozen, batch))
    whole, whole_metrics = results[0]
    assert whole_metrics["gradient_norm"] > 0.1 and whole_metrics["answer_tokens"] == answers.sum()
    for parts, metrics in results[1:]:
        np.testing.assert_allclose(parts.trainable[WORDS], whole.trainable[WORDS], atol=1e-6)
        assert {name: pytest.approx(float(value), rel=1e-5) for name, value in whole_metrics.items()} == metrics


def test_a_step_counts_itself_and_draws_new_dropout_from_the_same_key(scene):
    _, _, batch, _ = scene
    keys = []

    class Recorder(Bigrams):
        def apply(self, variables, *inputs, rngs, **others):
            jax.debug.callback(lambda key: keys.append(key.tolist()), jax.random.key_data(rngs["dropout"]))
            return super().apply(variables, *inputs, **others)

    weights = {WORDS: jnp.zeros((512, 4)), HEAD: jnp.zeros((4, 512))}
    step = make_step(Recorder(), optax.sgd(1.0), lambda _: 1.0, accumulate=1, chunk=512)
    state = new_state(weights, optax.sgd(1.0), seed=3)
    for _ in range(2):
        state, _ = step(state, {}, batch)
    jax.effects_barrier()
    assert state.step == 2 and state.key.tolist() == jax.random.key_data(jax.random.key(3)).tolist()
    assert len({tuple(key) for key in keys}) == 4, "two of each step: one for the body, one for the output layer"


def test_stream_weights_are_averaged_over_the_questions_that_were_asked(scene):
    model, weights, batch, _ = scene
    _, sums = batch_loss(model, weights, batch, jax.random.key(0), chunk=64)
    asked = batch["loss_mask"].any(-1).sum()
    assert sums["questions"] == asked
    np.testing.assert_allclose(sums["streams"], [asked / 2, asked / 2], rtol=1e-5)  # a fresh gate is undecided


def test_nothing_compiles_after_the_first_step_of_each_bucket(scene, caplog):
    model, weights, batch, _ = scene
    lengths = [batch["tokens"].shape[-1], batch["tokens"].shape[-1] + 8]

    def padded(length):
        extra = [(0, 0), (0, 0), (0, length - batch["tokens"].shape[-1])]
        return {**batch, **{name: np.pad(batch[name], extra) for name in ("tokens", "loss_mask")}}

    optimizer = optax.sgd(1e-3)
    trainable = {path: leaf for path, leaf in weights.items() if "lora" in path}
    frozen = {path: leaf for path, leaf in weights.items() if path not in trainable}
    state = new_state(jax.tree.map(jnp.copy, trainable), optimizer, 0)
    state, frozen = jax.device_put((state, frozen), jax.devices()[0])
    update = make_step(model, optimizer, optax.constant_schedule(1e-3), accumulate=1, chunk=64)
    compiled = []
    for length in (*lengths, *reversed(lengths)):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            state, _ = update(state, frozen, padded(length))
        compiled.append(sum("Finished XLA compilation" in record.getMessage() for record in caplog.records))
    assert [count > 0 for count in compiled] == [True, True, False, False]
