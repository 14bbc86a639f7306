"""The commands as a person runs them: most in this process under the name `__main__`, some as their own."""

import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from absl import flags

import favchat_jax
from favchat_jax import command_line
from favchat_jax.data import reasoning
from favchat_jax.data.sources import open_dataset
from favchat_jax.errors import RunError
from tests.conftest import DATA, ROOT, damage, start_module
from tests.data.face_videos import beside, rendered
from tests.data.face_videos import video as encoded
from tests.data.video_files import audio_only, encode_video


@dataclass
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    def is_refusal(self, pattern: str) -> bool:
        """Whether it was one line on stderr that says this, nothing on stdout, and exit code 2."""
        one_line = re.match(r"(train|evaluate|chat): ", self.stderr) and self.stderr.count("\n") == 1
        found = re.search(pattern, self.stderr)
        return self.code == 2 and self.stdout == "" and one_line and found is not None


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `python -m favchat_jax.NAME ARGUMENTS` within this process, which costs no start."""
    monkeypatch.setattr(command_line, "_set_up_logging", lambda: None)
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(command_line, "end_at_interrupt", lambda name: None)
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: object) -> Ended:
        before = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_module(f"favchat_jax.{name}", run_name="__main__", alter_sys=True)
        finally:
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
        return Ended(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def video(small_world, tmp_path_factory) -> Path:
    """A held-out clip as a file."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    path.write_bytes(open_dataset(DATA, small_world.packed, "heldout")[0].clip)
    return path


@pytest.fixture(scope="session")
def checkpoint(trained) -> Path:
    """The workdir of a finished stage 3."""
    return trained.folder / "stage3"


# train


MISTAKES = {
    "--config is missing: for example --config=configs/stage3.py": [],
    "unknown config option: --config.batchsize": ["--config=configs/stage3.py", "--config.batchsize=3"],
    "--config.batch=many": ["--config=configs/stage3.py", "--config.batch=many"],
    "'batch'": ["--config=configs/stage3.py", "--batch=3"],
    "unexpected argument 'stage2'": ["--config=configs/stage3.py", "stage2"],
    "--config=configs/stage4.py: there is no such file": ["--config=configs/stage4.py"],
    "preset=huge is unknown: choose one of tiny": ["--config=configs/stage3.py:preset=huge"],
    "variant=v9 is unknown: choose one of v1": ["--config=configs/stage3.py:variant=v9"],
    "ablation=no_hair is unknown: choose one of none": ["--config=configs/stage3.py:ablation=no_hair"],
    "'hair=no' is unknown": ["--config=configs/stage3.py:hair=no"],
    "batch=0 is too small": ["--config=configs/stage3.py", "--config.batch=0"],
    "llm.path is not set: .* --config.llm.path=DIR": ["--config=configs/stage1.py:preset=paper"],
    "data.root is not set": ["--config=configs/stage1.py:preset=paper", "--config.llm.path=x"],
    "init.umt is not set: .*tools.convert_weights --kind=umt": [
        "--config=configs/stage1.py:preset=paper",
        "--config.llm.path=x",
        "--config.data.root=y",
    ],
    "init.qformer is not set, but v2 freezes its Q-Formers in stage 1: .*--kind=qformer": [
        "--config=configs/stage1.py:preset=paper,variant=v2",
        *("--config.llm.path=x", "--config.data.root=y", "--config.init.umt=z", "--config.init.facexformer=z"),
    ],
    "init.from_run=runs/base-v1/stage1 holds no finished stage1: .*configs/stage1.py:preset=base": [
        *("--config=configs/stage2.py:preset=base", "--config.llm.path=x", "--config.data.root=y"),
    ],
}


@pytest.mark.parametrize(("says", "arguments"), MISTAKES.items())
def test_train_refuses_a_mistake_before_any_work(arguments, says, command, tmp_path):
    ended = command("train", *arguments, f"--workdir={tmp_path / 'run'}")
    assert ended.is_refusal(says), ended
    assert not (tmp_path / "run").exists()


