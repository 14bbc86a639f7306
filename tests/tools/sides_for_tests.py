"""Sides of a contest whose runs take no time."""

import os
import time


def counting(step: float):
    """Returns two runs whose seconds and results show how often they ran."""
    ran = {"first": 0, "second": 0}

    def run(name):
        def once():
            ran[name] += 1
            return step * ran[name], (name, ran[name], time.monotonic(), os.getpid())

        return once

    return {name: run(name) for name in ran}


def measuring(step: float):
    """Returns runs that report how much they did; the second lacks memory."""

    def full():
        return float("nan"), {"failed": "out of memory"}

    return {"first": lambda: (step, {"tokens": 10 * step}), "second": full}


def broken():
    """Fails during the build."""
    raise ValueError("no such weight")


def killed():
    """Ends without a message, as for lack of memory."""
    os._exit(9)
