import contextlib
import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import favchat_jax
from favchat_jax import evaluate
from favchat_jax import train as page
from favchat_jax.checkpoints import initial
from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.store import Checkpoints
from favchat_jax.checkpoints.workdir import claim
from favchat_jax.data.sources import open_dataset
from favchat_jax.errors import RunError, UserError
from favchat_jax.train import train_stage
from favchat_jax.training import batches as batches_room
from favchat_jax.training.optimizer import schedule
from favchat_jax.training.progress import Outcome
from favchat_jax.training.step import make_step
from tests.conftest import DATA, ROOT, damage, fill, newest, same_weights, start_module, train_alone

STEPS = 20  # of the small world's config; checkpoints at 6, 12, 18 and 20


@pytest.fixture(scope="module", autouse=True)
def compiled_steps():
    """Traces each program once for all runs of this file, which mostly train the same; yields the compiled steps."""
    steps, weights, shapes = {}, {}, {}

    def step_once(model, optimizer, rate, *, accumulate, chunk, mesh):
        key = (str(model), *(float(rate(step)) for step in range(4)), accumulate, chunk)
        if key not in steps:
            steps[key] = make_step(model, optimizer, rate, accumulate=accumulate, chunk=chunk, mesh=mesh)
        return steps[key]

    def weights_once(parts, mesh):
        key = (str(parts.model), parts.config.seed, parts.config.init.from_run, parts.config.llm.path)
        if key not in weights:
            weights[key] = initial_weights(parts, mesh)
        return jax.tree.map(jnp.copy, weights[key])  # a run gives its own away

    def shapes_once(model, sizes):
        if str(model) not in shapes:
            shapes[str(model)] = weight_shapes(model, sizes)
        return shapes[str(model)]

    initial_weights, weight_shapes = initial.initial_weights, assembly.weight_shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "make_step", step_once)
        patch.setattr(initial, "initial_weights", weights_once)
        patch.setattr(assembly, "weight_shapes", shapes_once)
        yield steps


