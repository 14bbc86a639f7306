"""Asks a checkpoint about a video: python -m favchat_jax.chat --checkpoint=DIR --video=F [--question=Q]

With --question the answer alone goes to stdout. Without, a conversation: one question a line, an empty line ends it.
"""

import sys

from absl import flags

from favchat_jax import command_line
from favchat_jax.checkpoints.run import load_run
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError
from favchat_jax.generation.sampler import Sampler, Sampling, Turn
from favchat_jax.rl.rewards import answer_of


def ask(sampler: Sampler, video: str, question: str, sampling: Sampling) -> str:
    """The answer to one question about a video file."""
    frames = decode(video, frames=sampler.frames, size=sampler.image_size).frames
    return sampler.answer(sampler.encode(frames[None]), [[[(question, None)]]], sampling)[0][0]


def converse(sampler: Sampler, video: str, sampling: Sampling) -> None:
    """Questions from stdin, answers streamed to stdout as they are written, each with the turns before it."""
    features = sampler.encode(decode(video, frames=sampler.frames, size=sampler.image_size).frames[None])
    turns: list[Turn] = []
    while question := _read("question> "):
        answer = ""
        try:
            for piece in sampler.stream(features, [*turns, (question, None)], sampling):
                print(piece, end="", flush=True)
                answer += piece
        except UserError as error:  # the conversation has outgrown the context: what was said stays on the screen
            print(f"chat: {error}", file=sys.stderr)
            continue
        print()
        if answer.strip():  # a turn without an answer cannot be told again
            turns.append((question, answer))


def _read(prompt: str) -> str:
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def main() -> None:
    """Answers what the flags ask."""
    if not _CHECKPOINT.value or not _VIDEO.value:
        raise UserError("needed: --checkpoint=WORKDIR --video=FILE, and --question=TEXT for a single answer")
    if _QUESTION.value is not None and not _QUESTION.value.strip():
        raise UserError("--question is empty: ask something, or leave it out for a conversation")
    sampling = Sampling(_MAX_NEW_TOKENS.value, _TEMPERATURE.value, _TOP_P.value, _SEED.value)
    if _ANSWER_ONLY.value and _QUESTION.value is None:
        raise UserError("--answer_only leaves out the thought before a single answer: give --question=TEXT with it")
    # The video is opened first: a bad file should not cost the time of loading a checkpoint.
    decode(_VIDEO.value, frames=1, size=16)
    sampler = Sampler.of(load_run(_CHECKPOINT.value))
    if _QUESTION.value is None:
        converse(sampler, _VIDEO.value, sampling)
    else:
        answer = ask(sampler, _VIDEO.value, _QUESTION.value, sampling)
        print(answer_of(answer) if _ANSWER_ONLY.value else answer)


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _VIDEO = flags.DEFINE_string("video", None, "Video file")
    _QUESTION = flags.DEFINE_string("question", None, "Question; without it, a conversation")
    _MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer", lower_bound=1)
    _TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy", lower_bound=0.0)
    _TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus", lower_bound=0.0, upper_bound=1.0)
    _ANSWER_ONLY = flags.DEFINE_bool("answer_only", False, "Print what stands in <answer>, without the thought")
    _SEED = flags.DEFINE_integer("seed", 0, "Of the draws at temperatures above 0")
    command_line.start(main)
