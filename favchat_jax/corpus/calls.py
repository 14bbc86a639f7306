"""Every answer that was paid for, kept in one file and found again by what was asked.

SQLite, because an answer must be on the disk before the next is asked for, whatever ends the process in between.
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
    """What came back for one call: its text, or the reason why there is none. Tokens as the endpoint counted them."""

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
    """The replies of one corpus folder; threads may share it, processes may not.

    Raises:
      UserError: the file is in use, is not such a file, or the disk is full.
    """

    def __init__(self, out: Path):
        self._path = out / CALLS
        self._lock = threading.Lock()
        with self._told():
            self._file = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=1)
            # Two processes on one folder would pay for the same call each.
            for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
                self._file.execute(f"PRAGMA {pragma}")
            self._file.execute(TABLE)
            self._file.execute("BEGIN IMMEDIATE")
            self._file.execute("COMMIT")

    def find(self, key: str) -> Reply | None:
        """The reply to an earlier call of this key."""
        query = "SELECT text, problem, input_tokens, output_tokens, seconds FROM calls WHERE key = ?"
        with self._lock, self._told():
            row = self._file.execute(query, (key,)).fetchone()
        return Reply(*row) if row else None

    def store(self, key: str, step: str, reply: Reply) -> None:
        """Keeps a reply; on return it is on the disk."""
        row = (key, step, reply.text, reply.problem, reply.input_tokens, reply.output_tokens, reply.seconds)
        with self._lock, self._told():
            self._file.execute("INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def totals(self) -> dict[str, Total]:
        """Step -> what its calls add up to."""
        query = "SELECT step, count(*), sum(input_tokens), sum(output_tokens), sum(seconds) FROM calls GROUP BY step"
        with self._lock, self._told():
            return {step: Total(*sums) for step, *sums in self._file.execute(query)}

    def close(self) -> None:
        """Lets another process have the file."""
        self._file.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            mends = {
                "SQLITE_BUSY": "another annotate is at work on this folder; wait for it or stop it",
                "SQLITE_FULL": "the disk is full; make room, and the same command goes on",
                "SQLITE_NOTADB": "not a file of calls; move it away, and every call is made anew",
                "SQLITE_CORRUPT": "the file is damaged; put a copy in its place, or move it away to pay anew",
            }
            mend = mends.get(error.sqlite_errorname, f"{error}; the run needs to read and write here")
            raise UserError(f"{self._path}: {mend}") from None
