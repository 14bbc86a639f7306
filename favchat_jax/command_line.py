"""Runs a front door: parses flags, prints errors in one line, sets the exit code (0 done, 1 failed, 2 bad input)."""

import contextlib
import ctypes
import dataclasses
import errno
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from favchat_jax.config import MeshConfig, Storage
from favchat_jax.errors import RunError, UserError, one_line
from favchat_jax.signals import end_at_interrupt

HELP = {f"{dashes}{name}" for name in ("help", "helpfull", "helpshort", "h") for dashes in ("-", "--")}

# Options of all commands that answer
STORAGES: tuple[Storage, ...] = get_args(Storage)
STORAGE = "Width of the language model's kernels in memory: full (the run's own), int8 or int4"
MESH = "Devices along each axis, as in data=2,tensor=4; by default all devices, in the best shape for the batch"
FACE_CROP = "The facial encoder reads the face, found and followed, or the whole frame; by default as in training"
FACE = "Which face it reads, from 1, the largest and longest; implies --face_crop"
LESS_MEMORY = "take fewer clips or questions at once, or see docs/how-to/small-cards.md for what saves memory"
LESS_FOR_ANSWERS = "narrow the kernels with --storage=int8, or share the weights over devices with --mesh=tensor=N"


def start(main: Callable[[], None], argv: list[str] | None = None, less_memory: str = LESS_MEMORY) -> None:
    """Parses the command line, runs `main`, and ends the process with the fitting exit code, 130 after Ctrl-C.

    Only an error of the software itself ends with a traceback.

    Args:
        main: does what the flags name.
        argv: the command line; by default this process's.
        less_memory: what to turn if the memory of a device or of the host is too small.
    """
    keep_freed_memory()
    _set_up_logging()
    argv = sys.argv if argv is None else argv
    name = Path(argv[0]).stem
    end_at_interrupt(name)
    if HELP & set(argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    try:
        parse(argv)
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        sys.exit(1)
    except UserError as error:
        _end(name, error, 2)
    except RunError as error:
        _end(name, error, 1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        hint = "make room, and run the same command again" if full else "the run needs to read and write here"
        _end(name, f"{error.filename or 'the disk'}: {error.strerror}; {hint}", 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA's words
            raise
        _end(name, f"out of memory ({one_line(error)}): {less_memory}", 1)
    sys.exit(0)


def _set_up_logging() -> None:
    """Sends this package's log messages to stderr, one line each."""
    # `force` replaces the logging that some libraries set up at import.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("favchat_jax").setLevel(logging.INFO)
    # After a failed write, Orbax logs a traceback for each thread and asyncio for each task, and some threads lose
    # their event loop. The same error is also raised and reported in one line.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed arrays for new ones instead of returning it to the system.

    A step on a CPU frees and allocates hundreds of MB; fetching them again page by page costs a third of its time.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never


def parse(argv: list[str]) -> None:
    """Parses the flags; every mistake becomes a UserError of one line."""
    argv = [_with_home(argument) for argument in argv]
    config = _config_named(argv)
    if config is not None:
        _check_config_file(config)
        _make_neighbours_importable(config)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        refusal = _refusal_of(error)
        raise UserError(f"--config={config}: {refusal}" if refusal else _flag_mistake(error)) from None
    except (AttributeError, KeyError) as error:  # an override of an unknown field
        if getattr(error, "name", None) == "get_config":
            raise UserError(f"--config={config} has no get_config(); configs/ holds those to choose from") from None
        raise UserError(_unknown_field(error, argv)) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"config option of the wrong type: {one_line(error)}") from None
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: not a config in Python ({error.msg})") from None
    except Exception as error:  # the config is a program and may fail in any way
        raise UserError(f"--config={config} cannot be read: {type(error).__name__}: {one_line(error)}") from None
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}: options are written --name=value (see --help)")


def _with_home(argument: str) -> str:
    """Replaces `~` in --NAME=~/PATH, which a shell leaves to the command."""
    option, equals, value = argument.partition("=")
    return option + equals + (os.path.expanduser(value) if value.startswith("~/") else value)


def read_mesh(text: str | None) -> dict[str, int] | None:
    """Reads the value of --mesh.

    Raises:
        UserError: it has another form.
    """
    if text is None:
        return None
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    found = [re.fullmatch(rf"({'|'.join(axes)})=(\d+)", part.strip()) for part in text.split(",")]
    sizes = {match[1]: int(match[2]) for match in found if match}
    if len(sizes) < len(found) or 0 in sizes.values():
        raise UserError(f"--mesh={text}: give numbers of devices along {', '.join(axes)}, as in --mesh=data=2,tensor=4")
    return sizes


def check_kind(holder: flags.FlagHolder, field: str, choices: str) -> None:
    """Raises UserError if the config of a flag lacks a field that every config of the right kind has."""
    if not hasattr(holder.value, "keys") or field not in holder.value:
        name = config_flags.get_config_filename(flags.FLAGS[holder.name])
        raise UserError(f"--config={name} has no {field}, so it is of another kind: choose one of {choices}")


def check_output(option: str, path: str) -> None:
    """Raises UserError if an option names a file that cannot be written, before the work begins."""
    parent = Path(path).absolute().parent
    if Path(path).is_dir() or not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"{option}={path} cannot be written: name a file in a folder that exists")


