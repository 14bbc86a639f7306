"""Stage 1: the visual modules learn to describe clips; the language model is frozen (Section 4.2, 60K summaries).

python -m favchat_jax.train --config=configs/stage1.py
"""

from configs import common


def get_config(argument: str = ""):
    config = common.get_config("stage1", argument)
    config.batch, config.optimizer.learning_rate = 8, 2e-4
    if config.preset == "tiny":
        config.steps, config.batch, config.optimizer.learning_rate = 240, 16, 1e-2
        config.data.questions = 1
    return config
