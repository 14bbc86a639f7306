"""The format of a result: its figures, its hash of the data, and its table for a terminal."""

import json

import pytest

from favchat_jax.evaluation import published
from favchat_jax.evaluation.result import data_hash, figure, make_result, table, write_result


def test_values_that_are_not_finite_become_null():
    assert figure(float("nan"), float("inf"), 1) == {"value": None, "low": None, "high": 1.0, "scale": 1}


def result(**changes):
    figures = {"war": figure(0.5, 0.25, 0.75, scale=100), "auc": figure(0.125)}
    rows = published.rows(published.EMOTION, "uar", "war")
    return make_result("dfew", [{"id": "1"}], figures, published=rows, **changes)


def test_a_result_is_valid_json_and_complete_if_nothing_is_missing():
    made = result()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert (made["n"], made["complete"]) == (1, True)
    assert not result(missing=[{"id": "2", "reason": "gone"}])["complete"] and not result(complete=False)["complete"]


def test_half_of_a_surrogate_pair_is_kept_in_the_file_and_shown_as_its_escape(tmp_path):
    id = b"caf\xe9".decode("utf-8", "surrogateescape")  # a name in another encoding
    made = result(missing=[{"id": id, "reason": "gone \ud83d"}])
    write_result(tmp_path / "a.json", made)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == made
    assert table(made).splitlines()[-1].encode() == rb"missing: caf\udce9: gone \ud83d"


def test_figures_that_are_not_comparable_say_so_first_in_a_terminal():
    made = {**result(), "incomparable": ["one", "two"]}
    assert table(made).splitlines()[0] == "NOT COMPARABLE with published figures: one; two"
    assert table({**made, "published": []}).splitlines()[0].startswith("figure")


def test_a_terminal_shows_shares_in_percent_beside_the_papers_best_rows():
    groups = {"fold 1": {"n": 1, "figures": {"war": figure(1, scale=100)}}}
    lines = [line.split() for line in table(result(groups=groups)).splitlines()]
    assert lines[0] == ["figure", "here", "95", "%", "interval", "FaVChat", "v2", "FaVChat", "Qwen2-VL-72B"]
    assert lines[1] == ["war", "50.00", "25.00", "-", "75.00", "79.79", "77.88", "45.12"]
    assert lines[2] == ["auc", "0.125", "-", "-", "-"]
    assert lines[3] == ["fold", "1:", "war", "100.00"]
    assert lines[4] == ["n", "=", "1"]


def test_a_terminal_lists_the_first_missing_samples_and_counts_the_others():
    missing = [{"id": str(i), "reason": "gone"} for i in range(5)]
    shown = table(result(missing=missing, notes=["a note"])).splitlines()[-6:]
    assert shown == [
        *("n = 1, INCOMPLETE", "missing: 0: gone", "missing: 1: gone", "missing: 2: gone"),
        *("missing: 2 more, listed in the result", "a note"),
    ]


def test_the_hash_of_data_changes_with_labels_and_sizes(tmp_path):
    labels, clip, folder = tmp_path / "labels", tmp_path / "a.mp4", tmp_path / "frames"
    folder.mkdir()
    labels.write_text("a 1")
    clip.write_bytes(b"12")

    def hashed():
        return data_hash([labels], [clip, folder, tmp_path / "absent"])

    seen = {hashed()}
    for change in (
        lambda: labels.write_text("a 2"),
        lambda: clip.write_bytes(b"123"),
        lambda: (folder / "0.jpg").write_bytes(b""),
    ):
        change()
        seen.add(hashed())
    assert len(seen) == 4 and hashed() in seen


@pytest.mark.parametrize(
    ("rows", "model", "figures"),
    [
        (published.rows(published.DFEC, "correctness", "detail"), "FaVChat", {"correctness": 4.51, "detail": 4.41}),
        (published.rows(published.EMOTION, "uar", "war", first=2), "FaVChat v2", {"uar": 51.09, "war": 62.17}),
        (published.rows(published.VERIFICATION, "accuracy"), "FaVChat", {"accuracy": 82.38}),
        (published.rows(published.VERIFICATION, "accuracy", first=1), "Claude3.5-Sonnet", {"accuracy": 94.29}),
    ],
)
def test_published_rows_are_named_by_figure(rows, model, figures):
    assert {row["model"]: row["figures"] for row in rows}[model] == figures


def test_published_rows_without_a_figure_are_skipped():
    assert "FaVChat" not in [row["model"] for row in published.rows(published.VERIFICATION, "accuracy", first=1)]