def _config_named(argv: list[str]) -> str | None:
    """Returns the file after --config, without the config's own arguments, which follow a colon."""
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-config"):
            return (value if equals else following).partition(":")[0]
    return None


def _check_config_file(path: str) -> None:
    if not os.path.isfile(path):
        raise UserError(f"--config={path}: there is no such file; configs/ holds those to choose from")
    if not path.endswith(".py"):
        raise UserError(f"--config={path} is not a config in Python; configs/ holds those to choose from")


def _make_neighbours_importable(config: str) -> None:
    """Puts the folder of a config's topmost package first in the import path, so that it can import other configs."""
    folder = Path(config).resolve().parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    if folder != Path(config).resolve().parent:
        sys.path.insert(0, str(folder))


def _refusal_of(error: BaseException | None) -> str | None:
    """Returns the message of a ValueError that a config file raised and the flags library wrapped, if there is one."""
    while error is not None:
        if str(error).startswith("Error whilst parsing config file") and type(error.__context__) is ValueError:
            return one_line(error.__context__)
        error = error.__cause__ or error.__context__
    return None


def _unknown_field(error: Exception, argv: list[str]) -> str:
    """Names the option that overrides a field which the config lacks, with the field that was perhaps meant."""
    field = one_line(error).strip("'\"")
    options = [argument.partition("=")[0] for argument in argv]
    option = next((option for option in options if field in option.lstrip("-").split(".")[1:]), field)
    meant = re.search(r'Did you mean "([^"]+)"', str(error))
    return f"unknown config option: {option}" + (f"; did you mean {meant[1]}?" if meant else " (see --print_config)")


# Parts of the flags library's messages, and what the value should have been.
EXPECTED = {
    "Non-boolean argument": "True or False",
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "as a ConfigDict": "a section: set one of its fields, as in --config.SECTION.FIELD=VALUE",
}


def _flag_mistake(error: flags.Error) -> str:
    lines = str(error).strip().splitlines()
    if "parsing config file" in lines[0]:  # a traceback follows
        return f"{lines[0]} {lines[-1]}; expected is a get_config() like those of the files in configs/"
    option, _, reason = lines[0].removeprefix("flag ").partition(": ")
    for part, expected in EXPECTED.items():
        if part in reason:
            return f"{option} is not {expected}"
    return f"{one_line(error)} (see --help)"


def _end(name: str, message: object, code: int) -> None:
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(code)
