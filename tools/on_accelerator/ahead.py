"""Compiles a training step into JAX's cache: python -m tools.on_accelerator.ahead PRESET STAGE SETTING FOLDER.

SETTING is given, for the rematerialisation that the config has, or none.
"""

import sys
from pathlib import Path

from favchat_jax import command_line
from tools.on_accelerator import drawn, ours


def main() -> None:
    """Compiles the step that the command line names."""
    preset, stage, setting, folder = arguments
    config = drawn.settings(preset, stage, Path(folder))
    ours.compiled_step(config, config.model.remat if setting == "given" else "")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    command_line.start(main, sys.argv[:1])
