import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from favchat_jax.data import loader, reasoning
from favchat_jax.data.conversation import VISUAL_PLACEHOLDER, Conversation, PromptEncoder
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.loader import INSTRUCTIONS, Batch, training_batches
from favchat_jax.data.record import Question, Record
from favchat_jax.data.video import Augment
from favchat_jax.errors import UserError
from tests.data.face_videos import rendered, video
from tests.data.tokenizers_for_tests import bert, byte_pairs
from tests.data.video_files import encode_video

ROOT = Path(__file__).parents[2]


def record(number: int, *, clip: bytes, questions: int = 3, face: bool = True) -> Record:
    asked = tuple(Question(f"question {i} of clip {number}?", f"answer {i}", "hair") for i in range(questions))
    return Record(
        id=f"clip-{number}",
        clip=clip,
        attributes=np.zeros(83, np.uint8),
        summary=f"Clip {number} shows a face." + " It is black." * (number % 4),
        questions=asked,
        targets={},
        source=f"video-{number}",
        has_face=face,
    )


@pytest.fixture(scope="module")
def clip() -> bytes:
    return encode_video(10, options={"preset": "ultrafast"})


@pytest.fixture(scope="module")
def records(clip) -> list[Record]:
    return [record(number, clip=clip, questions=number % 4 + 1, face=number % 5 > 0) for number in range(20)]


@pytest.fixture
def open_stream():
    """Opens streams with small settings, and closes them after the test."""
    opened = []

    def open_one(source, **changes):
        settings = dict(text="qa", frames=4, size=16, batch=4, questions=2, buckets=[48, 64, 96, 160], seed=3)
        conversation = Conversation(byte_pairs(), visual_tokens=3)
        prompt = PromptEncoder(bert("question", "of", "clip", "describe", "the", "video"), 12)
        opened.append(training_batches(source, conversation, prompt, **{**settings, **changes}))
        return opened[-1]

    yield open_one
    for stream in opened:
        stream.close()


def same(first: Batch, second: Batch) -> bool:
    return first.ids == second.ids and all(
        np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays.keys() | second.arrays.keys()
    )


def texts(batch: Batch) -> list[list[str]]:
    """Returns the text of every row that holds a question, per clip."""
    tokenizer, arrays = byte_pairs(), batch.arrays
    return [
        [tokenizer.decode(row[:length][row[:length] >= 0]) for row, length in zip(rows, lengths, strict=True) if length]
        for rows, lengths in zip(arrays["tokens"], arrays["length"], strict=True)
    ]


def test_a_batch_has_the_documented_arrays(records, open_stream):
    batch = next(open_stream(records))
    shapes = {name: (array.shape, array.dtype.name) for name, array in batch.arrays.items()}
    length = batch.arrays["tokens"].shape[2]
    assert shapes == {
        "frames": ((4, 4, 16, 16, 3), "uint8"),
        "tokens": ((4, 2, length), "int32"),
        "length": ((4, 2), "int32"),
        "loss_mask": ((4, 2, length), "bool"),
        "prompt": ((4, 2, 12), "int32"),
        "prompt_mask": ((4, 2, 12), "bool"),
    }
    assert len(set(batch.ids)) == 4 and all(type(array) is np.ndarray for array in batch.arrays.values())


def test_each_row_is_one_question_of_its_clip_and_missing_ones_are_empty(records, open_stream):
    stream = open_stream(records, batch=20)
    batch = next(stream)
    for name, rows, arrays in zip(batch.ids, texts(batch), zip(*batch.arrays.values(), strict=True), strict=True):
        number = int(name.removeprefix("clip-"))
        row = dict(zip(batch.arrays, arrays, strict=True))
        assert len(rows) == min(2, number % 4 + 1) and len(set(rows)) == len(rows)
        assert all(f"of clip {number}? [/INST] answer" in text for text in rows)
        for slot, length in enumerate(row["length"]):
            assert (row["tokens"][slot] == VISUAL_PLACEHOLDER).sum() == (3 if length else 0)
            assert not row["loss_mask"][slot, length:].any() and row["loss_mask"][slot].any() == (length > 0)
            assert row["prompt_mask"][slot].any() == (length > 0)


