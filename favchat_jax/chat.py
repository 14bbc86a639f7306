"""Asks a checkpoint about a video: python -m favchat_jax.chat --checkpoint=DIR --video=F [--question=Q]

With --question, only the answer goes to stdout. Without it, chat reads one question a line; an empty line ends it.
"""

import sys
from typing import Any

from absl import flags

import favchat_jax
from favchat_jax import command_line
from favchat_jax.data.reasoning import answer_of
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError


def converse(model: favchat_jax.Model, video: str, **sampling: Any) -> None:
    """Answers questions from stdin one after another, each with the turns before it, streamed to stdout."""
    clip = model.encode(video)
    history: list[tuple[str, str]] = []
    while question := _read("question> "):
        answer = ""
        try:
            for piece in model.stream(clip, question, history=history, **sampling):
                print(piece, end="", flush=True)
                answer += piece
        except UserError as error:  # the conversation is longer than the context
            print(f"chat: {error}", file=sys.stderr)
            continue
        print()
        if answer.strip():  # a conversation cannot contain an empty answer
            history.append((question, answer))


def _read(prompt: str) -> str:
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def main() -> None:
    """Answers the question of the flags, or starts a conversation."""
    if not _CHECKPOINT.value or not _VIDEO.value:
        raise UserError("needed: --checkpoint=WORKDIR --video=FILE, and --question=TEXT for a single answer")
    if _QUESTION.value is not None and not _QUESTION.value.strip():
        raise UserError("--question is empty: ask something, or leave it out for a conversation")
    if _ANSWER_ONLY.value and _QUESTION.value is None:
        raise UserError("--answer_only drops the thought before a single answer: give --question=TEXT with it")
    sampling: dict[str, Any] = {
        "max_new_tokens": _MAX_NEW_TOKENS.value,
        "temperature": _TEMPERATURE.value,
        "top_p": _TOP_P.value,
        "seed": _SEED.value,
    }
    # The video is opened first, because loading a checkpoint takes longer than refusing a bad file.
    decode(_VIDEO.value, frames=1, size=16)
    model = favchat_jax.load(_CHECKPOINT.value)
    if _QUESTION.value is None:
        converse(model, _VIDEO.value, **sampling)
    else:
        answer = model.answer(_VIDEO.value, _QUESTION.value, **sampling)
        print(answer_of(answer) if _ANSWER_ONLY.value else answer)


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _VIDEO = flags.DEFINE_string("video", None, "Video file")
    _QUESTION = flags.DEFINE_string("question", None, "Question; without it, a conversation")
    _MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer, in tokens", lower_bound=1)
    _TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy", lower_bound=0.0)
    _TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus", lower_bound=0.0, upper_bound=1.0)
    _ANSWER_ONLY = flags.DEFINE_bool("answer_only", False, "Print the text in <answer>, without the thought")
    _SEED = flags.DEFINE_integer("seed", 0, "Of the draws at temperatures above 0")
    command_line.start(main)
