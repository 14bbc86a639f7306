"""Comparing an export's answers with its run's."""

import time
from types import SimpleNamespace

import pytest
import torch
import transformers

from favchat_jax.errors import RunError
from tools import compare_export


def test_the_first_differing_answer_is_reported_with_the_answers_of_both(monkeypatch):
    row = {"clip": "heldout-0-00000", "question": "Is there a hat?", "expected": "yes", "answer": "yes"}
    monkeypatch.setattr(compare_export, "compare", lambda *_: [{**row, "exported": "no"}])
    for flag in ("_CHECKPOINT", "_EXPORT", "_LIMIT"):  # defined when the module runs as a command
        monkeypatch.setattr(compare_export, flag, SimpleNamespace(value="given"), raising=False)
    with pytest.raises(RunError, match="heldout-0-00000, 'Is there a hat\\?': JAX 'yes', PyTorch 'no'"):
        compare_export.main()


def test_the_exported_model_answers_side_by_side_in_order_and_shows_how_far_it_is(monkeypatch, capfd):
    threads = torch.get_num_threads()
    seen = []

    def answer(clip, question, max_new_tokens):
        seen.append(torch.get_num_threads())
        time.sleep(0.1 if question == "1" else 0)  # later questions are answered first
        return f"{clip.decode()} {question} {max_new_tokens}"

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: SimpleNamespace(answer=answer)
    )
    asked = [(b"clip", str(number)) for number in range(6)]
    try:
        torch.set_num_threads(6)
        answers = compare_export._answers("export", asked, 9)
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(threads)
    assert answers == [f"clip {number} 9" for number in range(6)]
    assert set(seen) == {1}
    assert "PyTorch: 100%" in capfd.readouterr().err
