"""The Q-Formers read every question of the project whole, and a prompt that is too short for one is refused."""

import dataclasses
import importlib
import json
import re

import pytest

from favchat_jax.config import Config
from favchat_jax.data.conversation import PromptEncoder, load_tokenizer
from favchat_jax.data.loader import FIXED_QUESTIONS
from favchat_jax.data.sources import celebvhq
from favchat_jax.embedded import faces
from favchat_jax.errors import UserError
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.questions import check_benchmark, check_training, questions_of
from favchat_jax.evaluation.session import DESCRIBE
from tests.conftest import train_alone
from tests.data.tokenizers_for_tests import bert

BENCHMARKS = ("dfec", "dfew", "mafw", "emer", "youtube_faces", "held_out_qa", "rendered")
FIXED = [question for group in FIXED_QUESTIONS.values() for question in group]


def benchmark(name: str, **changes) -> EvaluationConfig:
    file = importlib.import_module(f"configs.eval.{name}").get_config()
    return EvaluationConfig.from_ml_collections(file).updated(changes)


def pieces(*questions: str):
    """A word-piece tokenizer that knows every word, as bert-base-uncased knows those of the benchmarks' questions."""
    return bert(*sorted({piece for question in questions for piece in re.findall(r"\w+|[^\w\s]", question.lower())}))


ASKED = [question for name in BENCHMARKS for question in questions_of(benchmark(name))]


@dataclasses.dataclass
class Parts:
    """The fields of an assembly that the checks read."""

    config: Config
    prompt: PromptEncoder


def parts(preset: str, length: int | None = None, *, stage: str = "stage1", prompt: bool = True) -> Parts:
    config = Config.from_ml_collections(importlib.import_module(f"configs.{stage}").get_config(f"preset={preset}"))
    length = length or config.data.prompt_length
    config = config.updated({"data.prompt_length": length, "model.qformer.prompt": prompt})
    return Parts(config, PromptEncoder(pieces(*ASKED, *FIXED), length))


@pytest.mark.parametrize("preset", ["base", "paper"])
def test_no_question_of_the_project_is_cut_at_a_benchmarks_size(preset):
    _, template = celebvhq.template({"attributes": "", "action": "", "emotion": ""})
    asked = [*ASKED, *FIXED, DESCRIBE, *(question.question for question in template)]
    length = parts(preset).config.data.prompt_length
    PromptEncoder(pieces(*asked), length).check_whole(asked)
    assert max(len(pieces(question).tokenize(question)) for question in ASKED) == 38  # of MAFW, without [CLS] and [SEP]
    assert length >= 1.5 * 38, "other tokenizers need more tokens for these words"


def test_no_question_of_the_embedded_data_is_cut(small_world):
    encoder = PromptEncoder(load_tokenizer(small_world.llm), small_world.config("stage1").data.prompt_length)
    encoder.check_whole([*FIXED, *(question for group in faces.QUESTIONS.values() for question in group)])


@pytest.mark.parametrize("preset", ["base", "paper"])
def test_a_run_whose_prompt_is_too_short_for_a_benchmark_is_refused(preset):
    check_training(parts(preset, 40), benchmarks=True)
    with pytest.raises(
        UserError, match=r"data\.prompt_length=39 cuts the first 1 tokens off 'Which one .*at least 40$"
    ):
        check_training(parts(preset, 39), benchmarks=True)
    check_training(parts(preset, 4, prompt=False), benchmarks=True)  # its Q-Formers read no question


def test_a_run_whose_prompt_is_too_short_for_its_stage_is_refused():
    check_training(parts("tiny", 14), benchmarks=False)
    check_training(parts("tiny", 4, stage="stage2"), benchmarks=False)  # its questions come from the records
    with pytest.raises(UserError, match=r"data\.prompt_length=13 cuts the first 1 tokens off 'Tell me what"):
        check_training(parts("tiny", 13), benchmarks=False)


def test_a_checkpoint_is_not_asked_a_benchmarks_question_that_it_would_read_in_part():
    check_benchmark(parts("paper", 32), benchmark("dfew"))
    with pytest.raises(UserError, match=r"trained with data\.prompt_length=32 cuts the first 8 .*, or set a shorter"):
        check_benchmark(parts("paper", 32), benchmark("mafw"))
    check_benchmark(parts("paper", 32), benchmark("mafw", question="Which emotion of {classes}?", method="direct"))
    check_benchmark(parts("paper", 4, prompt=False), benchmark("mafw"))


def test_a_new_run_is_refused_before_it_leaves_a_folder_and_an_old_one_goes_on(small_world, trained, tmp_path):
    short = small_world.config("stage1", data__prompt_length=8)
    with pytest.raises(UserError, match=r"data\.prompt_length=8 cuts the first \d+ tokens off"):
        train_alone(short, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    workdir = trained.copy("stage1", tmp_path)
    stored = json.loads((workdir / "config.json").read_text())
    stored["data"]["prompt_length"] = 8
    (workdir / "config.json").write_text(json.dumps(stored))
    assert train_alone(short, workdir).finished
