"""SIGTERM and Ctrl-C are heard between two steps, and a worker ends with its parent."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from favchat_jax.signals import termination
from tests.conftest import ROOT, start_module

pytestmark = pytest.mark.usefixtures("heeded")


def test_sigterm_sets_the_event_and_ends_nothing():
    before = signal.getsignal(signal.SIGTERM)
    with termination("all is saved") as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_sets_the_event_says_what_follows_and_raises_after_the_body(caplog):
    caplog.set_level(logging.INFO, "favchat_jax")
    done = []
    with pytest.raises(KeyboardInterrupt), termination("all is saved") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        done.append(stop.is_set())
    assert done == [True] and caplog.messages == ["interrupted: all is saved; Ctrl-C again ends at once"]


def test_ctrl_c_raises_too_where_the_body_returns():
    def work():
        with termination("all is saved"):
            os.kill(os.getpid(), signal.SIGINT)
            return

    with pytest.raises(KeyboardInterrupt):
        work()


def test_an_error_of_the_body_comes_before_the_interrupt():
    with pytest.raises(ValueError), termination("all is saved"):
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_at_once():
    after = []
    with pytest.raises(KeyboardInterrupt), termination("all is saved") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        after.append("the rest of the work")
    assert after == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_stays_ignored_where_the_shell_ignores_it():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with termination("all is saved") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.is_set()


def test_another_thread_gets_an_event_that_nothing_sets_and_leaves_the_handlers():
    handlers, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with termination("all is saved") as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGINT) is handlers))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from favchat_jax.signals import end_with_parent\n"
        "def work():\n    end_with_parent()\n    print(multiprocessing.current_process().pid, flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    worker.start()\n    worker.join()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists() or "State:\tZ" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")


INTERRUPTED = {
    "in the work": "raise KeyboardInterrupt",
    "in a callback, where Python drops it": """
import gc
def callback(*_):
    gc.callbacks.clear()
    raise KeyboardInterrupt
gc.callbacks.append(callback)
gc.collect()
import time
time.sleep(60)
""",
}


@pytest.mark.parametrize("where", INTERRUPTED)
def test_ctrl_c_ends_a_process_at_once_in_one_line(where):
    start = "from favchat_jax.signals import end_at_interrupt\nend_at_interrupt('chat')\nprint('an answer')\n"
    ended = subprocess.run([sys.executable, "-c", start + INTERRUPTED[where]], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "an answer\n", "chat: interrupted\n")


@pytest.mark.parametrize("seconds", [0.15, 1.0, 2.5])
def test_a_command_can_be_interrupted_from_its_first_moments(seconds):
    process = start_module("favchat_jax.chat", "--checkpoint=missing", "--video=missing")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    # Before Python has found the package, Ctrl-C ends it Python's way; later than all imports, the refusal is printed.
    assert stdout == "" and process.returncode in (130, 2, -signal.SIGINT), stderr
    assert process.returncode != 130 or stderr.count("\n") == 1
