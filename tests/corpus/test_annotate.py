"""Annotating against a real HTTP server on loopback: what goes out, what comes back, what goes wrong, what it costs."""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter

import cv2
import numpy as np
import pytest

from favchat_jax.corpus import clip_frames, endpoint
from favchat_jax.corpus.annotate import annotate, write_texts
from favchat_jax.corpus.annotations import Annotation, read_annotations, write_lines
from favchat_jax.corpus.calls import CALLS, Calls, Reply
from favchat_jax.corpus.endpoint import Limits
from favchat_jax.corpus.kept import read_kept
from favchat_jax.corpus.manifest import KEPT, write_table
from favchat_jax.corpus.reviews import Review, Reviews
from favchat_jax.errors import RunError, UserError
from tests.conftest import ROOT
from tests.corpus import annotate_process
from tests.corpus.chat_server import PAIRS, SUMMARY, Answer, ChatServer, good
from tests.corpus.corpus_folder import LABELS, fill, row
from tests.data.video_files import encode_video

KEY = "sk-not-to-be-seen"
LIMITS = Limits(concurrency=2, calls_per_minute=60_000, retries=2, timeout=20)


@pytest.fixture
def start(monkeypatch):
    """Starts servers and points the environment at the last one."""
    servers = []

    def begin(answer=good) -> ChatServer:
        servers.append(ChatServer(answer))
        for name, value in {"BASE_URL": servers[-1].url, "API_KEY": KEY, "MODEL": "some-model"}.items():
            monkeypatch.setenv(f"OPENAI_{name}", value)
        return servers[-1]

    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def run(out, limits=LIMITS, attempts=3, backend="openai", dry_run=False) -> None:
    annotate(out, backend, limits, attempts, dry_run)


def unannotated(out) -> dict[str, str]:
    rows = map(json.loads, (out / "unannotated.jsonl").read_text().splitlines())
    return {row["id"]: row["reason"] for row in rows}


def failing(times: int, answer: Answer):
    """A server that gives `answer` so many times and good answers after that."""
    return lambda asked, number: answer if number < times else good(asked, number)


def for_step(step: str, answer: Answer, times: int = 10**6):
    """A server that answers the first calls of one step in this way."""
    seen = Counter()

    def respond(asked, number):
        seen[asked.step] += 1
        return answer if asked.step == step and seen[step] <= times else good(asked, number)

    return respond


def test_a_clip_becomes_features_a_summary_and_questions_by_three_calls(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out)
    assert sorted(asked.step for asked in server.asked) == ["features"] * 2 + ["questions"] * 2 + ["summary"] * 2
    annotations = read_annotations(out)
    assert list(annotations) == ["clip000", "clip001"]
    one = annotations["clip000"]
    assert (one.backend, one.model, one.attempts, one.problems) == ("openai", "some-model", 3, ())
    assert one.features["hair"] == "short brown hair" and one.summary.startswith("A young man")
    assert [(pair.question, pair.answer, pair.kind) for pair in one.questions] == PAIRS
    assert unannotated(out) == {}


def test_an_endpoint_sees_one_frame_in_four_the_labels_and_what_it_said_before(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 1)
    run(out)
    contents = [asked.body["messages"][1]["content"] for asked in server.asked]
    assert [len(content) for content in contents] == [4, 4, 1]  # frames 0, 4 and 8 of 9
    assert all(part["image_url"]["url"].startswith("data:image/jpeg;base64,") for part in contents[0][1:])
    texts = [content[0]["text"] for content in contents]
    assert all("male, young, brown hair, eyeglasses, no beard" in text and "talk, nod" in text for text in texts)
    assert "short brown hair" in texts[1] and "He was filmed" in texts[2]
    assert not any("$" in text.replace("$ref", "").replace("$defs", "") for text in texts)