def test_the_questions_about_a_clip_change_between_epochs(clip, open_stream):
    stream = open_stream([record(0, clip=clip, questions=4)], batch=1, questions=1)
    assert len({texts(next(stream))[0][0] for _ in range(30)}) == 4


def test_summaries_answer_an_instruction_to_describe(records, open_stream):
    batch = next(open_stream(records, text="summary", questions=2))
    assert batch.arrays["tokens"].shape[1] == 1
    for name, (text,) in zip(batch.ids, texts(batch), strict=True):
        assert f"Clip {name.removeprefix('clip-')} shows a face." in text
        assert any(instruction in text for instruction in INSTRUCTIONS)


def test_face_questions_come_only_from_clips_with_a_face(records, open_stream):
    stream = open_stream(records, text="face_qa")
    seen = {name for _ in range(12) for name in next(stream).ids}
    assert seen == {f"clip-{number}" for number in range(20) if number % 5}


def test_a_data_set_without_faces_is_a_user_error(clip, open_stream):
    stream = open_stream([record(number, clip=clip, face=False) for number in range(6)], text="face_qa")
    with pytest.raises(UserError, match="none of the 6 records is usable: no question about a clip that shows a face"):
        next(stream)


def test_reasoning_asks_one_question_about_each_clip_with_targets(records, open_stream):
    targets = {"attributes": "long black hair", "emotion": "happy", "action": "nodding"}
    mixed = [dataclasses.replace(one, targets=targets if number % 2 else {}) for number, one in enumerate(records)]
    stream = open_stream(mixed, text="reasoning", questions=2)
    for batch in (next(stream), next(stream)):
        assert batch.arrays["tokens"].shape[:2] == (4, 1)
        assert all(int(name.split("-")[1]) % 2 and int(name.split("-")[1]) % 5 for name in batch.ids)
        for rows in texts(batch):
            assert reasoning.QUESTION in rows[0] and "<think> long black" in rows[0] and "</answer>" in rows[0]


def test_text_is_padded_to_the_smallest_bucket_that_holds_the_batch(records, open_stream):
    stream = open_stream(records, text="summary", batch=1)
    for _ in range(20):
        batch = next(stream)
        longest = batch.arrays["length"].max()
        assert batch.arrays["tokens"].shape[2] == min(size for size in (48, 64, 96, 160) if size >= longest)
    assert len({next(stream).arrays["tokens"].shape[2] for _ in range(20)}) > 1


def test_several_hosts_read_disjoint_records_at_one_length(records, open_stream):
    streams = [open_stream(records, process_index=host, process_count=2) for host in range(2)]
    batches = [[next(stream) for _ in range(5)] for stream in streams]
    first, second = ({name for batch in host for name in batch.ids} for host in batches)
    assert not first & second and len(first | second) == 20
    assert {batch.arrays["tokens"].shape[2] for host in batches for batch in host} == {160}


def test_an_epoch_gives_every_record_once_and_the_next_epoch_has_another_order(records, open_stream):
    stream = open_stream(records)
    epochs = [[name for _ in range(5) for name in next(stream).ids] for _ in range(2)]
    assert all(len(set(epoch)) == 20 for epoch in epochs) and epochs[0] != epochs[1]


def test_with_a_face_crop_frames_have_six_channels_in_every_number_of_workers(open_stream):
    face = video(list(rendered(12)))
    source = [record(number, clip=face) for number in range(8)]
    batches = [next(open_stream(source, size=32, face_crop=FaceCrop(), workers=workers)) for workers in (0, 2)]
    plain = next(open_stream(source, size=32))
    assert same(*batches)
    frames = batches[0].arrays["frames"]
    assert frames.shape == (4, 4, 32, 32, 6) and (frames[..., :3] == plain.arrays["frames"]).all()
    assert (frames[..., 3:] != frames[..., :3]).any()