UNUSABLE = {
    "nowhere/config.json is missing: name a complete folder": {"llm__path": "nowhere"},
    "nowhere is not a weights folder": {"init__umt": "nowhere"},
    "data set 'faces' is unknown: choose one of rendered_faces, celebvhq": {"data__name": "faces"},
    "root|folder": {"data__name": "celebvhq"},
    "nowhere": {"data__name": "celebvhq", "data__root": "nowhere"},
    "data.sampling=first is unknown: choose one of rand, middle": {"data__sampling": "first"},
    "over the limit of 40": {"data__buckets": (40,)},
    "batch=4 does not divide": {"accumulate": 3},
    "tokenizer folder nowhere does not exist": {"prompt_tokenizer": "nowhere"},
}


@pytest.mark.parametrize(("says", "changes"), UNUSABLE.items())
def test_train_refuses_what_it_cannot_start_from(changes, says, command, small_world, tmp_path):
    ended = command("train", *small_world.flags("stage1", **changes), f"--workdir={tmp_path}")
    last = ended.stderr.splitlines(keepends=True)[-1]  # a progress bar may stand before it
    assert Ended(ended.code, ended.stdout, last).is_refusal(says) and "Traceback" not in ended.stderr, ended


def test_train_refuses_a_stage_before_that_is_missing_or_of_another_kind(command, small_world, trained, tmp_path):
    def start(stage, before, argument=""):
        return command(
            "train", *small_world.flags(stage, argument, init__from_run=before), f"--workdir={tmp_path / 'run'}"
        )

    assert start("stage2", tmp_path / "none").is_refusal(f"init.from_run={tmp_path}/none holds no finished stage1")
    assert start("stage3", trained.folder / "stage1").is_refusal("is stage1, but stage3 starts from stage2")
    other = start("stage2", trained.folder / "stage1", "ablation=no_moe")
    assert other.is_refusal("init.from_run=.* is of ablation=none, this run of ablation=no_moe")


def test_train_refuses_a_workdir_of_another_config_or_that_is_a_file(command, small_world, trained, video):
    stage1 = trained.folder / "stage1"
    ended = command("train", *small_world.flags("stage1", seed=5), f"--workdir={stage1}")
    assert ended.is_refusal("was made with another config; these fields differ: seed .0 there, 5 here.")
    ended = command("train", *small_world.flags("stage1"), f"--workdir={video}")
    assert ended.is_refusal(f"workdir {video} cannot be written")


def test_a_workdir_of_another_config_is_refused_before_anything_is_made_for_it(
    command, small_world, trained, monkeypatch
):
    monkeypatch.setattr("favchat_jax.train.prepare", lambda config: pytest.fail("made"))
    ended = command("train", *small_world.flags("stage1", seed=5), f"--workdir={trained.folder / 'stage1'}")
    assert ended.is_refusal("these fields differ: seed")


def test_train_on_a_finished_stage_exits_with_0(command, small_world, trained, caplog):
    caplog.set_level(logging.INFO, "favchat_jax")
    ended = command("train", *small_world.flags("stage1"), f"--workdir={trained.folder / 'stage1'}")
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", "")
    assert "is already finished at step 20" in caplog.text


def test_train_refuses_a_workdir_whose_checkpoints_are_all_damaged(command, small_world, trained, tmp_path):
    copy = trained.copy("stage1", tmp_path)
    for step in ("18", "20"):
        damage(copy / "checkpoints" / step / "weights")
    ended = command("train", *small_world.flags("stage1"), f"--workdir={copy}")
    assert ended.is_refusal(f"every checkpoint in {copy}/checkpoints is damaged: delete the workdir and train again")