def test_a_long_or_large_clip_is_shown_in_small_pictures_evenly_spread(tmp_path):

    path = tmp_path / "a: clip.mp4"
    path.write_bytes(encode_video(270, width=544, height=272, options={"preset": "ultrafast"}))
    pictures = clip_frames.pictures(path)
    assert len(pictures) == clip_frames.count(270) == clip_frames.MOST

    assert cv2.imdecode(np.frombuffer(pictures[0], np.uint8), cv2.IMREAD_COLOR).shape == (256, 512, 3)


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out)
    before = (out / "annotations.jsonl").read_bytes()
    asked = len(server.asked)
    (out / "annotations.jsonl").unlink()
    run(out)
    assert (out / "annotations.jsonl").read_bytes() == before and len(server.asked) == asked


def test_a_changed_clip_is_asked_about_anew_and_the_others_are_not(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out)
    (out / "kept/clip001.mp4").write_bytes((fill(tmp_path / "other", 3) / "kept/clip002.mp4").read_bytes())
    run(out)
    assert len(server.asked) == 6 + 3


@pytest.mark.parametrize(
    ("step", "bad", "refused_for"),
    [
        ("features", Answer("{}"), "schema"),
        ("features", Answer("not json"), "not JSON"),
        ("features", Answer(raw=b"<html>gateway</html>"), "not a chat completion"),
        ("features", Answer(raw=b'{"choices": []}'), "not a chat completion"),
        ("summary", Answer(""), "empty"),
        (
            "summary",
            Answer("I'm sorry, but I cannot help with that, since the video shows a real person and his face."),
            "refusal",
        ),
        ("summary", Answer(SUMMARY.replace("happy", "angry")), "anger"),
        ("summary", Answer(SUMMARY, finish="length"), "cut off"),
        ("summary", Answer(raw=b"x" * (10 << 20)), "larger than 1 MB"),
        ("questions", Answer("{}"), "schema"),
    ],
)
def test_an_answer_that_will_not_do_is_asked_for_anew_with_the_reason(start, tmp_path, step, bad, refused_for):
    server, out = start(for_step(step, bad, times=1)), fill(tmp_path / "out", 1)
    run(out)
    texts = [asked.body["messages"][1]["content"][0]["text"] for asked in server.asked if asked.step == step]
    assert len(texts) == 2 and refused_for in texts[1].removeprefix(texts[0])
    one = read_annotations(out)["clip000"]
    assert (one.attempts, one.problems, len(one.questions)) == (4, (), 4)


def test_after_the_last_attempt_the_text_is_left_to_the_reviewers_with_its_problems(start, tmp_path):
    server, out = start(for_step("summary", Answer(SUMMARY.replace("happy", "angry")))), fill(tmp_path / "out", 1)
    run(out, attempts=2)
    one = read_annotations(out)["clip000"]
    assert one.attempts == 3 and one.problems == ("it says anger, and the labels say happy",)
    assert one.questions == () and Counter(asked.step for asked in server.asked)["questions"] == 0


def test_a_clip_without_features_is_recorded_with_its_reason(start, tmp_path):
    server, out = start(for_step("features", Answer("no"))), fill(tmp_path / "out", 1)
    run(out, attempts=2)
    assert read_annotations(out) == {} and len(server.asked) == 2
    assert unannotated(out)["clip000"] == "no feature dictionary after 2 answers: the text is not JSON"


def test_equal_summaries_of_two_clips_are_told_apart(start, tmp_path):
    def same_first(asked, number):
        first = "a reader wants another text" not in asked.body["messages"][1]["content"][0]["text"]
        return Answer(SUMMARY) if asked.step == "summary" and first else good(asked, number)

    out = fill(tmp_path / "out", 2)
    start(same_first)
    run(out)
    summaries = [annotation.summary for annotation in read_annotations(out).values()]
    assert summaries[0] == SUMMARY != summaries[1]


