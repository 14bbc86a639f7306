"""Lists the questions that the project itself asks, and refuses a Q-Former's prompt that is too short for one of them.

A prompt keeps the end of a longer question (`data.prompt_length`). A question that loses its beginning is another one.
"""

import importlib

from favchat_jax.checkpoints.run import Assembly
from favchat_jax.data.loader import FIXED_QUESTIONS
from favchat_jax.errors import UserError
from favchat_jax.evaluation.benchmarks import BENCHMARKS, benchmark_of
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.stages import STAGES


def check_training(parts: Assembly, benchmarks: bool) -> None:
    """Raises UserError if a run's Q-Formers would not read whole what its stage asks.

    Args:
        parts: the run's model.
        benchmarks: whether they shall also read the questions of all benchmarks in `configs/eval`.
    """
    asked = list(FIXED_QUESTIONS.get(STAGES[parts.config.stage].text, ()))
    if benchmarks:
        asked += [question for config in _configs() for question in questions_of(config)]
    if parts.config.model.qformer.prompt:
        parts.prompt.check_whole(asked)


def check_benchmark(parts: Assembly, config: EvaluationConfig) -> None:
    """Raises UserError if a checkpoint's Q-Formers would not read the questions of a benchmark whole."""
    try:
        if parts.config.model.qformer.prompt:
            parts.prompt.check_whole(questions_of(config))
    except UserError as error:
        raise UserError(f"the checkpoint was trained with {error}, or set a shorter --config.question") from None


def questions_of(config: EvaluationConfig) -> list[str]:
    """Returns the questions that a benchmark asks about every clip, with its classes in their place."""
    classes = ", ".join(getattr(benchmark_of(config.benchmark), "CLASSES", ()))
    asked = (config.question, config.describe if config.method == "describe" else None)
    return [question.replace("{classes}", classes) for question in asked if question]


def _configs() -> list[EvaluationConfig]:
    """Returns the configs of `configs/eval`; none if the package is installed without them."""
    try:
        files = [importlib.import_module(f"configs.eval.{name}") for name in BENCHMARKS]
    except ModuleNotFoundError:
        return []
    return [EvaluationConfig.from_ml_collections(file.get_config()) for file in files]