@pytest.fixture(scope="module")
def settings(small_world):
    """The config that most tests here train."""
    return small_world.config("stage1")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run of `settings` that nothing disturbed; its workdir."""
    workdir = tmp_path_factory.mktemp("whole") / "stage1"
    assert train_alone(settings, workdir) == Outcome(step=STEPS, steps=STEPS, resumed_at=0)
    return workdir


@pytest.fixture
def before_step(monkeypatch):
    """Calls a function before the batch of a given step is fetched, once."""

    def arrange(number: int, act) -> None:
        original, count = page.next_batch, iter(range(1, 10**9))

        def fetch(batches, pending):
            if next(count) == number:
                act()
            return original(batches, pending)

        monkeypatch.setattr(page, "next_batch", fetch)

    return arrange


def digests(workdir: Path, step: int) -> dict:
    """Checksums of all weights, moments, the step and the key of a checkpoint."""
    return json.loads((workdir / "checkpoints" / str(step) / "leaves" / "metadata").read_text())


def losses(workdir: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def ended_as(workdir: Path, whole: Path) -> bool:
    """Whether a run ended with the very bits and losses of another, moments included."""
    return (
        same_weights(newest(workdir), newest(whole))
        and digests(workdir, STEPS) == digests(whole, STEPS)
        and losses(workdir) == losses(whole)
    )


def test_a_run_saves_a_checkpoint_when_due_and_at_its_end_and_keeps_the_newest(whole):
    assert Checkpoints(whole).steps() == [18, 20]
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoints", "config.json", "llm.json", "metrics.jsonl", "tensorboard",
    ]  # fmt: skip


def test_metrics_hold_one_line_a_logged_step_with_all_that_is_measured(whole, settings):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    rate = schedule(settings.optimizer, STEPS)
    np.testing.assert_allclose([line["learning_rate"] for line in lines], [rate(i) for i in range(STEPS)], rtol=1e-5)
    for line in lines:
        assert set(line) == {
            "step", "loss", "token_accuracy", "gradient_norm", "learning_rate", "general_weight", "facial_weight",
            "answer_tokens", "clips_per_second", "tokens_per_second", "input_wait",
        }  # fmt: skip
        assert 0 <= line["token_accuracy"] <= 1 and 0 <= line["input_wait"] <= 1 and line["clips_per_second"] > 0
        assert line["general_weight"] + line["facial_weight"] == pytest.approx(1, abs=1e-5)
        assert line["tokens_per_second"] > line["clips_per_second"]


def test_a_metrics_line_is_the_average_of_the_steps_since_the_one_before(settings, whole, tmp_path):
    train_alone(settings.updated({"log_every": 9}), tmp_path)
    every = dict(losses(whole))
    assert [step for step, _ in losses(tmp_path)] == [9, 18, 20]
    expected = [np.mean([every[i] for i in steps]) for steps in (range(1, 10), range(10, 19), range(19, 21))]
    np.testing.assert_allclose([loss for _, loss in losses(tmp_path)], expected, rtol=1e-6)


def test_tensorboard_reads_the_same_losses(whole):
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (whole / "tensorboard").iterdir()
    content, read = file.read_bytes(), []
    while content:  # a record is its length, a checksum, an event, a checksum
        length = int.from_bytes(content[:8], "little")
        read.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    found = [(e.step, value.simple_value) for e in read for value in e.summary.value if value.tag == "loss"]
    np.testing.assert_allclose(found, losses(whole), rtol=1e-6)


@pytest.mark.parametrize("step", [2, 11])
def test_a_run_that_broke_off_goes_on_to_the_same_bits(step, settings, whole, before_step, tmp_path):
    def break_off():
        raise MemoryError("as if the machine went down")

    before_step(step, break_off)
    with pytest.raises(MemoryError):
        train_alone(settings, tmp_path)
    assert Checkpoints(tmp_path).latest() == (6 if step > 6 else None)
    before_step(0, break_off)
    assert train_alone(settings, tmp_path).resumed_at == (6 if step > 6 else 0)
    assert ended_as(tmp_path, whole)


@pytest.mark.parametrize("step", [6, 8])
def test_sigterm_saves_where_the_run_stands_and_the_rest_goes_on_to_the_same_bits(
    step, settings, whole, before_step, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "favchat_jax")
    before_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = train_stage(settings, tmp_path)
    assert (outcome.step, outcome.finished) == (step, False), "the step whose batch was awaited is still made"
    assert Checkpoints(tmp_path).latest() == step
    assert f"stage1 stopped at step {step} of {STEPS} and saved; the same command resumes it" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert train_alone(settings, tmp_path).resumed_at == step
    assert ended_as(tmp_path, whole)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_saves_where_the_run_stands_before_it_ends_the_command(settings, whole, before_step, tmp_path, caplog):
    caplog.set_level(logging.INFO, "favchat_jax")
    before_step(8, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train_stage(settings, tmp_path)
    assert Checkpoints(tmp_path).latest() == 8
    assert "Ctrl-C again ends at once" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train_alone(settings, tmp_path).resumed_at == 8
    assert ended_as(tmp_path, whole)


def test_nothing_compiles_after_the_first_step_not_even_in_a_resumed_run(settings, whole, compiled_steps, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "20")
    assert train_alone(settings, tmp_path).resumed_at == 18
    assert [step._cache_size() for step in compiled_steps.values()] == [1] * len(compiled_steps)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(settings, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "20" / "optimizer")
    assert train_alone(settings, tmp_path).resumed_at == 18
    assert f"checkpoint 20 of {tmp_path} is damaged" in caplog.text
    assert ended_as(tmp_path, whole)


def test_answering_takes_the_checkpoint_before_a_damaged_one(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    sound = assembly.load_run(tmp_path).weights
    damage(tmp_path / "checkpoints" / "20" / "weights")
    run = assembly.load_run(tmp_path)
    assert f"checkpoint 20 of {tmp_path} is damaged" in caplog.text
    weights = run.weights
    assert run.step == evaluate.identity_of(tmp_path, run)["step"] == 18
    assert weights.keys() == sound.keys() and not same_weights(weights, sound)
    shutil.rmtree(tmp_path / "checkpoints" / "20")
    assert same_weights(weights, assembly.load_run(tmp_path).weights)


def test_a_finished_stage_run_again_says_so_and_changes_nothing(settings, whole, caplog):
    caplog.set_level(logging.INFO, "favchat_jax")
    before = (digests(whole, STEPS), losses(whole))
    outcome = train_stage(settings, whole)
    assert outcome.finished and f"stage1 in {whole} is already finished at step {STEPS}" in caplog.text
    assert (digests(whole, STEPS), losses(whole)) == before


def test_a_workdir_of_another_config_is_refused_with_the_fields_that_differ(small_world, whole):
    other = small_world.config("stage1", batch=2, optimizer__learning_rate=0.5)
    with pytest.raises(UserError, match="fields differ: batch .4 there, 2 here., optimizer.learning_rate .0.001 there"):
        train_alone(other, whole)


def test_a_mesh_that_does_not_fit_is_refused_before_a_stage_before_is_asked_for(small_world, tmp_path):
    refused = {"mesh.data=64.* needs 64 devices": {"mesh__data": 64}, "batch=4 does not": {"accumulate": 3}}
    for message, changes in refused.items():
        config = small_world.config("stage3", init__from_run=str(tmp_path / "nowhere"), **changes)
        with pytest.raises(UserError, match=message):
            train_stage(config, tmp_path / "run")


def test_a_start_that_failed_over_a_wrong_path_does_not_bind_the_workdir_to_it(small_world, settings, tmp_path):
    wrong = small_world.config("stage2", init__from_run=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        train_alone(wrong, tmp_path)
    claim(tmp_path, settings, "a model")


def test_a_workdir_that_cannot_be_written_is_a_users_error(settings, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="workdir .*file.* cannot be written"):
        train_alone(settings, tmp_path / "file")


def test_without_steps_a_run_lasts_the_epochs(small_world):
    assert small_world.config("stage1", steps=0, epochs=3.0).total_steps(36) == 27  # 4 clips a batch
    assert small_world.config("stage1", steps=0, epochs=0.01).total_steps(36) == 1


def clip_ids(config) -> set[str]:
    source = open_dataset(config.data.name, config.data.packed, "train")
    return {source[i].id for i in range(len(source))}


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_clips(small_world, tmp_path):
    poisoned = tmp_path / "mistral"
    shutil.copytree(small_world.llm, poisoned)
    weights = assembly.mistral_folder.read_weights(poisoned)
    weights["norm"]["scale"][:] = 3e38  # finite, as it must be to be read; what it is multiplied with is not
    assembly.mistral_folder.write_weights(poisoned, weights)
    config = small_world.config("stage1", llm__path=str(poisoned))
    with pytest.raises(RunError, match="the loss of step 1 is (nan|inf), clips ") as caught:
        train_alone(config, tmp_path / "run")
    named = str(caught.value).split("clips ")[1].split(";")[0].split(", ")
    assert len(named) == 4 and set(named) <= clip_ids(config)
    assert Checkpoints(tmp_path / "run").steps() == []


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_what_is_not_finite_stops_the_run_before_the_spoilt_weights_are_saved(name, settings, monkeypatch, tmp_path):
    good = page.make_step

    def poisoned(*arguments, **keywords):
        update, steps = good(*arguments, **keywords), iter(range(1, 100))

        def run(*inputs):
            state, values = update(*inputs)
            return state, {**values, name: jnp.float32(np.inf) if next(steps) == 12 else values[name]}

        return run

    monkeypatch.setattr(page, "make_step", poisoned)
    with pytest.raises(RunError, match=f"the {name} of step 12 is inf.*the last checkpoint is intact"):
        train_alone(settings, tmp_path)
    assert Checkpoints(tmp_path).steps() == [6] and [step for step, _ in losses(tmp_path)] == list(range(1, 12))


class Broken:
    """A data set in which every second clip, from a given record on, is not a video."""

    first = 0

    def __init__(self, *arguments):
        self._records = open_dataset(*arguments)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int):
        record = self._records[index]
        return dataclasses.replace(record, clip=b"not a video") if index >= self.first and index % 2 else record


def test_a_record_that_cannot_be_decoded_is_left_out_counted_and_named(settings, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(batches_room, "open_dataset", Broken)
    monkeypatch.setattr(Broken, "first", 33)  # 33 and 35, of 36; 80 records are too few to judge the data set by
    train_alone(settings, tmp_path)
    source = open_dataset(settings.data.name, settings.data.packed, "train")
    bad = {source[33].id, source[35].id}
    state = json.loads((tmp_path / "checkpoints" / "20" / "data" / "metadata").read_text())
    assert state["counts"]["seen"] == 80 + state["counts"]["bad"] and set(state["counts"]["bad_ids"]) == bad
    assert all(f"record {name} is skipped (" in caplog.text for name in bad)


def test_many_such_records_stop_the_run_and_the_last_checkpoint_stays(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(batches_room, "open_dataset", Broken)
    with pytest.raises(UserError, match="of 1.. records are bad, more than 1%: fix or remove "):
        train_alone(settings, tmp_path)
    assert Checkpoints(tmp_path).latest() == 12
    assert newest(tmp_path)


# As real processes.


def start_training(small_world, workdir: Path, **changes):
    return start_module(
        "favchat_jax.train",
        *small_world.flags("stage1", **changes),
        f"--workdir={workdir}",
        cwd=ROOT,
    )


def wait_for_step(process, workdir: Path, step: int) -> None:
    """Returns once a step is logged."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if (workdir / "metrics.jsonl").read_text().count("\n") >= step:
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError(f"no step {step} in {workdir}")


