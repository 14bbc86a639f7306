"""Verdicts are stored immediately, count for the judged text, and are compared between reviewers."""

import dataclasses

import pytest

from favchat_jax.corpus.annotations import Annotation
from favchat_jax.corpus.reviews import Agreement, Review, Reviews, agreement, cohens_kappa, final_text
from favchat_jax.data.record import Question
from favchat_jax.errors import UserError

PAIR = Question("What is seen?", "A face.", "general")
TEXT = Annotation("a", "key", "openai", "m", "v", {}, "A face is seen.", (PAIR,), 3, ())


def verdict(reviewer: str, said: str, annotation: Annotation = TEXT, **more) -> Review:
    text = annotation.text()
    given = Review(annotation.id, reviewer, said, annotation.summary, annotation.questions, "2025-01-01T00:00", text)
    return dataclasses.replace(given, **more)


def test_verdicts_outlive_the_process_and_the_last_of_a_reviewer_counts(tmp_path):
    reviews = Reviews(tmp_path)
    for review in (verdict("ada", "reject"), verdict("bob", "accept"), verdict("ada", "accept")):
        reviews.add(review)
    assert len((tmp_path / "reviews.jsonl").read_text().splitlines()) == 3
    for known in (reviews, Reviews(tmp_path)):
        assert {name: review.verdict for name, review in known.of(TEXT).items()} == {"ada": "accept", "bob": "accept"}


def test_a_verdict_on_an_earlier_text_does_not_count_for_a_later_one(tmp_path):
    reviews = Reviews(tmp_path)
    reviews.add(verdict("ada", "regenerate"))
    later = dataclasses.replace(TEXT, summary="Another text.")
    assert reviews.of(later) == {} and reviews.refused("a") == ("A face is seen.",)


def test_two_requests_to_rewrite_a_text_count_once(tmp_path):
    reviews = Reviews(tmp_path)
    reviews.add(verdict("ada", "regenerate"))
    reviews.add(verdict("bob", "regenerate"))
    assert reviews.refused("a") == ("A face is seen.",)
    reviews.add(verdict("ada", "accept"))
    reviews.add(verdict("bob", "accept"))
    assert reviews.refused("a") == ()


def test_a_line_that_a_kill_cut_short_is_overwritten(tmp_path):
    Reviews(tmp_path).add(verdict("ada", "accept"))
    with (tmp_path / "reviews.jsonl").open("a") as file:
        file.write('{"id": "a", "rev')
    reviews = Reviews(tmp_path)
    reviews.add(verdict("bob", "reject"))
    assert len(Reviews(tmp_path).of(TEXT)) == 2
    assert len((tmp_path / "reviews.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["{}", "[]", "x", '{"id": "a"}'])
def test_an_invalid_line_is_named(tmp_path, line):
    (tmp_path / "reviews.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match="reviews.jsonl, line 1"):
        Reviews(tmp_path)


@pytest.mark.parametrize(
    ("verdicts", "taken"),
    [
        ([], "A face is seen."),
        ([("ada", "accept", "")], "A face is seen."),
        ([("ada", "accept", ""), ("bob", "reject", "")], None),
        ([("ada", "regenerate", "")], None),
        ([("ada", "edit", "Hers."), ("bob", "accept", "")], "Hers."),
    ],
)
def test_the_verdicts_decide_the_text_for_training(verdicts, taken):
    given = {name: verdict(name, said, summary=text or TEXT.summary) for name, said, text in verdicts}
    found = final_text(TEXT, given)
    assert found == (None if taken is None else (taken, (PAIR,)))


def test_a_text_with_problems_is_used_only_if_a_person_accepted_or_edited_it():
    doubtful = dataclasses.replace(TEXT, problems=("it says beard",))
    assert final_text(doubtful, {}) is None
    assert final_text(doubtful, {"ada": verdict("ada", "accept")}) == (TEXT.summary, TEXT.questions)


def test_cohens_kappa_equals_a_calculation_by_hand():
    # Cohen's example by its table: 20 both yes, 15 both no, 5 and 10 different; p_o = 0.7, p_e = 0.5.
    table = {("accept", "accept"): 20, ("accept", "reject"): 5, ("reject", "accept"): 10, ("reject", "reject"): 15}
    pairs = [pair for pair, count in table.items() for _ in range(count)]
    assert cohens_kappa(pairs) == pytest.approx(0.4)
    assert cohens_kappa([("accept", "accept"), ("reject", "reject")]) == 1
    assert cohens_kappa([("accept", "reject"), ("reject", "accept")]) == -1
    assert cohens_kappa([("accept", "accept")] * 3) is None


def test_agreement_covers_every_pair_of_reviewers_on_the_clips_that_both_judged(tmp_path):
    texts = [dataclasses.replace(TEXT, id=str(n), summary=f"Text {n}.") for n in range(4)]
    reviews = Reviews(tmp_path)
    for text, said in zip(texts, ("accept", "accept", "reject", "reject"), strict=True):
        reviews.add(verdict("bob", said, text))
    for text, said in zip(texts[:3], ("accept", "reject", "reject"), strict=True):
        reviews.add(verdict("ada", said, text))
    reviews.add(verdict("eve", "accept", texts[3]))
    rows = agreement(texts, reviews)
    # ada and bob: p_o = 2/3, p_e = 1/3 * 2/3 + 2/3 * 1/3 = 4/9
    assert rows[0] == Agreement("ada", "bob", 3, pytest.approx(2 / 3), pytest.approx(0.4))
    assert rows[1] == Agreement("bob", "eve", 1, 0.0, 0.0) and len(rows) == 2
