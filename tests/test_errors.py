"""What a library says when it fails becomes one readable line."""

import errno

import pytest

from favchat_jax.errors import LONGEST, one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("wrong shape"), "wrong shape"),
        (ValueError("\n  wrong \t shape \nTraceback: ..."), "wrong shape"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (KeyError("batchsize"), "batchsize"),
        (KeyError("no 'batchsize'\nDid you mean: batch"), "no 'batchsize'"),
        (KeyError(str(KeyError("no such field"))), "no such field"),
        (AttributeError(str(KeyError("no such field"))), "no such field"),
        (AttributeError("'x' object has no attribute 'y'"), "'x' object has no attribute 'y'"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.mp4"), "No such file or directory: a.mp4"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("a mistake"), "a mistake"),
    ],
)
def test_an_errors_first_line_is_kept_without_quotes_numbers_and_blanks(error, line):
    assert one_line(error) == line


def test_a_long_line_is_cut():
    line = one_line(ValueError("x" * 1000))
    assert len(line) == LONGEST and line.endswith("x...")
