"""The corpus commands as a person starts them."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def command(name, out, *arguments):
    """`python -m tools.build_dataset NAME --out=OUT ...`, started."""
    return subprocess.Popen(
        [sys.executable, "-m", "tools.build_dataset", name, f"--out={out}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Its exit code and what it said on stderr."""
    errors = process.communicate()[1]
    return process.returncode, errors