def test_settings_of_the_last_stage_are_refused_before_anything_is_made_for_it(command, monkeypatch):
    monkeypatch.setattr("favchat_jax.embedded.prepare.make_missing_parts", lambda config: pytest.fail("made"))
    assert command("train", "--config=configs/grpo.py", "--config.rl.group=1").is_refusal("rl.group=1 is too small")
    path = "--config.rl.rewards.facial.path=nowhere:facial"
    assert command("train", "--config=configs/grpo.py", path).is_refusal("reward 'nowhere:facial' cannot be imported")


def test_train_ends_with_1_where_the_loss_is_not_a_number(command, small_world, tmp_path, monkeypatch):
    def diverge(*_):
        raise RunError("the loss of step 7 is nan, clips a, b")

    monkeypatch.setattr("favchat_jax.checkpoints.initial.starting_state", diverge)
    ended = command("train", *small_world.flags("stage1"), f"--workdir={tmp_path}")
    assert (ended.code, ended.stdout) == (1, "")
    assert ended.stderr == "train: the loss of step 7 is nan, clips a, b\n"


# chat


def one_pixel() -> bytes:
    return encode_video(3, container="matroska", codec="ffv1", pixels="bgr0", width=1, height=1, picture=black)


def black(number: int, width: int, height: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


BAD_VIDEOS = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"These are words.\n" * 50, "cannot be read as a video"),
    "audio": (audio_only, "no video stream"),
    "1x1": (one_pixel, "1x1 pixels"),
    "cut": (lambda: encode_video(30)[:400], "cannot be read|no video"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_chat_refuses_a_bad_video_before_it_loads_the_checkpoint(name, command, tmp_path):
    make, says = BAD_VIDEOS[name]
    path = tmp_path / f"{name}.mp4"
    path.write_bytes(make())
    ended = command("chat", "--checkpoint=nowhere", f"--video={path}", "--question=Who?")
    assert ended.is_refusal(f"{name}.mp4.*({says})"), ended


def test_chat_refuses_a_video_that_is_missing_or_a_folder(command, tmp_path):
    assert command("chat", "--checkpoint=nowhere", "--video=none.mp4").is_refusal("none.mp4 does not exist")
    assert command("chat", "--checkpoint=nowhere", f"--video={tmp_path}").is_refusal(f"{tmp_path} is a folder")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needed: --checkpoint=WORKDIR --video=FILE"),
        (["--checkpoint=x"], "needed: --checkpoint=WORKDIR --video=FILE"),
        (["--question="], "--question is empty"),
        (["--question=  "], "--question is empty"),
        (["--max_new_tokens=0"], "max_new_tokens"),
        (["--temperature=-1"], "temperature"),
        (["--top_p=1.5"], "top_p"),
        (["--seed=x"], "seed"),
        (["--seed=99999999999999999999"], "seed=9+: give a number of 64 bits"),
        (["--temperature=nan"], "temperature=nan"),
        (["--max_new_tokens=1000000000"], "max_new_tokens=1000000000: give 1 to 4096 tokens"),
        (["--answer_only"], "--answer_only .* give --question or --questions with it"),
        (["--json"], "--json .* give --question or --questions with it"),
        (["--question=a", "--questions=b"], "exclude each other"),
        (["--questions=none.txt"], "none.txt cannot be read"),
        (["What", "is", "this?"], "unexpected argument 'What'"),
    ],
)
def test_chat_refuses_a_mistake_on_the_command_line(arguments, says, command, video):
    if arguments and not arguments[0].startswith("--checkpoint"):
        arguments = ["--checkpoint=nowhere", f"--video={video}", *arguments]
    assert command("chat", *arguments).is_refusal(says)


def test_chat_refuses_what_is_not_a_workdir_with_a_whole_checkpoint(command, video, trained, small_world, tmp_path):
    def chat(checkpoint):
        return command("chat", f"--checkpoint={checkpoint}", f"--video={video}", "--question=Who?")

    assert chat("nowhere").is_refusal("nowhere/config.json is missing: nowhere is not a workdir")
    assert chat(video).is_refusal("clip.mp4/config.json is missing")
    assert chat(trained.folder).is_refusal(f"config.json is missing: .*; did you mean {trained.folder}/stage3.$")
    assert chat(small_world.llm).is_refusal("mistral is a language model's folder, not a run")
    copy = trained.copy("stage1", tmp_path)
    shutil.rmtree(copy / "checkpoints")
    assert chat(copy).is_refusal("stage1 holds no checkpoint: train it first")
    copy = trained.copy("stage3", tmp_path)
    damage(copy / "frozen" / "weights")
    assert chat(copy).is_refusal("stage3/frozen is damaged")


