"""A conversation at the terminal: what it remembers, forgets and says."""

import io
import sys
from collections.abc import Callable

import pytest

import favchat_jax
from favchat_jax import chat
from favchat_jax.data.sources import open_dataset
from tests.conftest import DATA

BROWN = "brown hair and grey eyes"


@pytest.fixture(scope="module")
def model(trained) -> favchat_jax.Model:
    return favchat_jax.load(trained.folder / "stage3")


@pytest.fixture
def scripted(model, small_world, monkeypatch) -> Callable[[str], tuple[favchat_jax.Dialogue, list[list[str]]]]:
    """Makes a dialogue whose questions pass the real model's context check and are all answered with one text."""

    def make(said: str) -> tuple[favchat_jax.Dialogue, list[list[str]]]:
        seen: list[list[str]] = []

        def stream(features, turns, sampling):
            seen.append([question for question, _ in turns])
            yield said

        monkeypatch.setattr(model.sampler, "stream", stream)
        return model.dialogue(open_dataset(DATA, small_world.packed, "heldout")[0].clip), seen

    return make


def converse(dialogue: favchat_jax.Dialogue, *lines: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        chat.converse(dialogue)


def test_a_conversation_of_twenty_turns_forgets_the_oldest_and_says_so(scripted, capsys):
    dialogue, seen = scripted(BROWN)
    questions = [f"And what about detail {number}?" for number in range(20)]
    converse(dialogue, *questions)
    assert [turns[-1] for turns in seen] == questions
    assert len(seen[1]) == 2, "the first turn is remembered"
    assert 2 < len(seen[-1]) < 20 and seen[-1] == questions[-len(seen[-1]) :]
    stdout, stderr = capsys.readouterr()
    assert stdout == f"{BROWN}\n" * 20
    assert stderr.startswith("chat: the context is full: 1 earlier turn is forgotten\n")


def test_a_question_that_is_longer_than_the_context_alone_is_refused_and_nothing_is_forgotten(scripted, capsys):
    dialogue, seen = scripted(BROWN)
    converse(dialogue, "Which hair?", "why " * 400, "And now?")
    assert seen == [["Which hair?"], ["Which hair?", "And now?"]]
    assert "over the limit of 160; shorten the text" in capsys.readouterr().err


def test_reset_forgets_all_turns_and_quit_ends(scripted, capsys):
    dialogue, seen = scripted(BROWN)
    converse(dialogue, "Which hair?", "/reset", "And now?", "/unknown", "quit", "never read")
    assert seen == [["Which hair?"], ["And now?"]]
    assert capsys.readouterr().err == f"chat: the conversation begins anew\nchat: {chat.HELP}\n"


def test_an_empty_answer_is_said_to_be_one_and_is_no_turn(scripted, capsys):
    dialogue, seen = scripted("")
    converse(dialogue, "why?", "and now?", "")
    assert seen == [["why?"], ["and now?"]]
    assert capsys.readouterr().err == "chat: the answer is empty: ask in other words\n" * 2
