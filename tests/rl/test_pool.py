"""Tests utility, states and draws by hand, and the properties that the published form lacks."""

import json

import numpy as np
import pytest

from favchat_jax.config import PoolConfig
from favchat_jax.errors import UserError
from favchat_jax.rl.objective import pairwise
from favchat_jax.rl.pool import Pool, saturating
from favchat_jax.rl.published import utilities

SPREAD = np.array([[0.0, 0.4, 0.8]])  # mean pairwise difference 1.6 / 3
LOG = np.array([[-1.0, -1.3, -1.6]])  # 1.2 / 3


def groups(*rows):
    return np.array(rows, float)


def test_pairwise_differences_are_those_of_every_pair():
    np.testing.assert_allclose(pairwise(groups([0, 1, 3])), [[1, 3, 2]])
    assert pairwise(np.zeros((2, 8))).shape == (2, 28)


def test_a_saturating_share_is_a_half_for_the_usual_and_defined_if_nothing_varies():
    np.testing.assert_allclose(saturating(np.array([0.0, 2.0, 6.0]), 2.0), [0, 0.5, 0.75])
    np.testing.assert_array_equal(saturating(np.zeros(2), 0.0), 0)


def test_the_first_sample_is_the_usual_one_and_later_ones_are_measured_against_a_running_mean():
    pool = Pool(5, PoolConfig(), seed=0)
    weights, utility = pool.update(np.array([0]), SPREAD, LOG)
    assert utility == pytest.approx([0.5]) and weights == pytest.approx([1.0])
    # Three times the spread of rewards: R = 1.6, R' = 0.8 x 1.6/3 + 0.2 x 1.6; P as usual.
    _, utility = pool.update(np.array([1]), 3 * SPREAD, LOG)
    usual = 0.8 * 1.6 / 3 + 0.2 * 1.6
    assert utility == pytest.approx([np.sqrt(1.6 / (1.6 + usual) * 0.5)])


def test_utility_does_not_change_with_the_size_of_rewards_or_log_probabilities():
    rng = np.random.default_rng(0)
    rewards, log = rng.random((3, 4, 8)), -rng.random((3, 4, 8))
    one, other = Pool(12, PoolConfig(), seed=0), Pool(12, PoolConfig(), seed=0)
    for step in range(3):
        samples = np.arange(4) + 4 * step
        small, _ = one.update(samples, rewards[step], log[step])[::-1]
        large, _ = other.update(samples, 70 * rewards[step], 0.01 * log[step])[::-1]
        np.testing.assert_allclose(small, large, rtol=1e-9)
    assert utilities(70 * rewards[0], log[0])[0] > 10 * utilities(rewards[0], log[0])[0]


def test_one_tie_costs_little_but_brings_the_published_utility_close_to_zero():
    different, tied = groups([0.0, 0.3, 0.6, 0.9]), groups([0.0, 0.3, 0.6, 0.6])
    log = groups([-1.0, -1.1, -1.2, -1.3])
    pool = Pool(2, PoolConfig(), seed=0)
    _, utility = pool.update(np.array([0, 1]), np.concatenate([different, tied]), np.concatenate([log, log]))
    assert utility[1] > 0.8 * utility[0]
    assert utilities(tied, log)[0] < 0.15 * utilities(different, log)[0]


@pytest.mark.parametrize("tied", ["rewards", "log_probabilities"])
def test_a_group_without_differences_has_no_utility(tied):
    pool = Pool(2, PoolConfig(), seed=0)
    values = {"rewards": np.concatenate([SPREAD, SPREAD]), "log_probabilities": np.concatenate([LOG, LOG])}
    values[tied][1] = values[tied][1, 0]
    weights, utility = pool.update(np.array([0, 1]), **values)
    assert utility[1] == 0 < utility[0]
    np.testing.assert_allclose(weights, [2, 0])