def test_two_equal_clips_ask_for_nothing_twice(start, tmp_path):
    out = fill(tmp_path / "out", 2)
    shutil.copy(out / "kept/clip000.mp4", out / "kept/clip001.mp4")
    server = start(lambda asked, number: dataclasses.replace(good(asked, number), delay=0.05))
    run(out)
    assert max(Counter(request.key for request in server.asked).values()) == 1
    first, second = read_annotations(out).values()
    assert first.summary != second.summary and not first.problems + second.problems


def test_a_summary_that_a_rewritten_one_meets_is_rewritten_too(tmp_path):
    texts = {"clip000": ["S"], "clip001": ["S", "T"], "clip002": ["T", "U"]}

    class Writing:
        def write(self, clip, refused=()):
            return Annotation(clip.id, "", "openai", "", "", {}, texts[clip.id][len(refused)], (), 3, ())

    out = fill(tmp_path / "out", 3)
    written = write_texts(read_kept(out), Writing(), Reviews(out), 2, threading.Event())
    assert {name: text.summary for name, text in written.annotations.items()} == {
        "clip000": "S",
        "clip001": "T",
        "clip002": "U",
    }


def test_equal_summaries_that_stay_equal_are_a_problem(start, tmp_path):
    out = fill(tmp_path / "out", 2)
    start(for_step("summary", Answer(SUMMARY)))
    run(out)
    problems = [annotation.problems for annotation in read_annotations(out).values()]
    assert problems == [(), ("its summary is that of clip clip000",)]


@pytest.mark.parametrize(
    "trouble",
    [
        Answer(status=429, raw=b'{"error": {"message": "slow down"}}', headers={"Retry-After": "0.05"}),
        Answer(status=500, raw=b"oops"),
        Answer(status=503, raw=b""),
        Answer(delay=1.2),
        Answer(raw=b"{", headers={"Content-Length": "100"}),
    ],
    ids=["429", "500", "503", "timeout", "cut short"],
)
def test_trouble_that_passes_is_waited_out_and_leaves_no_trace(start, tmp_path, trouble):
    out, reference = fill(tmp_path / "out", 1), fill(tmp_path / "reference", 1)
    if trouble.headers.get("Content-Length"):  # the server promises more than it sends, and closes
        trouble.headers["Connection"] = "close"
    server = start(failing(2, trouble))
    run(out, dataclasses.replace(LIMITS, timeout=0.6 if trouble.delay else 20))
    assert len(server.asked) == 2 + 3
    start()
    run(reference)
    assert (out / "annotations.jsonl").read_bytes() == (reference / "annotations.jsonl").read_bytes()


def test_trouble_that_stays_is_recorded_and_the_same_command_goes_on(start, tmp_path):
    out = fill(tmp_path / "out", 2)
    server = start(for_step("summary", Answer(status=500, raw=f"{KEY} is broken".encode())))
    with pytest.raises(RunError, match="0 of 2 clips.*2 got no answer, and the same command"):
        run(out)
    assert Counter(asked.step for asked in server.asked) == {"features": 2, "summary": 2 * (1 + LIMITS.retries)}
    assert unannotated(out)["clip000"].startswith("no answer: HTTP 500")
    server = start()
    run(out)
    assert Counter(asked.step for asked in server.asked) == {"summary": 2, "questions": 2}
    assert unannotated(out) == {}


