"""Comparing an export's answers with its run's."""

from types import SimpleNamespace

import pytest

from favchat_jax.errors import RunError
from tools import compare_export


def test_the_first_differing_answer_is_reported_with_the_answers_of_both(monkeypatch):
    row = {"clip": "heldout-0-00000", "question": "Is there a hat?", "expected": "yes", "answer": "yes"}
    monkeypatch.setattr(compare_export, "compare", lambda *_: [{**row, "exported": "no"}])
    for flag in ("_CHECKPOINT", "_EXPORT", "_CLIPS"):  # defined when the module runs as a command
        monkeypatch.setattr(compare_export, flag, SimpleNamespace(value="given"), raising=False)
    with pytest.raises(RunError, match="heldout-0-00000, 'Is there a hat\\?': JAX 'yes', PyTorch 'no'"):
        compare_export.main()