def killed_and_resumed(small_world, workdir: Path, step: int) -> None:
    """Trains in `workdir`, kills the process without warning once `step` is logged, and runs the same command again."""
    process = start_training(small_world, workdir, data__workers=1)
    wait_for_step(process, workdir, step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was not over yet"
    process = start_training(small_world, workdir, data__workers=1)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr


def test_a_process_killed_at_a_random_step_and_started_again_ends_with_the_same_bits(small_world, whole, tmp_path):
    killed_and_resumed(small_world, tmp_path, random.randint(1, 13))
    assert ended_as(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", random.Random(0).sample(range(1, 14), 5))
def test_at_any_step_a_killed_process_that_compiles_anew_ends_with_the_same_bits(
    step, small_world, whole, monkeypatch, tmp_path
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    killed_and_resumed(small_world, tmp_path / "run", step)
    assert ended_as(tmp_path / "run", whole)


def test_a_process_told_to_end_saves_and_exits_with_0_and_goes_on_to_the_same_bits(
    settings, small_world, whole, tmp_path
):
    process = start_training(small_world, tmp_path)
    wait_for_step(process, tmp_path, 7)
    process.terminate()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and stdout == "" and "and saved; the same command resumes it" in stderr
    assert 7 <= Checkpoints(tmp_path).latest() < STEPS
    train_alone(settings, tmp_path)
    assert ended_as(tmp_path, whole)


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_leaves_the_last_good_checkpoint(small_world, small_disk):
    workdir = small_disk / "run"
    process = start_training(small_world, workdir, checkpoint_every=2)
    wait_for_step(process, workdir, 5)
    ballast = fill(small_disk)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stdout == "", stderr
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line and not line.startswith("stage1: ")]
    assert len(lines) == 2 and lines[0].endswith("weight arrays are drawn"), stderr
    line = lines[1]
    assert line.startswith("train: ") and str(workdir) in line and "space" in line
    ballast.unlink()
    last = Checkpoints(workdir).latest()
    assert last >= 2 and newest(workdir) and assembly.load_run(workdir)


def test_a_run_with_face_crops_finds_all_faces_first_keeps_them_and_answers_with_them(small_world, trained, tmp_path):
    packed = shutil.copytree(small_world.packed, tmp_path / "data")
    before = str(trained.folder / "stage2")
    changes = {"data__packed": str(packed), "data__face_crop": True, "init__from_run": before, "steps": 2}
    config = small_world.config("stage3", data__keep_features=True, data__sampling="middle", **changes)
    train_alone(config, tmp_path / "run")
    (kept,) = packed.glob("**/faces-train-*.jsonl")
    assert len(kept.read_text().splitlines()) == 36
    model = favchat_jax.load(tmp_path / "run")
    source = open_dataset(DATA, str(packed), "heldout")
    clips = [source[index].clip for index in range(6)]
    encoded = [model.encode(clip) for clip in clips]
    assert {clip.frames.shape[-1] for clip in encoded} == {6} and any(clip.tracks.tracks for clip in encoded)
    assert model.encode(clips[0], face_crop=False).frames.shape[-1] == 3
    with pytest.raises(UserError, match="these fields differ: data.face_crop"):
        train_alone(config.updated({"data.face_crop": False}), tmp_path / "run")


def test_a_run_without_the_detectors_file_says_what_to_install_before_it_trains(small_world, trained, tmp_path):
    changes = {"data__face_crop": True, "data__detector_model": "gone.onnx", "data__smallest_face": 0.11}
    config = small_world.config("stage3", init__from_run=str(trained.folder / "stage2"), **changes)
    with pytest.raises(UserError, match="detector model gone.onnx: no such file"):
        train_alone(config, tmp_path / "run")
    assert not list(Path(small_world.packed).glob("**/faces-*.jsonl"))