def test_a_dead_endpoint_ends_the_run(start, tmp_path):
    out = fill(tmp_path / "out", 1)
    write_table(out, KEPT, [{**row("clip000"), "id": f"clip{n:03d}"} for n in range(30)])
    server = start(lambda *_: Answer(status=502, raw=b""))
    with pytest.raises(RunError, match="10 calls in a row without an answer.*HTTP 502.*same command goes on"):
        run(out, dataclasses.replace(LIMITS, retries=0))
    assert endpoint.FAILURES_IN_ROW <= len(server.asked) <= endpoint.FAILURES_IN_ROW + LIMITS.concurrency


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (
            Answer(status=401, raw=f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode()),
            "refuses the key.*OPENAI_API_KEY",
        ),
        (Answer(status=403, raw=b"{}"), "refuses the key"),
        (Answer(status=404, raw=b"{}"), "no chat completions with model 'some-model'"),
        (Answer(status=429, raw=b'{"error": {"message": "", "code": "insufficient_quota"}}'), "no credit left"),
    ],
    ids=["401", "403", "404", "quota"],
)
def test_what_no_further_call_can_mend_ends_the_run_at_once(start, tmp_path, answer, line):
    out = fill(tmp_path / "out", 6)
    server = start(lambda *_: answer)
    with pytest.raises(UserError, match=line) as error:
        run(out)
    assert len(server.asked) <= LIMITS.concurrency and KEY not in str(error.value)
    assert not (out / "annotations.jsonl").exists()


def test_a_request_that_the_endpoint_will_not_take_is_that_clip_s_reason(start, tmp_path):
    out = fill(tmp_path / "out", 1)
    server = start(lambda *_: Answer(status=400, raw=json.dumps({"error": {"message": f"no images, {KEY}"}}).encode()))
    with pytest.raises(RunError):
        run(out)
    assert len(server.asked) == 1 and "no images, (key)" in unannotated(out)["clip000"]


def test_the_key_is_written_nowhere(start, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    out = fill(tmp_path / "out", 1)
    start(failing(1, Answer(status=500, raw=json.dumps({"error": {"message": f"key {KEY}"}}).encode())))
    run(out)
    assert "HTTP 500" in caplog.text and KEY not in caplog.text
    assert not any(KEY.encode() in path.read_bytes() for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"])
def test_a_variable_that_is_not_set_is_named(start, tmp_path, monkeypatch, name):
    start()
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"{name} is not set"):
        run(fill(tmp_path / "out", 1))


@pytest.mark.parametrize(
    ("name", "value"), [("API_KEY", "sk-\u20ac"), ("API_KEY", "sk-a\nb"), ("BASE_URL", "localhost:8000/v1")]
)
def test_a_variable_that_cannot_be_right_is_named(start, tmp_path, monkeypatch, name, value):
    start()
    monkeypatch.setenv(f"OPENAI_{name}", value)
    with pytest.raises(UserError, match=f"OPENAI_{name} (must be|holds)") as error:
        run(fill(tmp_path / "out", 1))
    assert value not in str(error.value)


def test_no_more_is_spent_than_the_limit(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 6)
    limits = dataclasses.replace(LIMITS, concurrency=3, spend=0.05)  # a call of the server costs $0.0035
    with pytest.raises(RunError, match="got no answer"):
        run(out, limits)
    spent = sum(0.0035 for _ in server.asked)
    assert 0.02 < spent <= 0.05
    assert any("--spend_limit" in reason for reason in unannotated(out).values())
    run(out, dataclasses.replace(limits, spend=0))
    assert len(server.asked) == 18 and unannotated(out) == {}


def test_calls_keep_the_pace(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    started = time.monotonic()
    run(out, dataclasses.replace(LIMITS, concurrency=6, calls_per_minute=600))
    assert len(server.asked) == 6 and time.monotonic() - started >= 0.5


def test_the_dry_run_asks_nothing_and_tells_what_is_left(start, tmp_path, capsys):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out, dry_run=True)
    table = capsys.readouterr().out.splitlines()
    assert not server.asked and table[1].split()[:4] == ["to", "do", "2", "6"]
    assert table[2].split()[2:4] == ["61,007", "183,021"]
    run(out)
    run(out, dry_run=True)
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[2:] == ["0", "0", "0", "0", "0.00", "0.00"] and table[3].startswith("paid so far: $0.02")
    # 100 output tokens a call are what the server says.
    assert table[2].split()[3:6:2] == ["183,021", f"{183_021 * 100:,}"]


def test_the_dry_run_counts_answers_that_were_refused(start, tmp_path, capsys):
    out = fill(tmp_path / "out", 2)
    start(for_step("features", Answer("{}"), times=2))  # 4 answers for 2 clips
    run(out, dataclasses.replace(LIMITS, concurrency=1))
    run(out, dry_run=True)
    assert capsys.readouterr().out.splitlines()[2].split()[3] == f"{61_007 * 4:,}"


def test_what_a_reviewer_wants_anew_is_written_anew_and_told_apart(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out)
    before = read_annotations(out)
    one = before["clip000"]
    Reviews(out).add(Review("clip000", "ada", "regenerate", one.summary, one.questions, "2025-01-01", one.text()))
    run(out)
    after = read_annotations(out)
    assert after["clip001"] == before["clip001"] and after["clip000"].summary != one.summary
    assert [asked.step for asked in server.asked[6:]] == ["summary", "questions"]  # the features are paid for
    assert one.summary in server.asked[6].body["messages"][1]["content"][0]["text"]
    run(out)
    assert read_annotations(out) == after and len(server.asked) == 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attributes": '{"emotion": ["glad"]}'}, "'glad' is no emotion of CelebV-HQ"),
        ({"path": "kept/gone.mp4"}, "gone.mp4 cannot be read"),
        ({"path": "kept/empty.mp4"}, "the clip cannot be read"),
        ({"path": "kept/text.mp4"}, "the clip cannot be read"),
    ],
)
def test_a_clip_that_cannot_be_used_is_recorded_and_the_others_go_on(start, tmp_path, change, reason):
    start()
    out = fill(tmp_path / "out", 2)
    (out / "kept/empty.mp4").touch()
    (out / "kept/text.mp4").write_text("no video")
    write_table(out, KEPT, [row("clip000", **change), row("clip001")])
    run(out)
    assert list(read_annotations(out)) == ["clip001"] and reason in unannotated(out)["clip000"]