def test_the_published_utility_is_the_product_of_two_geometric_means():
    rewards, log = groups([0.0, 0.1, 0.3]), groups([-1.0, -1.5, -3.0])
    expected = np.cbrt(0.1 * 0.3 * 0.2) * np.cbrt(0.5 * 2.0 * 1.5)
    np.testing.assert_allclose(utilities(rewards, log), [expected], rtol=1e-4)


def visit(pool, sample, utility):
    """Visits one sample with a given utility; returns its weight."""
    pool._utility = lambda *_: np.array([utility])
    return pool.update(np.array([sample]), SPREAD, LOG)[0][0]


def test_the_state_is_the_first_utility_and_then_smoothed():
    pool = Pool(1, PoolConfig(), seed=0)
    visit(pool, 0, 0.6)
    assert pool.score[0] == pytest.approx(0.6)
    visit(pool, 0, 0.1)
    assert pool.score[0] == pytest.approx(0.8 * 0.6 + 0.2 * 0.1)


def test_a_sample_is_discovered_then_judged_and_a_useless_one_is_never_drawn_again():
    pool = Pool(3, PoolConfig(discovery=2), seed=0)
    assert pool.counts() == {"discover": 3, "exploit": 0, "cool_down": 0, "discard": 0}
    visit(pool, 0, 0.0)
    assert pool.states()[0] == "discover", "one bad visit discards no sample"
    visit(pool, 0, 0.0)
    for _ in range(2):
        visit(pool, 1, 0.5)
        visit(pool, 2, 0.95)
    assert pool.states() == ["discard", "exploit", "cool_down"]
    assert pool.counts() == {"discover": 0, "exploit": 1, "cool_down": 1, "discard": 1}
    assert not any(0 in pool.draw(2) for _ in range(50))


@pytest.mark.parametrize(
    ("score", "state"), [(0.19, "discard"), (0.2, "discard"), (0.21, "exploit"), (0.8, "exploit"), (0.81, "cool_down")]
)
def test_thresholds_separate_the_states(score, state):
    pool = Pool(1, PoolConfig(discovery=1), seed=0)
    visit(pool, 0, score)
    assert pool.states()[0] == state


def test_a_sample_that_was_useful_and_is_solved_is_discarded_in_the_end():
    pool, visits = Pool(1, PoolConfig(), seed=0), 0
    visit(pool, 0, 0.5)
    while pool.states()[0] != "discard":
        visit(pool, 0, 0.0)
        visits += 1
    assert visits == 5, "0.5 x 0.8^5 = 0.16 is the first under 0.2"


def test_a_sample_that_cools_down_counts_half_and_rests():
    pool = Pool(3, PoolConfig(discovery=1, rest=4), seed=0)
    pool.draw(1)  # iteration 1
    pool._utility = lambda *_: np.array([0.9, 0.45])
    weights, _ = pool.update(np.array([0, 1]), np.tile(SPREAD, (2, 1)), np.tile(LOG, (2, 1)))
    np.testing.assert_allclose(weights, [1, 1])  # 0.5 x 0.9 and 1 x 0.45
    assert not any(0 in pool.draw(2) for _ in range(4))  # iterations 2 to 5
    assert any(0 in pool.draw(2) for _ in range(20))


def test_resting_samples_are_drawn_if_too_few_others_are_left():
    pool = Pool(2, PoolConfig(discovery=1, rest=10), seed=0)
    for sample in range(2):
        visit(pool, sample, 0.9)
    assert sorted(pool.draw(2)) == [0, 1]


def test_weights_are_never_negative_and_average_to_one():
    rng = np.random.default_rng(0)
    pool = Pool(40, PoolConfig(), seed=0)
    for _ in range(30):
        samples = pool.draw(8)
        if not len(samples):
            break
        rewards = rng.integers(0, 3, (len(samples), 6)) / 2
        weights, utility = pool.update(samples, rewards, -rng.random((len(samples), 6)))
        assert (weights >= 0).all() and ((utility >= 0) & (utility < 1)).all()
        assert weights.mean() == pytest.approx(1) or not weights.any()


