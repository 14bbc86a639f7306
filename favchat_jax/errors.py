"""The failures that a person can mend or must know of: front doors print them as a single line, without a traceback."""


class UserError(ValueError):
    """Bad usage or bad input, exit code 2. One line that names the file or option and what to do about it."""


class RunError(RuntimeError):
    """Work that went wrong while its input was right, exit code 1. One line that says where, and what is left."""
