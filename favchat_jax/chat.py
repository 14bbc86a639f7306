"""Asks a checkpoint about a video: python -m favchat_jax.chat --checkpoint=DIR --video=F [--question=Q]

With --question or --questions, only answers go to stdout. Without them, chat reads one question a line. In this
conversation, /reset forgets the earlier turns, /help lists the commands, and an empty line, quit or exit ends it.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from absl import flags

import favchat_jax
from favchat_jax import command_line
from favchat_jax.config import Storage
from favchat_jax.data import reasoning
from favchat_jax.data.faces.detectors import DETECTORS
from favchat_jax.data.faces.sheet import draw_sheet
from favchat_jax.data.faces.tracks import listing
from favchat_jax.data.video import decode
from favchat_jax.embedded.notice import unlike_training
from favchat_jax.errors import UserError
from favchat_jax.files import read_lines
from favchat_jax.generation.sampler import Sampling
from favchat_jax.programs import user_cache

HELP = "/reset forgets the earlier turns; an empty line, quit or exit ends the conversation"
EMPTY = "the answer is empty: ask in other words"
UNMARKED = f"the response has no <answer>; coldstart and grpo teach one for this question only: {reasoning.QUESTION}"


def converse(dialogue: favchat_jax.Dialogue) -> None:
    """Answers questions from stdin one after another, streamed to stdout."""
    while (question := _read("question> ")) not in ("", "quit", "exit", "/quit", "/exit"):
        if question.startswith("/"):
            if question == "/reset":
                dialogue.reset()
            _say("the conversation begins anew" if question == "/reset" else HELP)
            continue
        answer, before = "", len(dialogue.turns)
        try:
            for piece in dialogue.ask(question):
                print(piece, end="", flush=True)
                answer += piece
        except UserError as error:
            _say(error)
            continue
        print(flush=True)
        if not answer.strip():
            _say(EMPTY)
        if forgotten := before + bool(answer.strip()) - len(dialogue.turns):
            _say(f"the context is full: {forgotten} earlier {'turn is' if forgotten == 1 else 'turns are'} forgotten")


def answer_all(model: favchat_jax.Model, video: favchat_jax.EncodedClip, questions: list[str], **sampling: Any) -> None:
    """Prints the answer to each question, one a line, or as JSON with its question."""
    for question, answer in zip(questions, model.answer(video, questions, **sampling), strict=True):
        if not answer.strip():
            _say(EMPTY)
        elif _ANSWER_ONLY.value and not reasoning.ANSWER.search(answer):
            _say(UNMARKED)
        text = reasoning.answer_of(answer) if _ANSWER_ONLY.value else answer
        print(json.dumps({"question": question, "answer": text}, ensure_ascii=False) if _JSON.value else text)


def _read(prompt: str) -> str:
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _say(message: object) -> None:
    print(f"chat: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _waiting(message: str) -> Iterator[None]:
    """Shows a message on a terminal while something takes seconds."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{message} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _questions() -> list[str]:
    """Returns the questions of the flags; none stand for a conversation."""
    if _QUESTION.value is not None and _QUESTIONS.value:
        raise UserError("--question and --questions exclude each other: give one of them")
    if _QUESTION.value is not None and not _QUESTION.value.strip():
        raise UserError("--question is empty: ask something, or leave it out for a conversation")
    if _QUESTIONS.value:
        questions = [line.strip() for _, line in read_lines(_QUESTIONS.value)]
        if not questions:
            raise UserError(f"--questions={_QUESTIONS.value} holds no question: write one a line")
        return questions
    for option in (_ANSWER_ONLY, _JSON):
        if option.value and _QUESTION.value is None:
            raise UserError(f"--{option.name} changes how an answer is printed: give --question or --questions with it")
    return [] if _QUESTION.value is None else [_QUESTION.value]


