"""Tests the authors' rewards, judgement and recipe against values by hand, which their public code gives too."""

import numpy as np
import pytest

from configs import coldstart, grpo
from favchat_jax.config import Config, PoolConfig
from favchat_jax.rl import published
from favchat_jax.rl.objective import group_advantages
from favchat_jax.rl.pool import Pool
from favchat_jax.rl.rewards import load
from favchat_jax.training.optimizer import schedule
from tests.rl.test_rewards import TARGETS, group


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # Seven words for each target: 3 of 7, 1 of 7 and 3 of 7.
        ("<answer>long black hair happy shaking the head</answer>", 0.4 * 3 / 7 + 0.3 / 7 + 0.3 * 3 / 7),
        ("<think>happy</think> <answer>long_black hair</answer> more", 0.4),  # an underscore separates words
        ("<answer>happy happy</answer>", 0.3),
        ("<answer>caf\u00e9 happy</answer>", 0.3 / 2),  # "caf" and "happy"
        # Without a complete answer, all words of the response count, those of the tags too.
        ("<answer>happy", 0.3 / 2),
        ("<think>long</think> <answer>happy", 0.4 / 6 + 0.3 / 4),
        ("<ANSWER>happy</ANSWER>", 0.3 / 2),
        # The first complete answer counts.
        ("<answer>red</answer> <answer>happy</answer>", 0.0),
        ("<answer></answer>", 0.0),
        ("", 0.0),
    ],
)
def test_the_facial_reward_equals_a_count_by_hand(response, expected):
    assert published.facial(group(response)) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("response", "expected"),
    [("<answer>long black hair</answer>", 0.4), ("<answer></answer>", 0.3), ("<answer>happy</answer>", 0.0)],
)
def test_only_an_empty_answer_earns_the_share_of_an_empty_target(response, expected):
    assert published.facial(group(response, targets={**TARGETS, "emotion": ""})) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("expected_answer", "reward"), [("<answer>a black hat</answer>", 2 / 3), ("black hat", 1.0), ("", 0.0)]
)
def test_without_targets_the_facial_reward_is_the_overlap_with_the_expected_answer(expected_answer, reward):
    asked = group("<answer>black hat</answer>", targets=dict.fromkeys(TARGETS, ""), answer=expected_answer)
    assert published.facial(asked) == [pytest.approx(reward)]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think> <answer>b</answer>", 1),
        ("<think>a\nb</think>\n\n<answer>c</answer>", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a<answer></think><answer>b</answer>c</answer>", 1),
        ("<think>a</think> z </think> <answer>b</answer> <answer>c</answer>", 1),
        (" <think>a</think> <answer>b</answer>", 0),
        ("<think>a</think> <answer>b</answer>\n", 0),
        ("<think>a</think> x <answer>b</answer>", 0),
        ("<Think>a</Think> <answer>b</answer>", 0),
        ("<answer>b</answer>", 0),
    ],
)
def test_the_format_reward_asks_for_both_tags_with_anything_inside(response, expected):
    assert published.form(group(response, complete=(False,))) == [expected]


def test_the_temporal_reward_compares_published_facial_rewards():
    happy, red = "<answer>happy</answer>", "<answer>red</answer>"
    # Means 0.3 and 0.24: the shuffled frames' 0.3 may be up to 1 / 0.8 larger. An unclosed answer earns 0.15.
    assert published.temporal(group(*[happy] * 4, red, shuffled=[happy])) == [0.3] * 4 + [0]
    assert published.temporal(group(happy, "<answer>happy", red, shuffled=[happy])) == [0, 0, 0]
    assert published.temporal(group(happy, "<answer>happy", shuffled=["<answer>happy"])) == [0.3, 0.3]


def test_the_length_reward_needs_two_good_responses():
    happy, red = "<answer>happy</answer>", "<answer>red</answer>"
    assert published.length(group(happy, happy, red, lengths=(320, 600, 400))) == [0.2, 0, 0]
    assert published.length(group(happy, red, red, lengths=(320, 512, 400))) == [0, 0, 0]


REWARDS = np.array([[0.0, 1.0, 2.0], [0.0, 3.0, 9.0], [0.0, 0.1, 0.3]])
LOG = -np.array([[1.0, 2.0, 4.0], [1.0, 3.0, 8.0], [1.0, 2.0, 4.0]])


