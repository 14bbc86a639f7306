"""Failures that a person can fix or must know of; front doors print them as one line, without a traceback."""

import ast
import contextlib

LONGEST = 200  # characters of another library's message that still make a readable line


class UserError(ValueError):
    """Bad usage or bad input, exit code 2. One line that names the file or option and what to do about it."""


class RunError(RuntimeError):
    """Work that went wrong while its input was right, exit code 1. One line that says where, and what is left."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, shortened; the error's class where it has no message."""
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
