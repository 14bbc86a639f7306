"""Steps as pipelines give the same files after a kill, after a full disk, and in several processes."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from favchat_jax.corpus import pipelines
from favchat_jax.corpus.manifest import KEPT, read_table
from favchat_jax.data.sources import open_dataset
from favchat_jax.errors import UserError
from tests.conftest import ROOT, fill
from tests.corpus.corpus_files import annotate, contents, face_video, shapes_video, write
from tests.corpus.processes import command, finish

SETTINGS = ["--shortest=12", "--longest=16", "--every=8"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Twelve videos with a face and two without."""
    folder = tmp_path_factory.mktemp("raw")
    for index in range(12):
        write(folder / f"face{index}.mp4", face_video(index, frames=16))
    for index in range(2):
        write(folder / f"shapes{index}.mp4", shapes_video(index, frames=16))
    return folder


def run_all(raw, out, runner=lambda name, *arguments: finish(command(name, *arguments))):
    """Scans, clips and packs with `runner`; returns the resulting files."""
    assert runner("scan", out, f"--source=folder:{raw}")[0] == 0
    code, errors = runner("clip", out, *SETTINGS)
    assert code == 0, errors
    annotate(out, [row["id"] for row in read_table(out, KEPT)])
    code, errors = runner("pack", out)
    assert code == 0, errors
    return outputs(out)


def outputs(out):
    """Returns hashes of all files, and the packed records in order, since TFDS serialises their fields in any order."""
    files = {path: digest for path, digest in contents(out).items() if ".array_record-" not in path}
    sources = {split: open_dataset("corpus", str(out / "packed"), split) for split in ("train_other", "heldout")}
    records = {split: [repr(source[i]) for i in range(len(source))] for split, source in sources.items()}
    assert sum(map(len, records.values())) == len(read_table(out, KEPT))
    return files, records


@pytest.fixture(scope="module")
def undisturbed(raw, tmp_path_factory):
    """The files of an undisturbed run."""
    return run_all(raw, tmp_path_factory.mktemp("undisturbed"))


def progress(out, name):
    """Returns the files of a step so far: one result per video, or the files of the packed data set."""
    return list((out / ".packed.part").rglob("*") if name == "pack" else (out / "work" / name).rglob("*.json"))


def kill_and_restart(raw, out, undisturbed, kills, seed):
    """Kills every step at random moments, then runs it to its end."""
    rng, left = random.Random(seed), {"scan": kills[0], "clip": kills[1], "pack": kills[2]}

    def runner(name, *arguments):
        for _ in range(left[name]):
            started = command(name, *arguments)
            moment = rng.randint(len(progress(out, name)), 14)
            while started.poll() is None and len(progress(out, name)) < moment:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            started.send_signal(signal.SIGKILL)
            started.communicate()
        return finish(command(name, *arguments))

    assert run_all(raw, out, runner) == undisturbed