def test_chat_refuses_a_question_longer_than_the_context(command, video, checkpoint):
    ended = command("chat", f"--checkpoint={checkpoint}", f"--video={video}", f"--question={'why ' * 400}")
    assert ended.is_refusal("the question is .* tokens long, .* over the limit of 160; shorten the text")


@pytest.mark.parametrize("start", [("favchat_jax.chat",), ("favchat_jax", "chat")], ids=["module", "command"])
def test_chat_prints_the_answer_alone(start, video, checkpoint):
    process = start_module(
        *start,
        f"--checkpoint={checkpoint}",
        f"--video={video}",
        "--question=What colour is the hair?",
        "--max_new_tokens=6",
    )
    stdout, stderr = process.communicate(timeout=200)
    answer = favchat_jax.load(checkpoint).answer(video, "What colour is the hair?", max_new_tokens=6)
    assert stdout == f"{answer}\n"
    assert (process.returncode, stderr) == (0, "" if answer else "chat: the answer is empty: ask in other words\n")


def test_chat_says_at_which_face_it_looks_and_draws_the_tracks(checkpoint, command, tmp_path):
    (tmp_path / "pair.mp4").write_bytes(encoded(beside(rendered(12, 1), rendered(12, 4))))
    words = (f"--checkpoint={checkpoint}", f"--video={tmp_path / 'pair.mp4'}", "--question=Who?", "--max_new_tokens=4")
    ended = command("chat", *words, "--face_crop", f"--face_sheet={tmp_path / 'sheet.png'}")
    assert ended.code == 0 and "looking at face 1 of 2 faces: 1 (" in ended.stderr
    assert (tmp_path / "sheet.png").read_bytes()[1:4] == b"PNG"
    assert "looking at face 2 of 2 faces" in command("chat", *words, "--face=2").stderr
    assert "looking" not in command("chat", *words).stderr
    ended = command("chat", *words, "--face=3")
    assert ended.code == 2 and re.search("face=3: .*pair.mp4 has 2 faces: .*; choose one of these\n$", ended.stderr)
    both = command("chat", *words, "--face=2", "--face_crop=false")
    assert both.is_refusal("--face and --face_crop=false exclude each other")
    assert command("chat", *words, "--face_sheet=nowhere/a.png").is_refusal(
        "--face_sheet=nowhere/a.png cannot be written"
    )


def test_chat_can_leave_out_the_thought(video, checkpoint, command, monkeypatch):
    said = "<think> brown hair </think> <answer> brown </answer>"
    monkeypatch.setattr("favchat_jax.generation.sampler.Sampler.answer", lambda *_: [[said]])
    arguments = [f"--checkpoint={checkpoint}", f"--video={video}", "--question=Which hair?"]
    assert command("chat", *arguments).stdout == f"{said}\n"
    ended = command("chat", *arguments, "--answer_only")
    assert (ended.stdout, ended.stderr) == ("brown\n", "")


def test_chat_says_where_a_response_has_no_answer_in_its_tags(video, checkpoint, command, monkeypatch):
    monkeypatch.setattr("favchat_jax.generation.sampler.Sampler.answer", lambda *_: [["<think/think> brown"]])
    arguments = [f"--checkpoint={checkpoint}", f"--video={video}", "--question=Which hair?"]
    ended = command("chat", *arguments, "--answer_only")
    assert (ended.code, ended.stdout) == (0, "<think/think> brown\n")
    assert ended.stderr.startswith("chat: the response has no <answer>;") and reasoning.QUESTION in ended.stderr
    assert command("chat", *arguments).stderr == ""


