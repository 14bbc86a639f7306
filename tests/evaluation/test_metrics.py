"""Figures of merit on cases worked out by hand."""

import pytest

from favchat_jax.evaluation.metrics import accuracy_by_kind, cohens_d, exact_matches, majority_baseline, normalise


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
def test_normalising_keeps_the_content_words(text, expected):
    assert normalise(text) == expected


def test_answers_match_where_they_differ_in_wording_only():
    assert exact_matches(["Yes.", "the hair is black", "black"], ["yes", "Hair is black!", "blonde"]) == [
        True,
        True,
        False,
    ]


def test_a_part_of_the_reference_or_more_than_it_is_no_match():
    assert exact_matches(["black", "black hair", ""], ["black hair", "black", "black"]) == [False, False, False]


def test_predictions_and_references_of_different_number_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        exact_matches(["yes"], ["yes", "no"])


def test_accuracy_counts_each_kind_by_itself_in_alphabetical_order():
    result = accuracy_by_kind([True, False, True, True], ["mole", "hair", "hair", "hair"])
    assert result == {"hair": {"n": 3, "accuracy": pytest.approx(2 / 3)}, "mole": {"n": 1, "accuracy": 1.0}}
    assert list(result) == ["hair", "mole"]


def test_the_majority_baseline_is_the_share_of_each_kinds_commonest_answer_once_normalised():
    references = ["Yes.", "yes", "no", "black", "the black", "blonde", "gray"]
    kinds = ["mole", "mole", "mole", "hair", "hair", "hair", "hair"]
    assert majority_baseline(references, kinds) == {"hair": 0.5, "mole": pytest.approx(2 / 3)}


def test_cohens_d_is_the_distance_of_means_in_pooled_standard_deviations():
    # Means 3 and 1; squares around them 2 and 8 over 2 + 3 - 2 degrees of freedom: a variance of 10/3.
    assert cohens_d([2, 4], [-1, 1, 3]) == pytest.approx(2 / (10 / 3) ** 0.5)
    assert cohens_d([1, 2], [2, 1]) == 0
    assert cohens_d([1, 1], [0, 0]) == float("inf")
