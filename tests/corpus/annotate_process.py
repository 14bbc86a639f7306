"""Annotates in a separate process that a test can kill. It imports little, since ten of them are started."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from favchat_jax.corpus.annotate import annotate
from favchat_jax.corpus.endpoint import Limits


def run(environment: Mapping[str, str], out: Path, limits: Limits) -> None:
    """Annotates with the environment of the test, and with Ctrl-C as in the foreground.

    The process that this one was forked from may have another environment, and may ignore Ctrl-C.
    """
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    annotate(out, "openai", limits, 3, False)
