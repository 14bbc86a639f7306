"""Files and folders appear complete, whatever ends their writer."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from favchat_jax import files
from favchat_jax.errors import RunError, UserError
from favchat_jax.files import draft_file, replace_file, replace_folder, write_errors
from tests.conftest import ROOT, fill


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, text: str) -> None:
    with replace_folder(path) as draft:
        (draft / "text").write_text(text)


def killed_while(tmp_path: Path, body: str) -> None:
    """Runs a script that writes below `tmp_path` and is killed where it prints."""
    script = f"from favchat_jax.files import *\nimport pathlib, time\nroot = pathlib.Path({str(tmp_path)!r})\n{body}"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()


WAIT = "print('now', flush=True); time.sleep(60)"


@pytest.mark.parametrize("content", ["é\n", "é\n".encode()], ids=["text", "bytes"])
@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_replaced_by_exactly_its_content_and_nothing_else_is_left(content, sync, tmp_path):
    for before in (False, True):
        replace_file(tmp_path / "file", content, sync)
        assert (tmp_path / "file").read_bytes() == "é\n".encode() and names(tmp_path) == ["file"], before


def test_a_file_gets_the_permissions_that_any_new_file_gets(tmp_path):
    (tmp_path / "usual").touch()
    replace_file(tmp_path / "file", "x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_synced_file_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda file: seen.append((tmp_path / "file").exists()))
    replace_file(tmp_path / "file", "x")
    replace_file(tmp_path / "other", "x", sync=False)
    assert seen == [False]


def test_a_writer_that_is_killed_leaves_the_file_that_was_there_and_the_next_writer_clears_up(tmp_path):
    replace_file(tmp_path / "file", "before")
    killed_while(tmp_path, f"with draft_file(root / 'file') as draft: draft.write_text('longer than after'); {WAIT}")
    assert (tmp_path / "file").read_text() == "before" and names(tmp_path) == [".file.draft-favchat", "file"]
    replace_file(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "after" and names(tmp_path) == ["file"]


def test_a_writer_of_a_folder_that_is_killed_leaves_the_folder_that_was_there_and_the_next_clears_up(tmp_path):
    write_folder(tmp_path / "out", "before")
    killed_while(
        tmp_path, f"with replace_folder(root / 'out') as draft: (draft / 'half' / 'x').mkdir(parents=True); {WAIT}"
    )
    assert (tmp_path / "out" / "text").read_text() == "before" and names(tmp_path) == [".out.draft-favchat", "out"]
    write_folder(tmp_path / "out", "after")
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["text"])


def test_a_folder_that_a_killed_writer_had_moved_aside_comes_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "before")
    # Between the two renames: nothing is in the folder's place.
    killed_while(
        tmp_path,
        "def late(self, path): rename(self, path); print('now', flush=True); time.sleep(60)\n"
        "rename, pathlib.Path.rename = pathlib.Path.rename, late\n"
        "with replace_folder(root / 'out') as draft: (draft / 'text').write_text('after')",
    )
    assert "out" not in names(tmp_path)
    with pytest.raises(KeyError), replace_folder(tmp_path / "out"):
        assert (tmp_path / "out" / "text").read_text() == "before"
        raise KeyError
    assert (tmp_path / "out" / "text").read_text() == "before" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UserError])
def test_a_failure_while_writing_leaves_what_was_there_and_passes_on(error, tmp_path):
    replace_file(tmp_path / "file", "before")
    write_folder(tmp_path / "out", "before")
    with pytest.raises(error), draft_file(tmp_path / "file") as draft:
        draft.write_text("half")
        raise error
    with pytest.raises(error), replace_folder(tmp_path / "out") as draft:
        (draft / "half").touch()
        raise error
    assert (tmp_path / "file").read_text() == (tmp_path / "out" / "text").read_text() == "before"
    assert names(tmp_path) == ["file", "out"] and names(tmp_path / "out") == ["text"]


def test_a_full_disk_leaves_what_was_there_and_is_one_line(small_disk):
    replace_file(small_disk / "file", "before")
    write_folder(small_disk / "out", "before")
    fill(small_disk)
    line = "could not write {} .No space left on device.*: free disk space, then run the same command again"
    with pytest.raises(UserError, match=line.format(small_disk / "file")):
        replace_file(small_disk / "file", "x" * 100_000)
    with pytest.raises(UserError, match=line.format(small_disk / "out")):
        write_folder(small_disk / "out", "x" * 100_000)
    assert (small_disk / "file").read_text() == (small_disk / "out" / "text").read_text() == "before"
    assert names(small_disk) == ["ballast", "file", "out"]


def test_a_place_without_permission_says_so_and_not_that_the_disk_is_full(tmp_path):
    if os.geteuid():
        tmp_path.chmod(0o500)
    else:
        os.seteuid(65534)  # nobody, since root may write everywhere
    try:
        with pytest.raises(
            UserError, match=f"could not write {tmp_path}/file .Permission denied.*check the permissions"
        ):
            replace_file(tmp_path / "file", "x")
        with pytest.raises(
            UserError, match=f"could not write {tmp_path}/out .Permission denied.*check the permissions"
        ):
            write_folder(tmp_path / "out", "x")
    finally:
        if os.getuid():
            tmp_path.chmod(0o700)
        else:
            os.seteuid(0)


def test_a_place_that_takes_no_file_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    places = {
        tmp_path / "file" / "out": "a file is in the way: name another place",
        Path("/proc/x"): "its folder is missing or takes no files: name another place",
        tmp_path / ("x" * 300): "the name is too long: give a shorter one",
    }
    for place, hint in places.items():
        for write in (replace_file, write_folder):
            with pytest.raises(UserError, match=f"could not write {place} .*: {hint}"):
                write(place, "x")
    with pytest.raises(UserError, match="missing/out .*: its folder is missing"):
        replace_file(tmp_path / "missing" / "out", "x")
    with pytest.raises(UserError, match="folder .*: a folder is in the way"):
        replace_file(tmp_path / "folder", "x")
    with pytest.raises(UserError, match="file .*: a file is in the way"):
        write_folder(tmp_path / "file", "x")
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").is_file()


def test_only_the_errors_of_writing_are_turned_into_a_line(tmp_path):
    with pytest.raises(RunError, match="^the loss is nan$"), write_errors("x", RuntimeError):
        raise RunError("the loss is nan")
    with pytest.raises(RuntimeError, match="^a mistake$"), write_errors("x", ValueError):
        raise RuntimeError("a mistake")
    with (
        pytest.raises(UserError, match="could not write x .no bucket.: free disk space"),
        write_errors("x", ValueError),
    ):
        raise ValueError("no bucket\nand a long trace")
    with pytest.raises(UserError, match="could not write x .close.. failed: No space.*: free disk"), write_errors("x"):
        raise RuntimeError("close() failed: No space left on device; at byte 8192")
    with pytest.raises(UserError, match=r"could not write x .Read-only.*: the place is read-only"), write_errors("x"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "x")


def test_writers_of_one_file_take_turns_so_that_it_is_always_one_of_theirs(tmp_path):
    texts = [character * 50_000 for character in "abcdef"]
    seen, errors = set(), []

    def write(text: str) -> None:
        try:
            for _ in range(20):
                replace_file(tmp_path / "file", text, sync=False)
        except BaseException as error:
            errors.append(error)

    replace_file(tmp_path / "file", texts[0])
    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add((tmp_path / "file").read_text())
    assert errors == [] and seen <= set(texts) and names(tmp_path) == ["file"]


def test_a_second_process_waits_for_the_first_with_a_file_and_is_refused_with_a_folder(tmp_path):
    script = f"from favchat_jax.files import *\nreplace_file({str(tmp_path / 'file')!r}, 'second')"
    with draft_file(tmp_path / "file") as draft:
        second = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
        time.sleep(0.5)
        assert second.poll() is None
        draft.write_text("first")
    assert second.wait(timeout=60) == 0 and (tmp_path / "file").read_text() == "second"
    with replace_folder(tmp_path / "out") as draft:
        (draft / "text").write_text("first")
        with pytest.raises(UserError, match=f"another process is writing {tmp_path}/out"):
            write_folder(tmp_path / "out", "second")
    assert (tmp_path / "out" / "text").read_text() == "first" and names(tmp_path) == ["file", "out"]


def test_writing_works_where_a_file_system_has_no_locks_and_says_so_once(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    files._warn_of_no_locks.cache_clear()
    replace_file(tmp_path / "file", "x")
    write_folder(tmp_path / "out", "x")
    assert names(tmp_path) == ["file", "out"]
    assert [record.message for record in caplog.records] == [
        "files cannot be locked here (No locks available): let only one process write in a folder"
    ]


def test_a_folder_is_cleared_away_although_a_thread_still_writes_into_it_after_the_failure(tmp_path):
    def late(draft: Path) -> None:
        time.sleep(0.01)
        (draft / "late").mkdir(parents=True, exist_ok=True)

    with pytest.raises(ValueError), replace_folder(tmp_path / "out") as draft:  # as Orbax's threads do
        threading.Thread(target=late, args=(draft,)).start()
        raise ValueError
    assert names(tmp_path) == []


def test_hidden_files_and_folders_of_a_system_are_not_data():
    for name in ("._0.1.jpg", ".DS_Store", ".Trash-1000", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "#recycle"):
        assert files.is_hidden(Path("faces") / name) and files.is_hidden(name), name
    for name in ("0.1.jpg", "_0.jpg", "@person", "clip.mp4", "eadir"):
        assert not files.is_hidden(Path(".cache") / name), name


def test_only_a_line_feed_ends_a_line_and_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf" + "one\u2028still one\x0b\x0c\x1c\x85\r\n\r\n \ntwo".encode())
    assert files.read_lines(path) == [(1, "one\u2028still one\x0b\x0c\x1c\x85"), (4, "two")]
    path.write_bytes(b"")
    assert files.read_lines(path) == []


def test_a_text_that_cannot_be_read_is_one_line(tmp_path):
    path = tmp_path / "text"
    for content, line in ((b"good\ncaf\xe9\n", 2), ("good\n".encode("utf-16"), 1)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}, line {line} is not UTF-8 text: save the file as UTF-8"):
            files.read_lines(path)
    with pytest.raises(UserError, match=f"{tmp_path}/none cannot be read .No such file"):
        files.read_lines(tmp_path / "none")
