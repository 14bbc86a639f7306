"""Defines the errors that front doors print as one line, without a traceback."""

import ast
import contextlib
from collections.abc import Sequence

LONGEST = 200  # characters kept of another library's message

NAMED = 20  # names in a message before the rest is only counted


class UserError(ValueError):
    """Bad usage or bad input, exit code 2. Its line names the file or option and what to do about it."""


class RunError(RuntimeError):
    """Failed work with correct input, exit code 1. Its line says where it failed and what remains."""


def one_line(error: BaseException) -> str:
    """Returns the shortened first line of an error's message, or the error's class if it has no message."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, KeyError | AttributeError):
        for _ in range(2):  # Python quotes the message of a KeyError, and ml_collections quotes it once more
            with contextlib.suppress(ValueError, SyntaxError):
                text = str(ast.literal_eval(text))
    lines = text.strip().splitlines()
    line = " ".join(lines[0].split()) if lines else type(error).__name__
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def listed(names: Sequence[str]) -> str:
    """Returns the first `NAMED` names with commas, and the number of the others."""
    others = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {others} others" if others > 0 else "")