@pytest.mark.timeout(900)
def test_killed_steps_resume_and_give_the_same_bytes(raw, undisturbed, tmp_path):
    kill_and_restart(raw, tmp_path / "out", undisturbed, (1, 1, 1), seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_give_the_same_bytes(raw, undisturbed, tmp_path):
    kill_and_restart(raw, tmp_path / "out", undisturbed, (2, 5, 3), seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_several_processes_give_the_same_bytes(raw, undisturbed, tmp_path):
    beam = ["--beam=direct_num_workers=2", "--beam=direct_running_mode=multi_processing"]
    assert run_all(raw, tmp_path / "out", lambda *given: finish(command(*given, *beam))) == undisturbed


def half(item):
    """The work of the tests: halves its item."""
    if item < 0:
        raise UserError(f"{item} is negative: give another")
    return {"half": item / 2}


def test_results_are_in_the_order_of_the_items_and_are_made_once(tmp_path):
    items = [(f"n{number}", number, number) for number in (6, 2, 4)]
    expected = [{"half": 3.0}, {"half": 1.0}, {"half": 2.0}]
    assert pipelines.run("step", half, items, tmp_path) == expected
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    assert len(made) == 3
    items[1] = ("n2", "another key", 8)
    assert pipelines.run("step", half, items, tmp_path) == [{"half": 3.0}, {"half": 4.0}, {"half": 2.0}]
    again = [path for path, time_made in made.items() if path.stat().st_mtime_ns != time_made]
    assert [path.stem for path in again] == ["n2"]
    assert pipelines.run("step", half, items[:1], tmp_path) == [{"half": 3.0}]
    assert [path.stem for path in (tmp_path / "work").rglob("*.json")] == ["n6"]


def test_a_step_shows_how_many_of_the_videos_left_are_done(tmp_path, monkeypatch, capsys):
    items = [(f"n{number}", number, number) for number in range(3)]
    pipelines.run("step", half, items[:1], tmp_path)
    monkeypatch.setattr(pipelines, "tqdm", lambda **options: tqdm(**{**options, "disable": False}))
    pipelines.run("step", half, items, tmp_path)
    assert re.search(r"step: 100%.* 2/2 .*videos", capsys.readouterr().err)


def test_without_beam_a_step_is_refused_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="apache_beam is not installed: pip install -e '.\\[corpus\\]'"):
        pipelines.run("step", half, [("a", 2, 2)], tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="apache_beam is not installed"), pipelines.quiet_beam():
        pass


def test_a_damaged_result_is_made_again(tmp_path):
    pipelines.run("step", half, [("a", 2, 2)], tmp_path)
    (result,) = (tmp_path / "work").rglob("*.json")
    result.write_text('{"key": ')
    assert pipelines.run("step", half, [("a", 2, 2)], tmp_path) == [{"half": 1.0}]


def test_an_error_ends_the_run_in_one_line_and_finished_results_are_kept(tmp_path):
    with pytest.raises(UserError, match="^-1 is negative: give another$"):
        pipelines.run("step", half, [("a", 2, 2), ("b", -1, -1)], tmp_path)
    assert pipelines.run("step", half, [("a", 2, 2)], tmp_path) == [{"half": 1.0}]


def test_a_full_disk_ends_a_step_in_one_line_and_it_resumes_with_free_space(raw, small_disk):
    out = small_disk / "out"
    assert finish(command("scan", out, f"--source=folder:{raw}"))[0] == 0
    ballast = fill(small_disk)
    code, errors = finish(command("clip", out, *SETTINGS))
    assert code == 2 and "No space left" in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (out / KEPT).exists()
    ballast.unlink()
    code, errors = finish(command("clip", out, *SETTINGS))
    assert code == 0, errors
    kept = read_table(out, KEPT)
    assert kept and all(json.dumps(row) and (out / row["path"]).stat().st_size for row in kept)


def test_a_disk_that_fills_up_during_packing_leaves_the_older_corpus(raw, small_disk):
    out = small_disk / "out"
    for name, *arguments in (("scan", f"--source=folder:{raw}"), ("clip", *SETTINGS)):
        assert finish(command(name, out, *arguments))[0] == 0
    kept = [row["id"] for row in read_table(out, KEPT)]
    annotate(out, kept)
    assert finish(command("pack", out))[0] == 0
    annotate(out, kept, summary="Another one.")
    ballast = fill(small_disk)
    os.truncate(ballast, ballast.stat().st_size - (out / "records.jsonl").stat().st_size - (64 << 10))
    code, errors = finish(command("pack", out))
    assert code == 2 and "No space left" in errors.splitlines()[-1] and "Traceback" not in errors
    assert open_dataset("corpus", str(out / "packed"), "train")[0].summary.startswith("A happy person")
    ballast.unlink()
    assert finish(command("pack", out))[0] == 0
    assert open_dataset("corpus", str(out / "packed"), "train")[0].summary == "Another one."


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "needed: one of scan"),
        (["scan", "--out=x"], "--source=FOLDER"),
        (["clip"], "--out=DIR"),
        (["clip", "--out=nowhere"], "is not a folder"),
        (["clip", "--out=.", "--min_share=2"], "min_share"),
        (["pack", "--out=configs"], "kept.parquet is missing"),
        (["pcak", "--out=."], "needed: one of|unexpected argument"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, named):
    ended = subprocess.run(
        [sys.executable, "-m", "tools.build_dataset", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert re.search(named, ended.stderr), ended.stderr
