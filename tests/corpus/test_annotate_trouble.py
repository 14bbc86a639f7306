"""Annotating under failures of the endpoint, the limits, the disk and the process, and the cost of each."""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from favchat_jax.corpus import endpoint
from favchat_jax.corpus.calls import CALLS, Calls, Reply
from favchat_jax.corpus.manifest import KEPT, write_table
from favchat_jax.errors import RunError, UserError
from tests import conftest as disk
from tests.conftest import ROOT
from tests.corpus import annotate_process
from tests.corpus.annotating import KEY, LIMITS, failing, for_step, run, unannotated
from tests.corpus.chat_server import Answer, good
from tests.corpus.corpus_folder import fill, row


@pytest.mark.parametrize(
    "trouble",
    [
        Answer(status=429, raw=b'{"error": {"message": "slow down"}}', headers={"Retry-After": "0.05"}),
        Answer(status=500, raw=b"oops"),
        Answer(status=503, raw=b""),
        Answer(delay=1.2),
        Answer(raw=b"{", headers={"Content-Length": "100"}),
        Answer(status=500, raw=b"{", headers={"Content-Length": "100"}),
        Answer(status=500, raw=b"not packed", headers={"Content-Encoding": "gzip"}),
        Answer(status=429, raw=b"{}", headers={"Retry-After": "nan"}),
    ],
    ids=["429", "500", "503", "timeout", "cut short", "500 cut short", "garbled", "no time to wait"],
)
def test_a_temporary_failure_is_retried_and_the_result_is_the_same(start, tmp_path, trouble):
    out, reference = fill(tmp_path / "out", 1), fill(tmp_path / "reference", 1)
    if trouble.headers.get("Content-Length"):  # the server promises more than it sends, then closes
        trouble.headers["Connection"] = "close"
    server = start(failing(2, trouble))
    run(out, dataclasses.replace(LIMITS, timeout=0.6 if trouble.delay else 20))
    assert len(server.asked) == 2 + 3
    start()
    run(reference)
    assert (out / "annotations.jsonl").read_bytes() == (reference / "annotations.jsonl").read_bytes()


def test_a_lasting_failure_is_recorded_and_the_same_command_resumes(start, tmp_path):
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
    with pytest.raises(RunError, match="10 calls in a row without an answer.*HTTP 502.*same command resumes"):
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
def test_an_error_that_no_further_call_can_fix_ends_the_run_immediately(start, tmp_path, answer, line):
    out = fill(tmp_path / "out", 6)
    server = start(lambda *_: answer)
    with pytest.raises(UserError, match=line) as error:
        run(out)
    assert len(server.asked) <= LIMITS.concurrency and KEY not in str(error.value)
    assert not (out / "annotations.jsonl").exists()


def test_a_request_that_the_endpoint_rejects_becomes_the_reason_of_that_clip(start, tmp_path):
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
    ("name", "value"),
    [
        ("API_KEY", "sk-\u20ac"),
        ("API_KEY", "sk-a\nb"),
        ("BASE_URL", "localhost:8000/v1"),
        ("BASE_URL", "http://[::8000/v1"),
    ],
)
def test_an_invalid_variable_is_named_without_its_value(start, tmp_path, monkeypatch, name, value):
    start()
    monkeypatch.setenv(f"OPENAI_{name}", value)
    with pytest.raises(UserError, match=f"OPENAI_{name} (must be|holds)") as error:
        run(fill(tmp_path / "out", 1))
    assert value not in str(error.value)


def test_spending_stays_below_the_limit(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 6)
    limits = dataclasses.replace(LIMITS, concurrency=3, spend=0.05)  # a call of the server costs $0.0035
    with pytest.raises(RunError, match="got no answer"):
        run(out, limits)
    spent = sum(0.0035 for _ in server.asked)
    assert 0.02 < spent <= 0.05
    assert any("--spend_limit" in reason for reason in unannotated(out).values())
    run(out, dataclasses.replace(limits, spend=0))
    assert len(server.asked) == 18 and unannotated(out) == {}