def test_a_conversation_answers_each_line_with_the_turns_before_it_in_mind(video, checkpoint):
    process = start_module(
        "favchat_jax.chat",
        f"--checkpoint={checkpoint}",
        f"--video={video}",
        "--max_new_tokens=5",
        stdin=subprocess.PIPE,
    )
    questions = ["What colour is the hair?", "why " * 400, "And the eyes?"]
    lines = [*questions, "/reset", questions[2], "quit", "never read"]
    stdout, stderr = process.communicate("\n".join(lines), timeout=200)
    model = favchat_jax.load(checkpoint)
    first = "".join(model.stream(video, questions[0], max_new_tokens=5))
    before = [(questions[0], first.strip())] if first.strip() else []  # a turn without an answer is not told again
    second = "".join(model.stream(video, questions[2], history=before, max_new_tokens=5))
    anew = "".join(model.stream(video, questions[2], max_new_tokens=5))
    assert process.returncode == 0 and stdout == f"{first}\n{second}\n{anew}\n"
    assert "over the limit of 160; shorten the text" in stderr and "the conversation begins anew" in stderr


def test_chat_answers_a_file_of_questions_as_lines_or_as_json(command, video, checkpoint, tmp_path):
    questions = ["What colour is the hair?", "And the eyes?"]
    (tmp_path / "asked.txt").write_text("\ufeff" + "\n\n".join(questions) + "\n")
    common = [f"--checkpoint={checkpoint}", f"--video={video}", "--max_new_tokens=5"]
    ended = command("chat", *common, f"--questions={tmp_path}/asked.txt")
    answers = favchat_jax.load(checkpoint).answer(video, questions, max_new_tokens=5)
    assert (ended.code, ended.stdout) == (0, "".join(f"{answer}\n" for answer in answers))
    ended = command("chat", *common, f"--questions={tmp_path}/asked.txt", "--json")
    expected = [{"question": question, "answer": said} for question, said in zip(questions, answers, strict=True)]
    assert [json.loads(line) for line in ended.stdout.splitlines()] == expected


def test_a_question_in_another_encoding_is_refused(command, video, checkpoint):
    question = b"caf\xe9?".decode("utf-8", "surrogateescape")
    ended = command("chat", f"--checkpoint={checkpoint}", f"--video={video}", f"--question={question}")
    assert ended.is_refusal("is not text in UTF-8")


def test_the_embedded_model_warns_about_a_video_that_is_not_rendered(command, checkpoint, tmp_path):
    (tmp_path / "mine.mp4").write_bytes(encode_video(4))
    arguments = [f"--checkpoint={checkpoint}", f"--video={tmp_path}/mine.mp4", "--question=Who?", "--max_new_tokens=2"]
    assert "has seen rendered faces only" in command("chat", *arguments).stderr


# evaluate


def evaluation(small_world, *arguments: object) -> list[object]:
    data = ("--config.data.name=rendered_faces/smoke", f"--config.data.packed={small_world.packed}")
    return ["--config=configs/eval/rendered.py", *data, "--config.limit=3", "--config.batch=2", *arguments]


def test_evaluate_writes_its_figures_and_prints_them(command, small_world, checkpoint, tmp_path):
    out = tmp_path / "result.json"
    ended = command("evaluate", *evaluation(small_world, f"--checkpoint={checkpoint}", f"--out={out}"))
    assert ended.code == 0 and "Traceback" not in ended.stderr
    result = json.loads(out.read_text())
    assert (result["benchmark"], result["model"]) == ("rendered", str(checkpoint))
    source = open_dataset(DATA, small_world.packed, "heldout")
    asked = [(source[i].id, q.question) for i in range(3) for q in source[i].questions]
    assert [(row["clip"], row["question"]) for row in result["samples"]] == asked and result["n"] == len(asked)
    assert ended.stdout.splitlines()[-1].split() == [
        "all", str(len(asked)), f"{result['accuracy']:.3f}", f"{result['majority_baseline']:.3f}",
    ]  # fmt: skip


