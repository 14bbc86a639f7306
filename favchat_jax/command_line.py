"""What every front door does around its work: flags, one-line errors, exit codes (0 done, 1 failed, 2 bad input)."""

import contextlib
import ctypes
import errno
import logging
import os
import sys
from collections.abc import Callable

from absl import flags
from absl import logging as absl_logging

from favchat_jax.errors import RunError, UserError

# Read when transformers is imported, which tells everyone that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def start(main: Callable[[], None], argv: list[str] | None = None) -> None:
    """Parses the command line, runs `main`, and ends the process with the fitting exit code.

    Only an error of the software itself ends with a traceback.
    """
    _keep_freed_memory()
    _set_up_logging()
    name = os.path.basename(os.path.dirname(sys.argv[0])) if argv is None else "favchat_jax"
    argv = sys.argv if argv is None else argv
    if "--help" in argv[1:]:
        print(f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    try:
        parse(argv)
        main()
    except UserError as error:
        _end(name, error, 2)
    except RunError as error:
        _end(name, error, 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            raise
        _end(name, f"{error.filename or 'a file'}: {error.strerror}; the run needs to read and write here", 2)
    except KeyboardInterrupt:
        _end(name, "interrupted", 130)
    sys.exit(0)


def _set_up_logging() -> None:
    """What the software says of itself goes to stderr, one line a message."""
    # `force`, since importing some libraries has set up logging their way.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("favchat_jax").setLevel(logging.INFO)
    # When a write fails, Orbax logs a traceback from each of its threads, asyncio one from each task, and some threads
    # are left without their event loop; the same error is raised besides, and told in one line.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _keep_freed_memory() -> None:
    """Tells glibc to keep the memory of freed arrays for the next ones instead of giving it back to the system.

    A step on a CPU frees and takes hundreds of MB; getting them anew page by page costs a third of its time.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # malloc.h
        mallopt(arena_max, 1)
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def parse(argv: list[str]) -> None:
    """Fills the flags; every mistake becomes a UserError of one line."""
    for argument in argv[1:]:
        option, _, value = argument.partition("=")
        path = value.partition(":")[0]  # arguments of the config follow a colon
        if option == "--config" and not os.path.isfile(path):
            raise UserError(f"--config={path}: there is no such file; configs/ holds those to choose from")
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise _user_error_behind(error) or UserError(f"{_first_line(error)} (see --help)") from None
    except UserError:
        raise
    except (AttributeError, KeyError) as error:  # an override of a field that the config does not have
        raise UserError(f"unknown config option: {_first_line(error)}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"config option of the wrong type: {_first_line(error)}") from None
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: not a config in Python ({error.msg})") from None
    except (OSError, ImportError) as error:
        raise UserError(f"the config cannot be read: {_first_line(error)}") from None
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}: options are written --name=value (see --help)")


def _user_error_behind(error: BaseException | None) -> UserError | None:
    """What a config itself said was wrong: the first of the errors that the library of flags wrapped into others."""
    found = None
    while error is not None:
        found = error if isinstance(error, UserError) else found
        error = error.__cause__ or error.__context__
    return found


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    while len(text) > 2 and text[0] == text[-1] and text[0] in "'\"":  # of a KeyError's message
        text = text[1:-1]
    return text.splitlines()[0]


def _end(name: str, message: object, code: int) -> None:
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(code)
