"""Annotating in a process of its own, which a test may kill. Imports little, since ten of them are started."""

import os
from collections.abc import Mapping
from pathlib import Path

from favchat_jax.corpus.annotate import annotate
from favchat_jax.corpus.endpoint import Limits


def run(environment: Mapping[str, str], out: Path, limits: Limits) -> None:
    """Annotates with the environment of the test, and not of the process that this one was forked from."""
    os.environ.update(environment)
    annotate(out, "openai", limits, 3, False)