def _read_clip(model: favchat_jax.Model, video: str) -> favchat_jax.EncodedClip:
    """Encodes a video, and says at which face the model looks."""
    cropped = _FACE_CROP.value or _FACE.value is not None or _FACE_SHEET.value is not None
    if not (model.config.data.face_crop if _FACE_CROP.value is None and not cropped else cropped):
        return model.encode(video, face_crop=False)
    face = _FACE.value or 1  # a number makes the search find all faces
    clip = model.encode(video, face=face)
    assert clip.tracks is not None, "asked for"
    if clip.tracks.tracks:
        _say(f"looking at face {face} of {listing(clip.tracks)}")
    if _FACE_SHEET.value:
        draw_sheet(Path(_FACE_SHEET.value), video, clip.tracks, face)
    return clip


def main() -> None:
    """Answers the questions of the flags, or starts a conversation."""
    if not _CHECKPOINT.value or not _VIDEO.value:
        raise UserError("needed: --checkpoint=WORKDIR --video=FILE, and --question=TEXT for a single answer")
    questions = _questions()
    sampling: dict[str, Any] = {
        "max_new_tokens": _MAX_NEW_TOKENS.value,
        "temperature": _TEMPERATURE.value,
        "top_p": _TOP_P.value,
        "top_k": _TOP_K.value,
        "repetition_penalty": _REPETITION_PENALTY.value,
        "stop": tuple(_STOP.value),
        "seed": _SEED.value,
    }
    Sampling(**sampling)  # refused before any work
    mesh = command_line.read_mesh(_MESH.value)
    for option in (_FACE, _FACE_SHEET):
        if option.value is not None and _FACE_CROP.value is False:
            raise UserError(f"--{option.name} and --face_crop=false exclude each other: give one of them")
    if _FACE_SHEET.value is not None:
        command_line.check_output("--face_sheet", _FACE_SHEET.value)
    # The video is opened first, because loading a checkpoint takes longer than refusing a bad file.
    decode(_VIDEO.value, frames=1, size=16)
    with _waiting(f"loading {_CHECKPOINT.value}"):
        storage = cast(Storage, _STORAGE.value)
        faces = {"detector": _DETECTOR.value, "detector_model": _DETECTOR_MODEL.value}
        model = favchat_jax.load(_CHECKPOINT.value, storage=storage, mesh=mesh, cache=user_cache(), **faces)
    if notice := unlike_training(model.config, _VIDEO.value):
        _say(notice)
    with _waiting("reading the video"):
        clip = _read_clip(model, _VIDEO.value)
    if questions:
        with _waiting("answering; the first answer compiles the model"):
            answer_all(model, clip, questions, **sampling)
        return
    converse(model.dialogue(clip, **sampling))


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _VIDEO = flags.DEFINE_string("video", None, "Video or picture")
    _QUESTION = flags.DEFINE_string("question", None, "Question; without it, a conversation")
    _QUESTIONS = flags.DEFINE_string("questions", None, "File with one question a line; prints one answer a line")
    _JSON = flags.DEFINE_bool("json", False, "Print each answer as a line of JSON with its question")
    _MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer, in tokens")
    _TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy")
    _TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest tokens whose probabilities add up to this")
    _TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among so many of the likeliest tokens; 0 for all")
    _REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1, words that were said come back less")
    _STOP = flags.DEFINE_multi_string("stop", [], "Text before which an answer ends; may be given several times")
    _FACE_CROP = flags.DEFINE_bool("face_crop", None, command_line.FACE_CROP)
    _FACE = flags.DEFINE_integer("face", None, command_line.FACE, 1)
    _FACE_SHEET = flags.DEFINE_string("face_sheet", None, "PNG file for the video's frames with boxes around its faces")
    _DETECTOR = flags.DEFINE_enum("detector", None, DETECTORS, "Finds the faces; by default the checkpoint's")
    _DETECTOR_MODEL = flags.DEFINE_string("detector_model", None, "The detector's ONNX file")
    _ANSWER_ONLY = flags.DEFINE_bool("answer_only", False, "Print the text in <answer>, without the thought")
    _SEED = flags.DEFINE_integer("seed", 0, "Of the draws at temperatures above 0")
    _STORAGE = flags.DEFINE_enum("storage", "full", command_line.STORAGES, command_line.STORAGE)
    _MESH = flags.DEFINE_string("mesh", None, command_line.MESH)
    command_line.start(main, less_memory=command_line.LESS_FOR_ANSWERS)
