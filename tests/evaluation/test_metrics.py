"""Metrics match cases computed by hand, scikit-learn and pycocoevalcap."""

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from favchat_jax.evaluation.metrics import (
    accuracy_by_kind,
    auc,
    cider,
    cohens_d,
    confusion,
    event_figures,
    exact_matches,
    majority_baseline,
    mean_figure,
    normalise,
    recall_figures,
    roc,
    rouge_l,
    uar,
    war,
    words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The hair is BLACK.", "hair is black"),
        ("  a   big\tnose \n", "big nose"),
        ("An eye, and another!", "eye and another"),
        ("no-beard", "no beard"),
        ("Theatre", "theatre"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalising_keeps_only_the_content_words(text, expected):
    assert normalise(text) == expected


def test_answers_that_differ_only_in_case_punctuation_and_articles_match():
    assert exact_matches(["Yes.", "the hair is black", "black"], ["yes", "Hair is black!", "blonde"]) == [
        True,
        True,
        False,
    ]


def test_a_part_of_the_reference_or_a_longer_answer_does_not_match():
    assert exact_matches(["black", "black hair", ""], ["black hair", "black", "black"]) == [False, False, False]


def test_different_numbers_of_predictions_and_references_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        exact_matches(["yes"], ["yes", "no"])


def test_accuracy_is_computed_per_kind_in_alphabetical_order():
    result = accuracy_by_kind([True, False, True, True], ["mole", "hair", "hair", "hair"])
    assert result == {"hair": {"n": 3, "accuracy": pytest.approx(2 / 3)}, "mole": {"n": 1, "accuracy": 1.0}}
    assert list(result) == ["hair", "mole"]


def test_the_majority_baseline_is_the_share_of_each_kinds_most_frequent_normalised_answer():
    references = ["Yes.", "yes", "no", "black", "the black", "blonde", "gray"]
    kinds = ["mole", "mole", "mole", "hair", "hair", "hair", "hair"]
    assert majority_baseline(references, kinds) == {"hair": 0.5, "mole": pytest.approx(2 / 3)}


def test_cohens_d_is_the_difference_of_means_in_pooled_standard_deviations():
    # Means 3 and 1; squares around them 2 and 8 over 2 + 3 - 2 degrees of freedom: a variance of 10/3.
    assert cohens_d([2, 4], [-1, 1, 3]) == pytest.approx(2 / (10 / 3) ** 0.5)
    assert cohens_d([1, 2], [2, 1]) == 0
    assert cohens_d([1, 1], [0, 0]) == float("inf")


# Classes


def confusions(cases: int):
    """Random expected and predicted classes; a prediction may be none, and a class may have no samples."""
    rng = np.random.default_rng(0)
    for _ in range(cases):
        classes, n = int(rng.integers(2, 12)), int(rng.integers(1, 60))
        expected = rng.integers(0, rng.integers(1, classes + 1), n)
        predicted = np.where(rng.random(n) < 0.5, expected, rng.integers(0, classes + 1, n))
        yield classes, expected.tolist(), [None if p == classes else int(p) for p in predicted]


def test_uar_and_war_match_scikit_learns_recall_and_accuracy_on_1000_random_cases():
    for classes, expected, predicted in confusions(1000):
        counts = confusion(expected, predicted, classes)
        said = [classes if p is None else p for p in predicted]
        recalls = recall_score(expected, said, labels=sorted(set(expected)), average="macro", zero_division=0)
        assert abs(uar(counts) - recalls) < 1e-6
        assert abs(war(counts) - accuracy_score(expected, said)) < 1e-6


def test_answers_without_a_class_are_counted_in_the_last_column():
    assert confusion([0, 0, 1], [0, None, None], 2).tolist() == [[1, 0, 1], [0, 0, 1]]
    assert confusion([], [], 2).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_recall_figures_are_means_over_the_folds_that_have_samples():
    one, other = np.array([[3, 1, 0], [0, 4, 0]]), np.array([[1, 1, 0], [0, 0, 2]])
    found = recall_figures([one, other, np.zeros((2, 3), int)], seed=0)
    assert found["war"]["value"] == pytest.approx((7 / 8 + 1 / 4) / 2)
    assert found["uar"]["value"] == pytest.approx(((3 / 4 + 1) / 2 + (1 / 2 + 0) / 2) / 2)
    assert all(f["low"] < f["value"] < f["high"] and f["scale"] == 100 for f in found.values())
    assert recall_figures([], seed=0)["war"] == {"value": None, "low": None, "high": None, "scale": 100}


# Intervals


def test_with_many_samples_the_interval_of_a_mean_matches_the_normal_approximation():
    hits = np.random.default_rng(1).random(2000) < 0.3
    found = mean_figure(hits, seed=0)
    margin = 1.96 * hits.std() / 2000**0.5
    assert found["value"] == pytest.approx(hits.mean())
    assert found["low"] == pytest.approx(hits.mean() - margin, abs=0.15 * margin)
    assert found["high"] == pytest.approx(hits.mean() + margin, abs=0.15 * margin)


def test_intervals_cover_the_true_value_in_about_95_percent_of_cases():
    rng = np.random.default_rng(2)
    found = [mean_figure(rng.random(80) < 0.4, seed) for seed in range(200)]
    assert 0.90 < np.mean([f["low"] <= 0.4 <= f["high"] for f in found]) < 0.99


def test_questions_of_one_clip_are_drawn_together():
    # Ten clips with four equal answers each carry the information of ten answers.
    hits, clips = np.repeat([1, 0] * 5, 4), np.repeat(np.arange(10), 4)
    alone, together = mean_figure(hits, 0), mean_figure(hits, 0, clusters=clips.tolist())
    assert alone["value"] == together["value"] == 0.5
    assert together["high"] - together["low"] > 1.6 * (alone["high"] - alone["low"])


def test_an_interval_is_reproducible():
    assert mean_figure([0, 1, 1], 7) == mean_figure([0, 1, 1], 7)
    assert mean_figure([], 7) == {"value": None, "low": None, "high": None, "scale": 1}


# Captions


def sentences(rng: np.random.Generator, most: int) -> list[str]:
    return [" ".join(rng.choice(WORDS, rng.integers(0, 12))) for _ in range(rng.integers(1, most + 1))]


WORDS = np.array(["the", "man", "smiles", "raises", "his", "eyebrows", "赤い", "naïve", "🙂", "middle-aged"])


def test_rouge_l_matches_pycocoevalcap_on_1000_random_cases():
    rng, reference = np.random.default_rng(3), Rouge()
    for _ in range(1000):
        answer, group = sentences(rng, 1)[0], sentences(rng, 3)
        ours = rouge_l(answer.split(), [text.split() for text in group])
        assert abs(ours - reference.calc_score([answer], group)) < 1e-6


def test_cider_matches_pycocoevalcap_on_1000_random_cases():
    rng = np.random.default_rng(4)
    compared = 0
    while compared < 1000:
        answers = [sentences(rng, 1)[0] for _ in range(rng.integers(2, 30))]
        groups = [sentences(rng, 3) for _ in answers]
        _, theirs = Cider().compute_score(dict(enumerate(groups)), {i: [text] for i, text in enumerate(answers)})
        ours = cider([text.split() for text in answers], [[text.split() for text in group] for group in groups])
        assert np.abs(np.array(ours) - theirs).max() < 1e-6
        compared += len(answers)


@pytest.mark.parametrize("answer", ["", "smiles", "赤い 🙂", "the the the the", "the man smiles"])
@pytest.mark.parametrize("reference", ["smiles", "", "赤い 🙂", "the man smiles"])
def test_rouge_l_and_cider_match_pycocoevalcap_on_empty_and_repetitive_captions(answer, reference):
    assert abs(rouge_l(answer.split(), [reference.split()]) - Rouge().calc_score([answer], [reference])) < 1e-6
    groups, answers = [[reference], ["a woman frowns"]], [answer, "a woman"]
    _, theirs = Cider().compute_score(dict(enumerate(groups)), {i: [text] for i, text in enumerate(answers)})
    ours = cider([text.split() for text in answers], [[text.split() for text in group] for group in groups])
    assert np.abs(np.array(ours) - theirs).max() < 1e-6


def test_captions_are_split_into_words_as_in_the_treebank():
    text = "He doesn't frown: the middle-aged man's eyes, wide open… (“surprise”)!"
    assert words(text) == [
        *("he", "does", "n't", "frown", "the", "middle-aged", "man", "'s", "eyes", "wide", "open", "surprise"),
    ]
    assert words("") == [] and words("…") == [] and words("Über 赤い") == ["über", "赤い"]


# Events


def test_autodq_is_the_f1_of_mean_recall_and_mean_precision():
    recalled, supported = [[True, False], [True, True], []], [[True], [], [True, False]]
    found = event_figures(recalled, supported, seed=0)
    recall, precision = (0.5 + 1) / 2, (1 + 0 + 0.5) / 3  # the third reference has no events to recall
    assert found["autodq_recall"]["value"] == pytest.approx(recall)
    assert found["autodq_precision"]["value"] == pytest.approx(precision)
    assert found["autodq"]["value"] == pytest.approx(2 * recall * precision / (recall + precision))
    assert found["autodq"]["low"] <= found["autodq"]["value"] <= found["autodq"]["high"]
    assert event_figures([[False]], [[False]], seed=0)["autodq"]["value"] == 0


# Pairs


def test_the_area_under_the_roc_curve_matches_scikit_learn_also_with_ties():
    rng = np.random.default_rng(5)
    for _ in range(300):
        same = np.arange(rng.integers(2, 40)) % 2 == 0
        scores = rng.integers(0, 5, len(same)).astype(float)
        assert abs(auc(same, scores) - roc_auc_score(same, scores)) < 1e-6


def test_a_roc_curve_runs_from_corner_to_corner_and_needs_both_kinds_of_pairs():
    curve = roc([True, False, True], [2.0, 1.0, 0.5])
    assert (curve["x"][0], curve["y"][0], curve["x"][-1], curve["y"][-1]) == (0, 0, 1, 1)
    assert roc([True, True], [1.0, 2.0])["x"] == []
