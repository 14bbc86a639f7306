"""Stage 2: everything except the language model's base learns from question-answer pairs (Section 4.2, 170K pairs).

python -m favchat_jax.train --config=configs/stage2.py:variant=v1
"""

from configs import common


def get_config(argument: str = ""):
    config = common.get_config("stage2", argument)
    config.batch, config.optimizer.learning_rate = 4, 2e-4
    if config.preset == "tiny":
        config.steps, config.batch, config.optimizer.learning_rate = 370, 16, 5e-3
        if config.variant == "v2":  # its Q-Formers, frozen in stage 1, first train with CA2 here
            config.steps = 1000
    return config