def test_the_same_seed_gives_the_same_stream_and_another_seed_another(records, open_stream):
    settings = dict(sampling="rand", augment=Augment())
    streams = [open_stream(records, seed=seed, **settings) for seed in (3, 3, 4)]
    first, again, other = ([next(stream) for _ in range(3)] for stream in streams)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_stream_resumes_bit_for_bit_and_is_the_same_for_any_number_of_workers(
    records, clip, workers, open_stream, tmp_path
):
    source = [*records, record(20, clip=b"not a video")]
    reference = open_stream(source)
    expected = [next(reference) for _ in range(9)]
    stream = open_stream(source, workers=workers)
    assert all(same(next(stream), batch) for batch in expected[:5])
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(stream)))
        manager.wait_until_finished()
        for _ in range(2):  # batches read after saving do not matter
            next(stream)
        stream.close()
        restored = open_stream(source, workers=workers)
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    assert restored.counted.seen == 20 + restored.counted.bad
    assert all(same(next(restored), batch) for batch in expected[5:])
    assert restored.counted.get_state() == reference.counted.get_state()
    assert list(restored.counted.reasons) == ["clip-20"]


def test_workers_ignore_signals_to_the_process_group(records, open_stream):
    stream = open_stream(records, workers=1)
    next(stream)
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(12):  # more than they have ready
        next(stream)
    stream.close()
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()


def test_a_stream_cannot_resume_with_another_number_of_workers(records, open_stream):
    state = open_stream(records).get_state()
    with pytest.raises(UserError, match="'workers': 0.* this run has .*'workers': 1"):
        open_stream(records, workers=1).set_state(state)


def test_a_bad_record_is_skipped_counted_and_named(records, clip, open_stream, caplog):
    long = record(31, clip=clip)
    long = Record(**{**vars(long), "questions": (Question("word " * 300, "yes", "hair"),)})
    source = [*records, record(30, clip=b"not a video"), long]
    stream = open_stream(source, batch=10)
    seen = {name for _ in range(4) for name in next(stream).ids}
    assert seen == {f"clip-{number}" for number in range(20)}
    assert stream.counted.bad >= 2 and stream.counted.seen == 40 + stream.counted.bad
    assert set(stream.counted.reasons) == {"clip-30", "clip-31"}
    assert "clip clip-30 cannot be read as a video" in stream.counted.reasons["clip-30"]
    assert "over the limit of 160" in stream.counted.reasons["clip-31"]
    assert "record clip-30 is skipped" in caplog.text


def test_more_than_one_percent_of_bad_records_stops_the_run_and_names_them(clip, open_stream):
    good = [record(number, clip=clip, questions=1) for number in range(98)]
    stream = open_stream([*good, *(record(number, clip=b"bad") for number in (98, 99))], frames=1, size=8)
    with pytest.raises(UserError, match="2 of 100 records are bad, more than 1%: fix or remove clip-9., clip-9."):
        for _ in range(30):
            next(stream)


def test_one_percent_of_bad_records_does_not_stop_the_run(clip, open_stream):
    good = [record(number, clip=clip, questions=1) for number in range(99)]
    stream = open_stream([*good, record(99, clip=b"bad")], frames=1, size=8)
    for _ in range(60):
        next(stream)
    assert stream.counted.bad >= 2


def test_a_data_set_of_only_bad_records_stops_once_each_was_read(open_stream):
    stream = open_stream([record(number, clip=b"bad") for number in range(7)])
    with pytest.raises(UserError, match="7 of 7 records are bad"):
        next(stream)


