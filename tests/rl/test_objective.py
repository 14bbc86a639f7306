"""Tests advantages, KL and the clipped ratio against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.rl.objective import STD_FLOOR, clipped_gain, group_advantages, k3, loss


def test_advantages_are_rewards_in_standard_deviations_from_their_groups_mean():
    # Mean 2 and deviation 1; mean 0.5 and deviation 0.5.
    advantages = group_advantages(np.array([[1.0, 3.0, 1.0, 3.0], [0.0, 0.0, 1.0, 1.0]]))
    np.testing.assert_allclose(advantages, [[-1, 1, -1, 1], [-1, -1, 1, 1]], rtol=3 * STD_FLOOR)


def test_unbiased_advantages_divide_the_squares_by_one_response_less():
    # Deviations -2, 0 and 2: squares 8 over 2.
    np.testing.assert_allclose(group_advantages(np.array([[0.0, 2.0, 4.0]]), unbiased=True), [[-1, 0, 1]], rtol=1e-4)


def test_a_group_of_equal_rewards_has_no_advantage():
    np.testing.assert_allclose(group_advantages(np.full((2, 3), 0.7)), 0, atol=1e-9)


def test_k3_is_zero_for_equal_policies_and_positive_for_others():
    policy = jnp.log(jnp.array([0.5, 0.5, 0.5]))
    reference = jnp.log(jnp.array([0.5, 0.25, 1.0]))
    # Ratios 1, 1/2 and 2: r - log r - 1.
    np.testing.assert_allclose(k3(policy, reference), [0, 0.5 + np.log(2) - 1, 2 - np.log(2) - 1], atol=1e-6)


def test_a_bound_cuts_the_log_ratio_of_k3():
    policy, reference = jnp.array([-20.0, -1.0, -1.0]), jnp.array([-1.0, -20.0, -2.0])
    np.testing.assert_allclose(k3(policy, reference, 10.0), [np.exp(10) - 11, np.exp(-10) + 9, np.exp(-1)], rtol=1e-5)


def test_k3_is_the_kl_divergence_on_average_over_what_the_policy_draws():
    policy, reference = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    divergence = np.sum(policy * np.log(policy / reference))
    np.testing.assert_allclose(np.sum(policy * k3(np.log(policy), np.log(reference))), divergence, rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain"),
    [
        (1.0, 2.0, 2.0),
        (1.1, 2.0, 2.2),
        (1.5, 2.0, 2.4),  # at most 1.2 counts for a good response
        (0.5, 2.0, 1.0),
        (0.5, -2.0, -1.6),  # and at least 0.8 for a bad one
        (1.5, -2.0, -3.0),
        (3.0, 0.0, 0.0),
    ],
)
def test_a_ratio_beyond_the_clip_gains_no_more(ratio, advantage, gain):
    one = jnp.float32(jnp.log(ratio))
    np.testing.assert_allclose(clipped_gain(one, jnp.float32(0), jnp.float32(advantage), 0.2), gain, rtol=1e-5)


COUNTED = np.array([[[True, True, False], [True, False, False]]])


def test_the_loss_is_the_average_over_responses_of_the_average_over_their_tokens():
    policy = np.log(np.array([[[0.5, 0.6, 0.9], [0.2, 0.9, 0.9]]], np.float32))
    old = np.log(np.array([[[0.5, 0.5, 0.1], [0.4, 0.1, 0.1]]], np.float32))
    reference = np.log(np.array([[[0.25, 0.6, 0.9], [0.2, 0.9, 0.9]]], np.float32))
    value, parts = loss(policy, old, reference, np.array([[1.0, -2.0]]), COUNTED, beta=0.1, clip=0.15)
    # Ratios 1 and 1.2 (clipped to 1.15) with advantage 1; ratio 0.5 (clipped to 0.85) with advantage -2.
    gain = ((1 + 1.15) / 2 + 0.85 * -2) / 2
    kl = ((0.5 + np.log(2) - 1 + 0) / 2 + 0) / 2
    np.testing.assert_allclose(parts["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(value, 0.1 * kl - gain, rtol=1e-4)
    np.testing.assert_allclose(parts["clipped"], (1 / 2 + 1) / 2, rtol=1e-5)


def test_padding_changes_neither_the_loss_nor_its_gradient_whatever_it_holds():
    rng = np.random.default_rng(0)
    policy, old, reference = -rng.random((3, 1, 2, 3)).astype(np.float32)
    advantages = np.array([[1.0, -0.5]], np.float32)

    def value(policy, old, reference):
        return loss(policy, old, reference, advantages, COUNTED, beta=0.1, clip=0.2)[0]

    spoiled = [np.where(COUNTED, x, -np.inf) for x in (policy, old, reference)]
    np.testing.assert_allclose(value(policy, old, reference), value(*spoiled))
    gradient = jax.grad(value)(policy, old, reference)
    np.testing.assert_allclose(jax.grad(value)(*spoiled), gradient)
    np.testing.assert_array_equal(np.asarray(gradient) != 0, COUNTED)


def test_at_the_old_policy_the_gradient_is_that_of_the_policy_gradient():
    policy = np.log(np.full((1, 2, 3), 0.5, np.float32))
    advantages = np.array([[1.0, -2.0]], np.float32)
    gradient = jax.grad(lambda p: loss(p, policy, policy, advantages, COUNTED, beta=0.04, clip=0.2)[0])(policy)
    # -A over two responses and over their 2 and 1 tokens; k3 is flat at equal policies.
    np.testing.assert_allclose(gradient[0], [[-0.25, -0.25, 0], [1, 0, 0]], atol=1e-6)


def test_a_response_without_tokens_adds_nothing():
    zeros = np.zeros((1, 2, 3), np.float32)
    value, parts = loss(zeros, zeros, zeros, np.ones((1, 2)), np.zeros((1, 2, 3), bool), beta=0.04, clip=0.2)
    assert value == 0 and parts["kl"] == 0
