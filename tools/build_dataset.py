"""The training corpus from raw videos: python -m tools.build_dataset COMMAND --out=DIR

    annotate   a summary and question-answer pairs for every kept clip
    review     a local web page on which people judge them
"""

import importlib
import sys
from pathlib import Path

from absl import flags

from favchat_jax import command_line
from favchat_jax.errors import UserError

COMMANDS = ("annotate", "review")


def main() -> None:
    """Runs the command that was named."""
    out = Path(_OUT.value or "")
    if command is None:
        raise UserError(f"needed: one of {', '.join(COMMANDS)}, then --out=DIR")
    if not _OUT.value or not out.is_dir():
        raise UserError("needed: --out=DIR, the corpus folder that clip has filled")
    command.run(out)


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "Corpus folder")
    named = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in COMMANDS else None
    command = importlib.import_module(f"favchat_jax.corpus.{named}") if named else None
    if command is not None:
        command.define_flags()
    command_line.start(main, [sys.argv[0], *sys.argv[2 if named else 1 :]])
