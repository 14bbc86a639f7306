"""Sides of a contest that take no time."""

import os
import time


def counting(step: float):
    """Two runs whose seconds and results tell how often they ran."""
    ran = {"first": 0, "second": 0}

    def run(name):
        def once():
            ran[name] += 1
            return step * ran[name], (name, ran[name], time.monotonic(), os.getpid())

        return once

    return {name: run(name) for name in ran}


def broken():
    """Fails while it builds."""
    raise ValueError("no such weight")


def killed():
    """Ends without a word, as for want of memory."""
    os._exit(9)