def test_texts_that_no_bucket_holds_stop_the_run_with_the_length_that_would(clip, open_stream):
    def with_summary(number: int) -> Record:
        return Record(**{**vars(record(number, clip=clip)), "summary": "word " * (30 + number)})

    stream = open_stream([with_summary(number) for number in range(3)], text="summary", buckets=[48, 64], size=8)
    said = "3 of 3 records are bad.*the longest text so far needs ([0-9]+) tokens: set --config.data.buckets=.(.*).$"
    with pytest.raises(UserError, match=said) as error:
        next(stream)
    needed, lengths = re.search(said, str(error.value)).groups()
    buckets = [int(length) for length in lengths.split(",")]
    assert buckets[:2] == [48, 64] and buckets[2] % 32 == 0 and 0 <= buckets[2] - int(needed) < 32
    stream = open_stream([with_summary(number) for number in range(3)], text="summary", buckets=buckets, size=8)
    assert next(stream).arrays["tokens"].shape[2] == buckets[2]


def test_workers_whose_clips_do_not_fit_in_shared_memory_are_refused(records, open_stream, monkeypatch):
    def free(path):
        assert path == "/dev/shm"
        return SimpleNamespace(free=50_000)

    monkeypatch.setattr(loader.shutil, "disk_usage", free)
    said = "^/dev/shm has 0.1 MB left, but data.workers=2 need .* set --config.data.workers=0, or .* --shm-size=2g$"
    with pytest.raises(UserError, match=said):
        open_stream(records, size=64, workers=2)
    open_stream(records, size=64)  # a thread of this process needs none


def test_a_worker_that_died_as_of_full_shared_memory_is_one_line(records, open_stream):
    before = set(multiprocessing.active_children())
    stream = open_stream(records, workers=1)
    next(stream)
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, signal.SIGBUS)
    with pytest.raises(UserError, match="^a process that decodes clips died ./dev/shm is full.: set --config.data"):
        for _ in range(20):  # batches that were ready come first
            next(stream)


def test_a_bug_in_the_program_does_not_count_as_a_bad_record(records, open_stream, monkeypatch):
    def broken(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(loader, "decode", broken)
    with pytest.raises(TypeError, match="a bug"):
        next(open_stream(records))


def test_unknown_text_and_too_few_records_are_user_errors(records, open_stream):
    with pytest.raises(UserError, match="unknown training text 'captions'"):
        open_stream(records, text="captions")
    with pytest.raises(UserError, match="2 records for 3 hosts"):
        open_stream(records[:2], process_count=3)


def started_from(group: int) -> list[int]:
    """Returns the live processes of a process group."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                alive.append(int(entry.name))
    return alive


def shared_clips() -> set[str]:
    """Returns the shared memory files that have the unusual size of the next test's decoded clips."""
    found = set()
    for entry in os.scandir("/dev/shm"):
        with contextlib.suppress(FileNotFoundError):  # another program may delete its file meanwhile
            if entry.stat().st_size == 17 * 232 * 232 * 3:
                found.add(entry.name)
    return found


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks into Linux's /proc and /dev/shm")
def test_a_killed_parent_leaves_no_worker_and_no_shared_memory(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import time
        from tests.data.test_loader import *

        if __name__ == "__main__":
            clip = encode_video(10)
            stream = training_batches(
                [record(number, clip=clip) for number in range(8)], Conversation(byte_pairs(), 3),
                PromptEncoder(bert("clip"), 12), text="qa", frames=17, size=232, batch=2, buckets=[200], workers=2,
            )
            next(stream)
            print("running", flush=True)
            time.sleep(600)
        """)
    )
    environment, before = {**os.environ, "PYTHONPATH": str(ROOT)}, shared_clips()
    main = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, env=environment, start_new_session=True, text=True
    )
    try:
        assert main.stdout.readline() == "running\n"
        assert len(started_from(main.pid)) >= 3
        assert shared_clips() - before, "frames of this size travel in shared memory"
        os.kill(main.pid, signal.SIGKILL)
        main.wait()
        deadline = time.monotonic() + 20
        while (started_from(main.pid) or shared_clips() - before) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not started_from(main.pid)
        assert not shared_clips() - before
    finally:
        for process in started_from(main.pid):
            os.kill(process, signal.SIGKILL)