def test_timed_emotions_are_labels_too(start, tmp_path):
    timed = {**LABELS, "emotion": [{"emotion": "happy", "start_sec": 0, "end_sec": 1}, {"emotion": "neutral"}]}
    server, out = start(), fill(tmp_path / "out", 1, timed)
    run(out)
    assert "emotion: happy, neutral" in server.asked[0].body["messages"][1]["content"][0]["text"]


def test_a_path_that_leads_out_of_the_folder_is_refused(start, tmp_path):
    start()
    out = fill(tmp_path / "out", 1)
    write_table(out, KEPT, [row("clip000", path="../../secret.mp4")])
    with pytest.raises(UserError, match="clip000 lies outside"):
        run(out)


def test_templates_annotate_without_an_endpoint(tmp_path):
    out = fill(tmp_path / "out", 3)
    write_table(out, KEPT, [row("clip000"), row("clip001"), row("clip002", None)])
    run(out, backend="template")
    before = (out / "annotations.jsonl").read_bytes()
    assert list(read_annotations(out)) == ["clip000", "clip001"] and "no labels" in unannotated(out)["clip002"]
    run(out, backend="template")
    assert (out / "annotations.jsonl").read_bytes() == before


def test_a_full_disk_ends_the_run_and_loses_no_reply(tmp_path):
    calls = Calls(tmp_path)
    reply = Reply("x" * 4000, "", 1, 2, 0.5)
    calls.store("first", "summary", reply)
    calls._file.execute("PRAGMA max_page_count = 4")
    with pytest.raises(UserError, match="disk is full; make room, and the same command goes on"):
        for number in range(9):
            calls.store(str(number), "summary", reply)
    calls.close()
    assert Calls(tmp_path).find("first") == reply


def test_a_full_disk_leaves_the_texts_that_were_there(tmp_path):
    path = tmp_path / "annotations.jsonl"
    write_lines(path, ["before"])
    (tmp_path / "annotations.jsonl.draft").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_lines(path, ["x" * 100_000])
    assert path.read_text() == "before\n"


