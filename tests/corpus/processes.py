"""Starts the corpus commands as a person does."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def command(name, out, *arguments):
    """Starts `python -m tools.build_dataset NAME --out=OUT ...`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tools.build_dataset", name, f"--out={out}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Waits for a process; returns its exit code and its stderr."""
    errors = process.communicate()[1]
    return process.returncode, errors
