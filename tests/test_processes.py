import signal
import subprocess
import sys
import threading
import time

import pytest

from favchat_jax import processes
from favchat_jax.errors import UserError
from tests.conftest import ROOT, places_of

# Meets the others again and again, as a run does with its steps.
MEETING = """
import sys, time
from favchat_jax import command_line
from favchat_jax import processes

def main():
    with processes.joined(sys.argv[2]):
        while True:
            processes.any_process(False)
            print("met", flush=True)
            time.sleep(0.2)

command_line.parse = lambda argv: None
command_line.start(main)
"""


@pytest.mark.parametrize(
    "value", ["here", "localhost:80,2", "localhost,2,0", "localhost:99999,2,0", "localhost:80,2,2"]
)
def test_a_place_among_processes_of_another_form_is_refused(value):
    with pytest.raises(UserError, match="give auto, or HOST:PORT,COUNT,INDEX"), processes.joined(value):
        pass


def test_a_single_process_asks_nobody():
    with processes.joined(""):
        assert processes.any_process(True) and not processes.any_process(False)
        assert processes.gathered({"a": 1}) == [{"a": 1}]
        done = []
        processes.first_alone(lambda: done.append(1))
    assert done == [1]


# Meets the other one, then has an error, which the other one has not.
REFUSING = """
import sys, time
from favchat_jax import command_line
from favchat_jax import processes
from favchat_jax.errors import UserError

def main():
    with processes.joined(sys.argv[2]):
        processes.any_process(False)
        if sys.argv[2].endswith(sys.argv[3]):
            raise UserError("this clip is bad: fix it")
        time.sleep(200)

command_line.parse = lambda argv: None
command_line.start(main)
"""


@pytest.mark.parametrize("index", [0, 2])
def test_an_error_of_one_process_ends_all_with_it(index):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", REFUSING, "--", place, str(index)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for place in places_of(3)
    ]
    for number, process in enumerate(started):
        _, errors = process.communicate(timeout=120)
        said = [line for line in errors.splitlines() if "this clip is bad: fix it" in line]
        assert process.returncode == 2 and len(said) == 1
        assert ("ends because another one did" in said[0]) == (number != index)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_ends_with_one_line(victim):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING, "--", place],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places_of(2)
    ]
    try:
        assert all("met\n" in process.stdout for process in started)  # after lines of the library that connects them
        started[victim].send_signal(signal.SIGKILL)
        before = time.monotonic()
        other = started[1 - victim]
        _, errors = other.communicate(timeout=120)
        assert time.monotonic() - before < 60
        assert other.returncode == 1
        said = [line for line in errors.splitlines() if "lost another one" in line]
        assert said and "the last checkpoint is intact: start all processes again" in said[0]
        assert "Traceback" not in errors and "stack trace" not in errors
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_nobody_joins_ends_with_one_line(index, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 1)
    place = places_of(2)[index]
    expected = "no meeting of 2 processes at localhost:.*not all processes came.*each its own INDEX"
    with pytest.raises(UserError, match=expected), processes.joined(place):
        pass


def test_two_processes_with_one_index_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 5)
    place = places_of(3)[1]
    port = int(place.split(":")[1].split(",")[0])
    said = "localhost", port, 3, 1, time.monotonic() + 1
    for _ in range(2):
        threading.Thread(target=lambda: pytest.raises(OSError, processes._come, *said), daemon=True).start()
    with pytest.raises(UserError, match="two processes have INDEX 1"):
        processes._meet("localhost", port, 3, 0)


def test_processes_with_different_settings_are_refused_by_all():
    code = """
import sys
from favchat_jax import command_line, processes

def main():
    with processes.joined(sys.argv[2], {"batch": int(sys.argv[2][-1])}):
        print("joined")

command_line.parse = lambda argv: None
command_line.start(main)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code, "--", place], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for place in places_of(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and "were given different settings: start the same command" in errors
