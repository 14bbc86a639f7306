"""The command `favchat COMMAND --option=value ...`, the same as `python -m favchat_jax.COMMAND --option=value ...`."""

import difflib
import os
import runpy
import sys

import favchat_jax

COMMANDS = {
    "train": "train a stage, or reinforce a trained model",
    "chat": "ask about a video",
    "evaluate": "run a benchmark",
}


def main() -> None:
    """Runs the module of the command as a program of its own, so its options are defined in one place."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(favchat_jax.__version__)
        sys.exit(0)
    if arguments[0] not in COMMANDS:
        meant = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {meant[0]}?" if meant else f"choose one of {', '.join(COMMANDS)}"
        print(f"favchat: unknown command {arguments[0]!r}: {hint}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    sys.path.insert(0, os.getcwd())  # as with `python -m`, so that a config may import others of the clone
    runpy.run_module(f"favchat_jax.{arguments[0]}", run_name="__main__", alter_sys=True)


def usage() -> str:
    """Lists the commands."""
    listed = "\n".join(f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items())
    hint = "favchat COMMAND --help lists the options of a command."
    return f"usage: favchat COMMAND --option=value ...\n\n{listed}\n\n{hint}"


if __name__ == "__main__":
    main()