def test_evaluate_refuses_mistakes(command, small_world, checkpoint, tmp_path):
    def evaluate(*arguments):
        return command("evaluate", *evaluation(small_world, *arguments))

    out = f"--out={tmp_path / 'result.json'}"
    good = f"--checkpoint={checkpoint}"
    assert command("evaluate").is_refusal("needed: --config=configs/eval/rendered.py --checkpoint=WORKDIR --out=")
    assert evaluate(good).is_refusal("needed: --config")
    assert evaluate(good, f"--out={tmp_path / 'none' / 'r.json'}").is_refusal("--out=.*/none/r.json cannot be written")
    assert evaluate(good, f"--out={tmp_path}").is_refusal(f"--out={tmp_path} cannot be written")
    assert evaluate(out, "--checkpoint=nowhere").is_refusal("nowhere is not a workdir")
    assert evaluate(out, good, "--config.benchmark=dfew2").is_refusal("benchmark 'dfew2' is unknown")
    assert evaluate(out, good, "--config.data.split=test").is_refusal("has no split 'test'")
    assert evaluate(out, good, "--config.nothing=1").is_refusal("unknown config option: --config.nothing")
    (tmp_path / "file").write_text("in the way")
    assert evaluate(good, f"--out={tmp_path / 'file' / 'r.json'}").is_refusal("--out=.*/file/r.json cannot be written")
    assert evaluate(out, good, "--config.batch=0").is_refusal("batch=0 is too small: give at least 1")
    assert evaluate(out, good, "--config.limit=-5000").is_refusal("limit=-5000 is too small: give at least 0")
    stage = command("evaluate", "--config=configs/stage3.py", out, good)
    assert stage.is_refusal("--config=configs/stage3.py has no benchmark, .*: choose one of configs/eval")
    assert not (tmp_path / "result.json").exists()


def test_print_config_prints_the_config_that_the_options_make(command):
    ended = command("train", "--config=configs/stage1.py", "--config.batch=3", "--print_config")
    assert (ended.code, json.loads(ended.stdout)["batch"], json.loads(ended.stdout)["stage"]) == (0, 3, "stage1")
    ended = command("evaluate", "--config=configs/eval/dfew.py", "--config.data.root=/data", "--print_config")
    assert (ended.code, json.loads(ended.stdout)["data"]["root"]) == (0, "/data")


def test_train_refuses_a_config_of_another_kind(command):
    ended = command("train", "--config=configs/eval/rendered.py")
    assert ended.is_refusal("--config=configs/eval/rendered.py has no stage, .*: choose one of configs/stage1.py")


# As processes, where what importing libraries prints would show.


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("train", ["--config=configs/stage3.py", "--config.no.such=1"], "unknown config option: .*no"),
        ("chat", ["--checkpoint=nowhere", "--video=nowhere.mp4", "--question=Who?"], "nowhere.mp4 does not exist"),
        ("evaluate", ["--config=configs/eval/rendered.py", "--checkpoint=nowhere", "--out=x.json"], "not a workdir"),
    ],
)
def test_a_refusal_is_all_that_a_process_prints(module, arguments, says, monkeypatch):
    for name in ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name)
    process = start_module(f"favchat_jax.{module}", *arguments)
    stdout, stderr = process.communicate(timeout=100)
    assert Ended(process.returncode, stdout, stderr).is_refusal(says), stderr
    assert not os.path.exists(ROOT / "x.json")


@pytest.mark.parametrize("module", ["train", "chat", "evaluate"])
def test_help_names_the_options_and_exits_with_0(module, command):
    ended = command(module, "--help")
    assert ended.code == 0 and f"python -m favchat_jax.{module}" in ended.stdout and ended.stderr == ""
    assert ("--workdir:" if module == "train" else "--checkpoint:") in ended.stdout