def test_calls_keep_below_the_rate_limit(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    started = time.monotonic()
    run(out, dataclasses.replace(LIMITS, concurrency=6, calls_per_minute=600))
    assert len(server.asked) == 6 and time.monotonic() - started >= 0.5


def test_a_full_disk_ends_the_run_and_loses_no_reply(tmp_path):
    calls = Calls(tmp_path)
    reply = Reply("x" * 4000, "", 1, 2, 0.5)
    calls.store("first", "summary", reply)
    calls._file.execute("PRAGMA max_page_count = 4")
    with pytest.raises(UserError, match="disk is full; free some space, then repeat the command to resume"):
        for number in range(9):
            calls.store(str(number), "summary", reply)
    calls.close()
    assert Calls(tmp_path).find("first") == reply


def test_a_full_disk_leaves_the_earlier_texts_unchanged(start, small_disk):
    out = fill(small_disk / "out", 2)
    start()
    run(out)
    before = (out / "annotations.jsonl").read_bytes()
    disk.fill(small_disk)
    with pytest.raises(UserError, match="could not write .*jsonl .No space left on device"):
        run(out)  # every reply is cached; only the texts are rewritten
    assert (out / "annotations.jsonl").read_bytes() == before


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    first = Calls(tmp_path)
    with pytest.raises(UserError, match="another annotate is using this folder"):
        Calls(tmp_path)
    first.close()
    Calls(tmp_path).close()


def test_a_calls_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / CALLS).write_text("not a database, but long enough to be taken for the head of one" * 99)
    with pytest.raises(UserError, match="calls.sqlite: not a database of calls"):
        Calls(tmp_path)


def test_the_command_reports_a_refused_key_in_one_line(start, tmp_path):
    out = fill(tmp_path / "out", 1)
    start(lambda *_: Answer(status=401, raw=json.dumps({"error": {"message": f"Incorrect API key {KEY}"}}).encode()))
    command = [sys.executable, "-m", "tools.build_dataset", "annotate", f"--out={out}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    line = (
        "build_dataset: the endpoint of OPENAI_BASE_URL refuses the key (HTTP 401): set OPENAI_API_KEY to a valid one\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)


@pytest.fixture(scope="module")
def processes():
    """Returns a factory of annotating processes, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.corpus.annotate_process"])
    return lambda out: context.Process(target=annotate_process.run, args=(dict(os.environ), out, LIMITS))


def stored(out) -> set[str]:
    """Returns the keys of the calls on disk."""
    with contextlib.closing(sqlite3.connect(out / CALLS)) as file, contextlib.suppress(sqlite3.OperationalError):
        return {key for (key,) in file.execute("SELECT key FROM calls")}
    return set()  # the process was killed before it created the table


def test_after_ten_kills_the_bytes_are_the_same_and_no_stored_call_is_paid_twice(start, tmp_path, processes):
    clips, rng, allowed = 15, random.Random(0), [0]

    def held(asked, number):
        """Answers the allowed requests after a delay, and holds later ones until after the kill."""
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
        lost += len(set(asked) - stored(out))  # in flight at the kill, so possibly charged
    allowed[0] = 10**6
    run(out)
    keys = Counter(request.key for request in server.asked)
    assert len(keys) == 3 * clips and keys.total() - len(keys) == lost <= 10 * LIMITS.concurrency
    run(reference)
    assert (out / "annotations.jsonl").read_bytes() == (reference / "annotations.jsonl").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_waits_for_the_calls_in_flight_and_pays_for_none_twice(start, tmp_path, processes, number):
    server, out = start(lambda asked, n: dataclasses.replace(good(asked, n), delay=0.1)), fill(tmp_path / "out", 4)
    process = processes(out)
    process.start()
    while len(server.asked) < 5:
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (0 if number == signal.SIGTERM else 1)  # the command turns the latter into 130
    assert stored(out) == {request.key for request in server.asked} and len(server.asked) < 12
    run(out)
    assert len(server.asked) == len({request.key for request in server.asked}) == 12


def test_no_call_starts_after_a_stop(start, tmp_path):
    server = start()
    stop = threading.Event()
    stop.set()
    stopped = endpoint.Endpoint(Calls(tmp_path), LIMITS, stop)
    with pytest.raises(endpoint.Stopped):
        stopped.ask("summary", "key", "system", "text", list)
    assert not server.asked
