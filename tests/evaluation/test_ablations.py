"""Table 6: its figures and intervals match values computed by hand, and its order is right."""

import numpy as np
import pytest

from favchat_jax.errors import UserError
from favchat_jax.evaluation.ablations import compare, table


def answers(*right, kinds="ab"):
    """Answers to two questions per clip, by default of kinds a and b."""
    return [
        {"clip": f"clip {i // 2}", "question": f"{i}?", "kind": kinds[i % 2], "correct": bool(hit)}
        for i, hit in enumerate(right)
    ]


RESULTS = {
    "none": [answers(1, 1, 1, 1), answers(1, 1, 1, 0)],
    "no_face": [answers(0, 1, 0, 0), answers(0, 1, 0, 1)],
}


def test_figures_of_two_ablations_and_two_seeds_match_values_computed_by_hand():
    full, without = compare("v1", RESULTS)["rows"]
    assert (full["model"], full["published"]) == ("FaVChat", {"DFEW": 77.88, "MAFW": 60.97})
    assert (without["model"], without["published"]) == ("w/o FE", {"DFEW": 55.01, "MAFW": 55.01})
    assert full["figures"]["all"]["seeds"] == [1.0, 0.75] and full["figures"]["all"]["value"] == 0.875
    assert without["figures"]["a"]["value"] == 0 and without["figures"]["b"]["value"] == 0.75
    assert {name: figure["n"] for name, figure in full["figures"].items()} == {"all": 4, "a": 2, "b": 2}
    assert "less" not in full["figures"]["all"]
    less = without["figures"]["all"]["less"]
    assert less["value"] == pytest.approx(0.5) and less["seeds"] == [0.75, 0.25]
    # Student's t with one degree of freedom, 12.706, times the standard error 0.354 / sqrt(2).
    assert (less["seeds_low"], less["seeds_high"]) == pytest.approx((0.5 - 12.7062 * 0.25, 0.5 + 12.7062 * 0.25))


def test_one_seed_has_no_interval_over_seeds():
    figure = compare("v1", {"none": RESULTS["none"][:1]})["rows"][0]["figures"]["all"]
    assert figure["seeds_low"] is None and figure["low"] <= figure["value"] <= figure["high"]


def test_the_table_reports_the_order_found_and_the_papers_order():
    worse_without_nothing = {"none": [answers(0, 0)], "no_moe": [answers(1, 1)], "no_face": [answers(1, 0)]}
    compared = compare("v2", worse_without_nothing)
    assert compared["order"] == ["no_moe", "no_face", "none"]
    assert compared["published_order"] == ["none", "no_moe", "no_face"]
    lines = table(compared).splitlines()
    assert lines[-2:] == [
        "order found over 1 seed: w/o adapters > w/o facial encoder > FaVChat v2",
        "order in the paper: FaVChat v2 > w/o adapters > w/o facial encoder",
    ]
    assert lines[4].startswith("NOT COMPARABLE with the paper's columns: the models are embedded ones")
    assert lines[1].split() == ["FaVChat", "v2", "0.000", "[0.000,", "0.000]", "79.79", "62.17"]


def test_the_bootstrap_draws_all_questions_of_a_clip_together():
    of_clip = np.random.default_rng(1).random(300) < 0.5
    rows = [
        {"clip": f"{i}", "question": f"{j}?", "kind": "a", "correct": bool(hit)}
        for i, hit in enumerate(of_clip)
        for j in range(4)
    ]
    figure = compare("v1", {"none": [rows]})["rows"][0]["figures"]["all"]
    # The standard error is that of 300 independent clips, not of 1,200 questions.
    assert (figure["high"] - figure["low"]) / (2 * 1.96) == pytest.approx((0.25 / 300) ** 0.5, rel=0.1)


def test_ablations_with_different_questions_or_seeds_are_refused():
    with pytest.raises(UserError, match="no_face and none answered different questions: evaluate both"):
        compare("v1", {"none": [answers(1, 1)], "no_face": [answers(1, 1, 1)]})
    with pytest.raises(UserError, match="the ablations have different numbers of seeds"):
        compare("v1", {"none": RESULTS["none"], "no_face": RESULTS["no_face"][:1]})
