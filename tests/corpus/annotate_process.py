"""Annotates in a separate process that a test can kill. It imports little, since ten of them are started."""

import os
from collections.abc import Mapping
from pathlib import Path

from favchat_jax.corpus.annotate import annotate
from favchat_jax.corpus.endpoint import Limits


def run(environment: Mapping[str, str], out: Path, limits: Limits) -> None:
    """Annotates with the environment of the test, not of the process that this one was forked from."""
    os.environ.update(environment)
    annotate(out, "openai", limits, 3, False)
