"""Caches all paid answers in one SQLite file, by a hash of the request.

SQLite ensures that an answer is on disk before the next call starts, even if the process is killed.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from favchat_jax.errors import UserError

CALLS = "calls.sqlite"
TABLE = """CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY, step TEXT, text TEXT, problem TEXT, input_tokens INTEGER, output_tokens INTEGER, seconds REAL
)"""


@dataclass(frozen=True)
class Reply:
    """Holds the reply to one call: its text, or the problem that prevented one. The endpoint counts the tokens."""

    text: str
    problem: str
    input_tokens: int
    output_tokens: int
    seconds: float


@dataclass(frozen=True)
class Total:
    """Sums over the calls of one step."""

    calls: int
    input_tokens: int
    output_tokens: int
    seconds: float


class Calls:
    """Stores the replies of one corpus folder; threads may share it, processes may not.

    Raises:
      UserError: the file is in use or not a database of calls, or the disk is full.
    """

    def __init__(self, out: Path):
        self._path = out / CALLS
        self._lock = threading.Lock()
        with self._user_errors():
            self._file = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=1)
            # Two processes on one folder would pay for the same call each.
            for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
                self._file.execute(f"PRAGMA {pragma}")
            self._file.execute(TABLE)
            self._file.execute("BEGIN IMMEDIATE")
            self._file.execute("COMMIT")

    def find(self, key: str) -> Reply | None:
        """Returns the stored reply for a key, or None."""
        query = "SELECT text, problem, input_tokens, output_tokens, seconds FROM calls WHERE key = ?"
        with self._lock, self._user_errors():
            row = self._file.execute(query, (key,)).fetchone()
        return Reply(*row) if row else None

    def store(self, key: str, step: str, reply: Reply) -> None:
        """Stores a reply. It is on disk when this returns."""
        row = (key, step, reply.text, reply.problem, reply.input_tokens, reply.output_tokens, reply.seconds)
        with self._lock, self._user_errors():
            self._file.execute("INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def totals(self) -> dict[str, Total]:
        """Returns the sums over the calls of each step."""
        query = "SELECT step, count(*), sum(input_tokens), sum(output_tokens), sum(seconds) FROM calls GROUP BY step"
        with self._lock, self._user_errors():
            return {step: Total(*sums) for step, *sums in self._file.execute(query)}

    def close(self) -> None:
        """Closes the file, so that another process can use it."""
        self._file.close()

    @contextlib.contextmanager
    def _user_errors(self) -> Iterator[None]:
        """Turns SQLite's errors into a UserError with a hint."""
        try:
            yield
        except sqlite3.Error as error:
            hints = {
                "SQLITE_BUSY": "another annotate is using this folder; wait for it or stop it",
                "SQLITE_FULL": "the disk is full; free some space, then repeat the command to resume",
                "SQLITE_NOTADB": "not a database of calls; move it away, and every call is repeated",
                "SQLITE_CORRUPT": "the file is damaged; restore a copy, or move it away and pay for every call again",
            }
            hint = hints.get(error.sqlite_errorname, f"{error}; the run needs to read and write this file")
            raise UserError(f"{self._path}: {hint}") from None
