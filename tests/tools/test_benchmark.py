"""The benchmark: sides take turns, rows describe the measurements, and the real work runs at the tiny size."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from favchat_jax.errors import RunError, UserError
from tests.conftest import ROOT
from tests.tools.sides_for_tests import broken, counting, killed
from tools import benchmark
from tools.beside_pytorch import material
from tools.beside_pytorch.contest import Side, Timing, alternate


@pytest.fixture
def contest():
    """Returns a factory of sides, and ends their processes afterwards."""
    sides = []

    def begin(name, *arguments, **how):
        sides.append(Side(name, *arguments, **how))
        return sides[-1]

    yield begin
    for side in sides:
        side.close()


def test_sides_take_turns_in_separate_processes_and_the_first_run_does_not_count(contest):
    timings = alternate([contest("ours", counting, 1.0), contest("pytorch", counting, 10.0)], rounds=3)
    assert timings["ours"]["first"].first == 1 and timings["ours"]["first"].seconds == [2, 3, 4]
    assert timings["pytorch"]["second"].median == 30 and timings["pytorch"]["second"].spread == [20, 40]
    order = sorted((result[2], side) for side in timings for t in timings[side].values() for result in t.results[1:])
    assert [side for _, side in order] == ["ours", "ours", "pytorch", "pytorch"] * 3
    assert len({result[3] for side in timings.values() for t in side.values() for result in t.results}) == 2


@pytest.mark.parametrize(
    ("build", "said"),
    [(broken, "theirs failed: ValueError: no such weight"), (killed, "theirs ended with exit code 9: ")],
)
def test_a_failed_or_killed_side_ends_the_benchmark_with_one_line(build, said, contest):
    with pytest.raises(RunError, match=said):
        alternate([contest("ours", counting, 1.0), contest("theirs", build)], rounds=1)


def test_only_the_named_settings_run_and_an_unknown_one_is_refused(contest):
    assert list(alternate([contest("ours", counting, 1.0, only=["second"])], rounds=1)["ours"]) == ["second"]
    with pytest.raises(UserError, match="--settings=third: choose from first, second"):
        alternate([contest("ours", counting, 1.0, only=["third"])], rounds=1)


def test_a_row_pairs_each_of_pytorchs_settings_with_our_counterpart():
    timings = {
        "ours": {"kept": Timing(9.0, [], [2.0, 1.0, 3.0])},
        "pytorch": {"eager": Timing(1.0, [], [4.0, 5.0, 6.0]), "compiled": Timing(60.0, [], [3.0, 3.0, 3.0])},
    }
    eager, compiled = benchmark._rows(timings, lambda _: "kept", work="train", batch=4, unit="s a step")
    assert (eager["ours"], eager["pytorch"], eager["ratio"]) == (2.0, 5.0, 2.5)
    assert (compiled["pytorch_setting"], compiled["ratio"], compiled["pytorch_first"]) == ("compiled", 1.5, 60.0)
    assert eager["ours_spread"] == [1.0, 3.0]
    assert "PyTorch eager 5 (first run 1 s); 2.50 times as fast" in benchmark.table([eager])


def test_tokens_agree_up_to_the_first_difference_and_first_tokens_must_be_equal():
    ours = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert benchmark.agreement(ours, ours) == 1
    assert benchmark.agreement(ours, [[1, 2, 9, 4], [5, 6, 7, 8]]) == 0.75
    with pytest.raises(RunError, match="first tokens differ"):
        benchmark.agreement(ours, [[9, 2, 3, 4], [5, 6, 7, 8]])


def test_rows_of_other_settings_stay_in_the_file_and_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "rows.json"
    for work, batch, ours in (("train", 4, 1), ("decode", 1, 2), ("decode", 8, 3), ("decode", 1, 4)):
        benchmark._merge(file, [{"work": work, "batch": batch, "ours": ours, "ours_setting": "merged"}])
    assert [row["ours"] for row in json.loads(file.read_text())] == [1, 3, 4]
    file.write_text('{"a": 1}')
    with pytest.raises(UserError, match="has no rows of a benchmark"):
        benchmark._merge(file, [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    material.make(str(folder), "tiny")
    return str(folder)


def test_decoding_is_measured_without_pytorch_too(folder):
    (row,) = benchmark.decode(folder, "tiny", baseline=False, rounds=1, batches=[2])
    assert row["batch"] == 2 and row["ours"] > 0 and "pytorch" not in row
    assert row["over_memory_floor"] > 0.5, "the weights do not fit in a cache, so decoding cannot beat the memory"


def test_a_group_of_responses_is_measured_as_one(folder):
    (row,) = benchmark.rollout(folder, "tiny", baseline=False, rounds=1)
    assert (row["work"], row["batch"]) == ("rollout", 8) and "pytorch" not in row
    assert row["tokens_a_second"] == pytest.approx(8 * 64 / row["ours"])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("work", ["train", "decode", "rollout", "loader"])
def test_our_results_equal_pytorchs_and_every_row_has_both(work, folder, monkeypatch):
    monkeypatch.setattr(benchmark, "LOADER_SECONDS", 0.5)
    rows = benchmark.WORKS[work](folder, "tiny", baseline=True, rounds=1)
    cropped = [row for row in rows if row["ours_setting"].endswith(("face crop", "kept tracks"))]
    assert len(cropped) == (4 if work == "loader" and os.cpu_count() > 1 else 2 if work == "loader" else 0)
    rows = [row for row in rows if row not in cropped]
    assert {"work", "batch", "ours", "pytorch", "ratio", "unit"} <= set.intersection(*map(set, rows))
    assert all(row["ratio"] > 0 and row["work"] == work for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing cannot be measured: name one of train, decode, rollout, loader first"),
        (["sleep"], "sleep cannot be measured"),
        (["train", "--preset=paper"], "--preset=paper has no language model to draw"),
        (["train", "--preset=huge"], "preset"),
        (["train", "--baseline=none", "--settings=eager"], "--settings=eager names settings of PyTorch"),
        (["decode", "--batches=1,many"], "--batches=1,many: give whole numbers above 0"),
        (["decode", "--batches=0"], "--batches=0: give whole numbers above 0"),
        (["decode", "--batches="], "--batches=: give whole numbers above 0"),
        (["decode", "--json=nowhere/rows.json"], "--json=nowhere/rows.json cannot be written"),
        (["decode", "--json=pyproject.toml"], "--json=pyproject.toml exists and has no rows"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(words, said):
    run = subprocess.run([sys.executable, "-m", "tools.benchmark", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and said in run.stderr and len(run.stderr.splitlines()) == 1