def test_draws_hold_no_sample_twice_and_follow_the_scores():
    pool = Pool(4, PoolConfig(discovery=1), seed=0)
    for sample, utility in enumerate((0.3, 0.75)):
        visit(pool, sample, utility)
    counts = np.zeros(4)
    for _ in range(4000):
        drawn = pool.draw(1)
        counts[drawn] += 1
        assert len(set(pool.draw(3).tolist())) == 3
    # 0.3, 0.75, and the prior of 1/2 before the first visit.
    np.testing.assert_allclose(counts / 4000, np.array([0.3, 0.75, 0.5, 0.5]) / 2.05, atol=0.03)


def test_fewer_samples_are_drawn_if_fewer_are_left_and_none_from_an_empty_pool():
    pool = Pool(3, PoolConfig(discovery=1), seed=0)
    visit(pool, 0, 0.0)
    assert sorted(pool.draw(3)) == [1, 2]
    visit(pool, 1, 0.0)
    visit(pool, 2, 0.0)
    assert len(pool.draw(3)) == 0


def test_plain_grpo_visits_every_sample_once_an_epoch_and_weighs_all_alike():
    pool = Pool(6, PoolConfig(), seed=0, efficient=False)
    drawn = [pool.draw(4) for _ in range(3)]
    assert np.bincount(np.concatenate(drawn), minlength=6).tolist() == [2] * 6
    weights, _ = pool.update(drawn[0], np.zeros((4, 3)), np.zeros((4, 3)))
    np.testing.assert_array_equal(weights, 1)
    assert pool.counts()["discard"] == 0


@pytest.mark.parametrize("efficient", [True, False])
def test_a_bad_sample_is_never_drawn_again_and_belongs_to_no_state(efficient):
    pool = Pool(4, PoolConfig(), seed=0, efficient=efficient)
    drawn = pool.draw(2).tolist()
    pool.leave_out(drawn[0])
    more = pool.draw_more(1, drawn[1:]).tolist()
    assert pool.iteration == 1 and not set(more) & set(drawn)
    assert {sample for _ in range(20) for sample in pool.draw(2).tolist()} == set(range(4)) - {drawn[0]}
    assert sum(pool.counts().values()) == 3


@pytest.mark.parametrize("efficient", [True, False])
def test_nothing_is_drawn_if_all_samples_are_bad(efficient):
    pool = Pool(2, PoolConfig(), seed=0, efficient=efficient)
    for sample in range(2):
        pool.leave_out(sample)
    assert len(pool.draw(2)) == 0


def test_a_pool_of_another_size_does_not_resume():
    with pytest.raises(UserError, match="the checkpoint's pool has 3 samples, this data has 2"):
        Pool(2, PoolConfig(), seed=0).set_state(Pool(3, PoolConfig(), seed=0).get_state())


def test_a_checkpoint_from_before_bad_samples_were_left_out_resumes():
    state = Pool(2, PoolConfig(), seed=0).get_state()
    del state["bad"]
    pool = Pool(2, PoolConfig(), seed=0)
    pool.set_state(state)
    assert not pool.bad


@pytest.mark.parametrize("efficient", [True, False])
def test_a_pool_resumes_exactly_from_its_state(efficient):
    def step(pool, rng):
        samples = pool.draw(3)
        weights, utility = pool.update(samples, rng.random((len(samples), 4)), -rng.random((len(samples), 4)))
        return samples.tolist(), weights.tolist(), utility.tolist()

    one, rng = Pool(10, PoolConfig(), 3, efficient=efficient), np.random.default_rng(1)
    one.leave_out(4)
    for _ in range(7):
        step(one, rng)
    other = Pool(10, PoolConfig(), 99, efficient=efficient)
    other.set_state(json.loads(json.dumps(one.get_state())))
    again = np.random.default_rng()
    again.bit_generator.state = rng.bit_generator.state
    for _ in range(7):
        assert step(one, rng) == step(other, again)
    assert one.get_state() == other.get_state()
