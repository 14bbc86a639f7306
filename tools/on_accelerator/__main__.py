"""Runs one part in this process: python -m tools.on_accelerator PART PRESET SECONDS FOLDER FILE.

Or compiles a training step into JAX's cache: python -m tools.on_accelerator compile PRESET STAGE given|none FOLDER.
"""

import json
import sys
import time
from pathlib import Path

from favchat_jax import command_line
from favchat_jax.files import replace_file
from tools.on_accelerator import ours
from tools.on_accelerator.parts import PARTS


def main() -> None:
    """Runs the part that the command line names, and writes its rows to a file as they come; or compiles a step."""
    if arguments[0] == "compile":
        ours.compile_ahead(*arguments[1:])
        return
    part, preset, seconds, folder, file = arguments
    until = time.monotonic() + float(seconds)
    PARTS[part](preset, Path(folder), until, lambda rows: replace_file(Path(file), json.dumps(rows)))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    command_line.start(main, sys.argv[:1])