def test_two_runs_on_one_folder_do_not_pay_for_the_same(tmp_path):
    first = Calls(tmp_path)
    with pytest.raises(UserError, match="another annotate is at work"):
        Calls(tmp_path)
    first.close()
    Calls(tmp_path).close()


def test_a_file_of_calls_that_is_something_else_is_named(tmp_path):
    (tmp_path / CALLS).write_text("not a database, but long enough to be taken for the head of one" * 99)
    with pytest.raises(UserError, match="calls.sqlite: not a file of calls"):
        Calls(tmp_path)


def test_the_command_says_in_one_line_that_the_key_is_refused(start, tmp_path):
    out = fill(tmp_path / "out", 1)
    start(lambda *_: Answer(status=401, raw=json.dumps({"error": {"message": f"Incorrect API key {KEY}"}}).encode()))
    command = [sys.executable, "-m", "tools.build_dataset", "annotate", f"--out={out}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    line = "build_dataset: the endpoint refuses the key (HTTP 401): set OPENAI_API_KEY to a valid one\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)


@pytest.fixture(scope="module")
def processes():
    """Makes processes that annotate, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.corpus.annotate_process"])
    return lambda out: context.Process(target=annotate_process.run, args=(dict(os.environ), out, LIMITS))


def stored(out) -> set[str]:
    """The calls that are on the disk."""
    with contextlib.closing(sqlite3.connect(out / CALLS)) as file, contextlib.suppress(sqlite3.OperationalError):
        return {key for (key,) in file.execute("SELECT key FROM calls")}
    return set()  # the process was killed before it had made the table


def test_killed_at_ten_points_the_bytes_are_the_same_and_no_stored_call_is_paid_twice(start, tmp_path, processes):
    clips, rng, allowed = 15, random.Random(0), [0]

    def held(asked, number):
        """Answers so many requests after some time, and holds the later ones until after the kill."""
        time.sleep(rng.uniform(0.01, 0.05))
        while number >= allowed[0]:
            time.sleep(0.01)
        return good(asked, number)

    server = start(held)
    out, reference = fill(tmp_path / "out", clips), fill(tmp_path / "reference", clips)
    lost = 0
    for _ in range(10):
        before, paid = len(server.asked), stored(out)
        allowed[0] = before + rng.randint(1, 4)
        process = processes(out)
        process.start()
        while len(server.asked) < allowed[0]:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        asked = [request.key for request in server.asked[before:]]
        assert process.exitcode == -signal.SIGKILL and not (out / "annotations.jsonl").exists()
        assert not set(asked) & paid and len(set(asked)) == len(asked)
        lost += len(set(asked) - stored(out))  # under way at the kill: nobody can know whether they were charged
    allowed[0] = 10**6
    run(out)
    keys = Counter(request.key for request in server.asked)
    assert len(keys) == 3 * clips and keys.total() - len(keys) == lost <= 10 * LIMITS.concurrency
    run(reference)
    assert (out / "annotations.jsonl").read_bytes() == (reference / "annotations.jsonl").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_awaits_the_calls_under_way_and_pays_for_none_twice(start, tmp_path, processes, number):
    server, out = start(lambda asked, n: dataclasses.replace(good(asked, n), delay=0.1)), fill(tmp_path / "out", 4)
    process = processes(out)
    process.start()
    while len(server.asked) < 5:
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (0 if number == signal.SIGTERM else 1)  # the front door makes 130 of the latter
    assert stored(out) == {request.key for request in server.asked} and len(server.asked) < 12
    run(out)
    assert len(server.asked) == len({request.key for request in server.asked}) == 12


def test_no_call_is_begun_after_a_stop(start, tmp_path):
    server = start()
    stop = threading.Event()
    stop.set()
    asking = endpoint.Endpoint(Calls(tmp_path), LIMITS, stop)
    with pytest.raises(endpoint.Stopped):
        asking.ask("summary", "key", "system", "text", list)
    assert not server.asked
