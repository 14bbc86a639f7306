"""Builds the training corpus from raw videos: python -m tools.build_dataset COMMAND --out=DIR

    scan       lists every video of --source=DIR, its properties, and the reason if it is unusable
    clip       keeps videos that show a face for long enough, trimmed to their best stretch
    annotate   writes a summary and question-answer pairs for every kept clip
    review     serves a local web page on which people judge them
    pack       writes the data set that training reads, its statistics and its datasheet

Every command resumes after a kill. docs/how-to/corpus.md explains all of them.
"""

import importlib
import sys
from pathlib import Path

from absl import flags

from favchat_jax import command_line
from favchat_jax.errors import UserError

COMMANDS = ("scan", "clip", "annotate", "review", "pack")


def main() -> None:
    """Runs the command that the command line names."""
    if command is None:
        raise UserError(f"needed: one of {', '.join(COMMANDS)}, then --out=DIR")
    if not _OUT.value:
        raise UserError("needed: --out=DIR, the corpus folder")
    out = Path(_OUT.value).expanduser()
    if named != "scan" and not out.is_dir():
        raise UserError(f"--out={out} is not a folder: name the one that scan made")
    command.run(out)


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "Corpus folder")
    named = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in COMMANDS else None
    command = None
    try:
        command = importlib.import_module(f"favchat_jax.corpus.{named}") if named else None
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("favchat_jax"):
            raise
        sys.exit(f"build_dataset: {error.name} is not installed: pip install -e '.[corpus]'")
    if command is not None:
        command.define_flags()
        flags.adopt_module_key_flags(command)  # so that --help lists them
    command_line.start(main, [sys.argv[0], *sys.argv[2 if named else 1 :]])
