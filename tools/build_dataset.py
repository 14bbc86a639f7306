"""The training corpus from raw videos: python -m tools.build_dataset COMMAND --out=DIR

    scan       --source=DIR: every video, what it is, and why it cannot be used where it cannot
    clip       keeps what shows a face for long enough, trimmed to its best stretch
    annotate   a summary and question-answer pairs for every kept clip
    review     a local web page on which people judge them
    pack       the data set that training reads, its statistics and its datasheet

Every command goes on where a killed one stopped. docs/how-to/corpus.md leads through all of them.
"""

import importlib
import sys
from pathlib import Path

from absl import flags

from favchat_jax import command_line
from favchat_jax.errors import UserError

COMMANDS = ("scan", "clip", "annotate", "review", "pack")


def main() -> None:
    """Runs the command that was named."""
    if command is None:
        raise UserError(f"needed: one of {', '.join(COMMANDS)}, then --out=DIR")
    if not _OUT.value:
        raise UserError("needed: --out=DIR, the corpus folder")
    out = Path(_OUT.value).expanduser()
    if named != "scan" and not out.is_dir():
        raise UserError(f"--out={out} is no folder: name the one that scan has made")
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
        flags.adopt_module_key_flags(command)  # so that --help tells of them
    command_line.start(main, [sys.argv[0], *sys.argv[2 if named else 1 :]])
