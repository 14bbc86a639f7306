"""Thousands of mutated files are read or refused in one line: none crashes, hangs or ends in a traceback."""

import queue
import threading

import pytest

from tests.conftest import start_module

LONGEST = 30  # seconds for one file


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("kind", "files"), [("videos", 1800), ("pictures", 800), ("annotations", 400), ("benchmarks", 600)]
)
def test_mutated_files_are_read_or_refused(kind, files):
    process = start_module("tests.data.fuzz", kind, "0", str(files))
    numbers: queue.Queue[str | None] = queue.Queue()

    def follow() -> None:
        for line in process.stdout:
            numbers.put(line)
        numbers.put(None)

    errors: list[str] = []
    readers = [threading.Thread(target=follow), threading.Thread(target=lambda: errors.extend(process.stderr))]
    for reader in readers:
        reader.start()
    last, wait = "none", 300.0  # the first number comes after the imports
    while True:
        try:
            line = numbers.get(timeout=wait)
        except queue.Empty:
            process.kill()
            pytest.fail(f"{kind}: file {last} is read for over {LONGEST} s")
        if line is None:
            break
        last, wait = line.strip(), LONGEST
    code = process.wait()
    readers[1].join()
    assert (code, last) == (0, str(files - 1)), f"file {last}:\n{''.join(errors[-15:])}"