def test_judgement_and_advantages_equal_values_by_hand():
    pool = Pool(3, PoolConfig(), seed=0, published=True)
    # Cube roots of the products of three differences: 2 x 6, 162 x 70 and 0.006 x 6.
    utility = np.cbrt([12.0, 162.0 * 70.0, 0.036])
    margins = np.array([4 / 3, 6.0, 0.2])
    deviations = np.array([1.0, np.sqrt(21.0), np.sqrt(0.07 / 3)])  # unbiased: divided by G - 1
    standard = (REWARDS - REWARDS.mean(1, keepdims=True)) / (deviations[:, None] + 1e-4)
    # 0.2, then 0.36 of the utility: 0.46 and 0.82, 4.5 and 8.1, 0.07 and 0.12.
    for share, delta in ((0.2, [1.0, 0.5, 0.0]), (0.36, [0.5, 0.5, 0.0])):
        weights, judged = pool.update(np.arange(3), REWARDS, LOG)
        np.testing.assert_allclose(judged, utility, rtol=2e-5)
        np.testing.assert_allclose(pool.score, share * utility, rtol=2e-5)
        np.testing.assert_allclose(weights, np.tanh(delta * margins))
        advantages = weights[:, None] * group_advantages(REWARDS, unbiased=True)
        np.testing.assert_allclose(advantages, np.tanh(delta * margins)[:, None] * standard, rtol=1e-4)
    np.testing.assert_allclose(advantages[0], [-0.582725, 0, 0.582725], rtol=1e-5)
    assert pool.states() == ["cool_down", "cool_down", "discard"]


def test_the_thresholds_themselves_keep_a_sample_at_full_weight():
    score = np.array([0.0, 0.19, 0.2, 0.8, 0.81])
    assert published.deltas(score, PoolConfig()).tolist() == [0, 0, 1, 1, 0.5]


def test_a_weight_is_negative_under_the_baseline():
    weights = published.weights(np.array([[0, 0.3], [0, 0.1]]), np.ones(2), baseline=0.2)
    np.testing.assert_allclose(weights, np.tanh([0.1, -0.1]))


def test_a_sample_without_weight_is_drawn_again_in_each_epoch_and_keeps_its_state():
    pool = Pool(5, PoolConfig(), seed=0, published=True)
    rewards, log = REWARDS[2:], LOG[2:]
    drawn = []
    for _ in range(15):
        samples = pool.draw(1)
        weights, utility = pool.update(samples, rewards, log)
        drawn += samples.tolist()
    assert all(sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4] for start in (0, 5, 10))
    np.testing.assert_allclose(pool.score, (1 - 0.8**3) * utility[0])
    assert weights == 0 and pool.states() == ["discard"] * 5
    # A group that is worth more lifts the state over the threshold, from wherever it was.
    weights, _ = pool.update(np.array([3]), 5 * rewards, log)
    assert pool.score[3] > 0.2 and weights == np.tanh(5 * 0.2)


@pytest.mark.parametrize(
    ("kind", "hint"), [("multiple choice", "letter"), ("numerical", "number"), ("hair", "sentence")]
)
def test_a_prompt_is_the_question_with_both_tags_and_a_hint_about_the_kind_of_answer(kind, hint):
    lines = published.prompt("What is {this}?", kind).splitlines()
    assert lines[0] == "What is {this}?" and len(lines) == 2
    assert all(tag in lines[1] for tag in ("<think>", "</think>", "<answer>", "</answer>")) and hint in lines[1]


def test_the_recipe_sets_the_authors_values():
    start = Config.from_ml_collections(coldstart.get_config("preset=paper,recipe=published"))
    assert (start.epochs, start.steps, start.batch) == (1.0, 0, 8)
    assert (start.optimizer.learning_rate, start.optimizer.clip_norm, start.optimizer.weight_decay) == (1e-6, 5.0, 0.0)
    config = Config.from_ml_collections(grpo.get_config("preset=paper,recipe=published"))
    settings, optimizer = config.reinforcement, config.optimizer
    assert (config.batch, config.steps) == (4, settings.samples // 4)
    assert (optimizer.learning_rate, optimizer.clip_norm, optimizer.weight_decay) == (1e-6, 5.0, 0.01)
    assert (settings.group, settings.beta, settings.max_new_tokens) == (8, 0.04, 768)
    assert (settings.temperature, settings.top_p, settings.updates) == (1.0, 0.95, 1)
    assert settings.published and settings.data_efficient and settings.shuffled_frames
    loaded = {name: (load(reward.path), reward.weight) for name, reward in settings.rewards.items()}
    assert loaded == {name: (getattr(published, name), 1.0) for name in ("facial", "form", "temporal", "length")}


def test_the_rates_of_the_recipe_fall_from_their_peak_without_a_warm_up():
    start = Config.from_ml_collections(coldstart.get_config("preset=paper,recipe=published")).optimizer
    config = Config.from_ml_collections(grpo.get_config("preset=paper,recipe=published")).optimizer
    line, cosine = schedule(start, 4), schedule(config, 4)
    np.testing.assert_allclose([line(step) for step in range(5)], 1e-6 * np.array([1, 0.75, 0.5, 0.25, 0]))
    expected = 1e-6 * (1 + np.cos(np.pi * np.arange(5) / 4)) / 2
    np.testing.assert_allclose([cosine(step) for step in range(5)], expected, atol=1e-13)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="recipe=mine is unknown: choose one of ours, published"):
        grpo.get_config("recipe=mine")
