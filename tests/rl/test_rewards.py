"""Tests rewards against words counted by hand, and the messages about rewards that fail."""

import dataclasses

import pytest

from favchat_jax.errors import UserError
from favchat_jax.rl import rewards
from favchat_jax.rl.rewards import Group, evaluate, facial_score, form, jaccard, words

TARGETS = {"attributes": "long black hair", "emotion": "happy", "action": "shaking the head"}


def group(*responses, targets=TARGETS, lengths=None, complete=None, shuffled=(), answer=""):
    many, complete = len(responses), complete or (True,) * len(responses)
    return Group("clip 7", "Who?", targets, responses, lengths or (10,) * many, complete, tuple(shuffled), answer)


def thought(answer):
    return f"<think>I see.</think> <answer>{answer}</answer>"


def test_words_are_a_set_in_lower_case_without_punctuation_and_tags():
    assert words("A <answer>hat, a Hat!</answer>\n RED-hat") == {"a", "hat", "red"}
    assert words("") == words("...") == frozenset()


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [({"a", "b"}, {"b", "c"}, 1 / 3), ({"a"}, {"a"}, 1), ({"a"}, {"b"}, 0), (set(), {"b"}, 0), (set(), set(), 0)],
)
def test_jaccard_is_shared_words_over_all_words(one, other, expected):
    assert jaccard(frozenset(one), frozenset(other)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # All words of all targets: each overlap is 1.
        ("long black hair happy shaking the head", 1.0),
        # Attributes 2 of 3; "happy" and nothing else; action none.
        ("black hair happy", 0.4 * 2 / 3 + 0.3),
        # "red" belongs to no target and counts against each: 3/4, 1/2, 3/4.
        ("long black hair, happy, shaking the head, red", 0.4 * 3 / 4 + 0.3 / 2 + 0.3 * 3 / 4),
        # A word twice counts once.
        ("happy happy", 0.3),
        ("", 0.0),
        ("blue", 0.0),
    ],
)
def test_the_facial_score_equals_a_count_by_hand(answer, expected):
    assert facial_score(answer, TARGETS) == pytest.approx(expected)


def test_a_word_of_two_targets_counts_for_both():
    targets = {"attributes": "head up", "emotion": "sad", "action": "head down"}
    # Attributes: {head, up} complete; action: "up" is explained, {head} of {head, down}.
    assert facial_score("head up", targets) == pytest.approx(0.4 + 0.3 / 2)


@pytest.mark.parametrize("empty", ["", "  ", "..."])
def test_the_weight_of_an_empty_target_goes_to_the_others(empty):
    targets = {"attributes": "hat", "emotion": empty, "action": "nodding"}
    assert facial_score("hat nodding", targets) == pytest.approx(1.0)
    assert facial_score("hat", targets) == pytest.approx(0.4 / 0.7)
    assert facial_score("hat", {"attributes": "hat"}) == pytest.approx(1.0)


@pytest.mark.parametrize("targets", [{}, {"attributes": "", "emotion": " ", "action": "!"}])
def test_a_sample_without_any_target_is_refused(targets):
    with pytest.raises(UserError, match="all of attributes, emotion and action targets are empty"):
        facial_score("hat", targets)


def test_only_the_answer_earns_the_facial_reward_not_the_thought():
    recited = "<think>long black hair happy shaking the head</think> <answer>happy</answer>"
    assert rewards.facial(group(recited, "happy")) == [pytest.approx(0.3), pytest.approx(0.3)]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think> <answer>b</answer>", 1),
        ("  <think>a\nb</think>\n\n<answer>c\nd</answer>\n", 1),
        ("<think>a</think><answer>b</answer>", 1),
        ("<think></think> <answer>b</answer>", 0),
        ("<think>a</think> <answer> </answer>", 0),
        ("<think>a</think> <answer>b", 0),
        ("so: <think>a</think> <answer>b</answer>", 0),
        ("<think>a</think> <answer>b</answer> and more", 0),
        ("<think>a</think> well <answer>b</answer>", 0),
        ("<answer>b</answer> <think>a</think>", 0),
        ("<think>a<think>a</think> <answer>b</answer>", 0),
        ("<think>a</think> <answer>b</answer> <answer>c</answer>", 0),
        ("b", 0),
        ("", 0),
    ],
)
def test_the_format_reward_asks_for_a_thought_and_an_answer_and_nothing_else(response, expected):
    assert form(group(response)) == [expected]


def test_a_response_cut_at_the_limit_earns_no_format_reward():
    assert form(group(thought("b"), thought("b"), complete=(True, False))) == [1, 0]


@pytest.mark.parametrize(
    ("responses", "shuffled", "expected"),
    [
        # Means 0.3 and 0.15 ordered against 0.3 shuffled: at least 0.8 of it, or less.
        (("happy", "happy"), ("happy", "happy"), [0.3, 0.3]),
        (("happy", "red"), ("happy", "happy"), [0, 0]),
        # Exactly 0.8 of the shuffled mean is enough; a response with a reward of at most 0.1 earns nothing.
        (("happy",) * 4 + ("red",), ("happy",) * 5, [0.3] * 4 + [0]),
    ],
)
def test_the_temporal_reward_goes_to_good_responses_if_the_order_of_frames_matters(responses, shuffled, expected):
    assert rewards.temporal(group(*responses, shuffled=shuffled)) == expected


def test_the_temporal_reward_needs_responses_about_shuffled_frames():
    with pytest.raises(ValueError, match="needs responses about shuffled frames"):
        rewards.temporal(group("happy"))


def test_the_length_reward_goes_to_good_responses_of_320_to_512_tokens():
    lengths = (319, 320, 512, 513, 400)
    assert rewards.length(group("happy", "happy", "happy", "happy", "red", lengths=lengths)) == [0, 0.2, 0.2, 0, 0]


def test_a_single_good_response_earns_no_length_reward():
    assert rewards.length(group("happy", "red", lengths=(400, 400))) == [0, 0]


def test_a_reward_is_found_by_its_import_path():
    assert rewards.load("favchat_jax.rl.rewards:facial") is rewards.facial


@pytest.mark.parametrize("path", ["facial", "nowhere:facial", "favchat_jax.rl.rewards:none", ":", "json:__name__", ""])
def test_a_path_without_a_reward_function_is_refused(path):
    with pytest.raises(UserError, match="write it as module:function"):
        rewards.load(path)


def test_the_total_is_the_weighted_sum_of_rewards():
    parts = evaluate({"facial": (rewards.facial, 2.0), "form": (form, 0.5)}, group(thought("happy"), "happy", "red"))
    assert parts["facial"] == pytest.approx([0.3, 0.3, 0])
    assert parts["form"] == pytest.approx([1, 0, 0])
    assert parts["total"] == pytest.approx([1.1, 0.6, 0])


def broken(_):
    raise KeyError("colour")


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (broken, "reward mine of clip clip 7 raised KeyError: colour"),
        (lambda g: [1.0], "reward mine of clip clip 7 gave 1 values for 2 responses"),
        (lambda g: [1.0, float("nan")], "gave .*nan.*: rewards must be finite numbers"),
        (lambda g: [1.0, None], "raised TypeError"),
        (lambda g: rewards.facial(dataclasses.replace(g, targets={})), "clip 7: all of attributes"),
    ],
)
def test_an_error_about_a_failing_reward_names_it_and_the_clip(reward, says):
    with pytest.raises(UserError, match=says):
        evaluate({"mine": (reward, 1.0)}, group("a", "b"))
