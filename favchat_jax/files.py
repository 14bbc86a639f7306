"""Writes files and folders completely or not at all, and reads those that people and their computers leave.

What is written is a draft beside its place first, and is then renamed: the draft of `runs/a.json` is
`runs/.a.json.draft-favchat`. A place has one draft name, so the next writer overwrites the draft of a killed run. A
lock on the draft keeps two writers of one place apart.
"""

import codecs
import contextlib
import errno
import fcntl
import functools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from favchat_jax.errors import RunError, UserError, one_line

log = logging.getLogger("favchat_jax")

HINTS = {
    errno.ENOENT: "its folder is missing or takes no files: name another place",
    errno.ENOTDIR: "a file is in the way: name another place",
    errno.EISDIR: "a folder is in the way: name another place",
    errno.EACCES: "check the permissions, or name another place",
    errno.EPERM: "check the permissions, or name another place",
    errno.EROFS: "the place is read-only: name another",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
}
FREE_SPACE = "free disk space, then run the same command again"

# Folders that a NAS, Windows, a file system or an archive of macOS adds to the user's own, in small letters.
SYSTEM_FOLDERS = {"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"}


def is_hidden(path: str | Path) -> bool:
    """Returns whether a file or folder is not part of the data: hidden, or added by a computer's system.

    macOS writes a file `._NAME` beside each NAME on a foreign disk; its content is no picture or video.
    """
    name = Path(path).name
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """Reads a text file's lines that are not blank, each with its number from 1; a byte-order mark is dropped.

    Unlike `str.splitlines`, U+2028 and other separators within a text do not end a line.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its place and permissions") from None
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number} is not UTF-8 text: save the file as UTF-8") from None
        if text.strip():
            texts.append((number, text))
    return texts


def replace_file(path: str | Path, content: bytes | str, sync: bool = True) -> None:
    """Writes a file completely or not at all; see `draft_file`.

    Half of a surrogate pair, from a file's name or a damaged text, is written as JSON's escape of it.
    """
    with draft_file(path, sync) as draft:
        draft.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def draft_file(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yields the path of a draft that replaces `path` at the end; a failure removes it and leaves `path` unchanged.

    Args:
        path: place of the file. A second writer waits for the first.
        sync: whether the content reaches the disk before the name does. Without it, a power cut can leave an empty
            file, which is acceptable if readers check the file and can make it again.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    draft = _hidden(path, "draft")
    with write_errors(path):
        lock = _lock(path, draft, folder=False)
        try:
            yield draft
            if sync:
                with draft.open("rb") as file:
                    os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(lock)


@contextlib.contextmanager
def replace_folder(path: str | Path, *also: type[Exception]) -> Iterator[Path]:
    """Yields an empty folder that replaces `path` at the end; a failure removes it and leaves `path` unchanged.

    Folders are not synced: their sources still exist, and their readers check them.

    Args:
        path: place of the folder; parent folders are made.
        also: errors, besides OSError, that a library raises when it cannot write.

    Raises:
        UserError: the folder cannot be written, or another process is writing it.
    """
    path = Path(path).absolute()
    draft, before = _hidden(path, "draft"), _hidden(path, "before")
    with write_errors(path, *also):
        lock = _lock(path, draft, folder=True)
        try:
            _settle(path, before)
            for left in draft.iterdir():  # from a killed run
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield draft
            if path.is_dir():  # renamed, because a kill during a slow removal would lose both
                path.rename(before)
            draft.rename(path)
        except BaseException:
            _remove(draft)
            raise
        finally:
            _settle(path, before)
            os.close(lock)


@contextlib.contextmanager
def write_errors(place: str | Path, *also: type[Exception]) -> Iterator[None]:
    """Turns a failed write of `place` into a UserError that says why and what to do.

    Args:
        place: the file or folder that is being written.
        also: errors, besides OSError, that a library raises when it cannot write.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        # Some libraries report a full disk only as text.
        full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
        if not (full or isinstance(error, (OSError, *also))):
            raise
        hint = HINTS.get(getattr(error, "errno", 0), FREE_SPACE)
        raise UserError(f"could not write {place} ({one_line(error)}): {hint}") from None


def _hidden(path: Path, role: str) -> Path:
    """Returns a hidden name beside `path`."""
    return path.with_name(f".{path.name}.{role}-favchat")


def _lock(path: Path, draft: Path, *, folder: bool) -> int:
    """Makes a missing draft and locks it until the returned descriptor is closed or the process ends.

    Raises:
        UserError: another process is writing the folder. The second writer of a file waits instead.
    """
    while True:
        if folder:
            draft.mkdir(parents=True, exist_ok=True)
        lock = os.open(draft, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                if not lock_file(lock, wait=not folder):
                    return lock
            except BlockingIOError:
                raise UserError(f"another process is writing {path}: wait for it, or name another") from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), draft.stat()):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # the previous writer has renamed or removed this draft: make another


def lock_file(file: int, *, wait: bool = True) -> bool:
    """Locks an open file or folder until it is closed or the process ends; returns whether it is locked.

    Some network file systems have no locks. There the writer goes on without one, after one warning per process.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        _warn_of_no_locks(error.strerror)
        return False
    return True


@functools.cache
def _warn_of_no_locks(reason: str) -> None:
    log.warning("files cannot be locked here (%s): let only one process write in a folder", reason)


def _settle(path: Path, before: Path) -> None:
    """Removes the folder that `path` has replaced, or restores it if nothing replaced it."""
    if before.exists():
        if path.exists():
            _remove(before)
        else:
            before.rename(path)


def _remove(folder: Path) -> None:
    """Removes a folder repeatedly, because Orbax's threads still write for a moment after a failed write."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)
        if not folder.exists():
            return
