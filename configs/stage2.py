"""Stage 2: visual modules and LoRA learn from question-answer pairs (Section 4.2, 170K pairs).

`favchat_jax/stages.py` lists what trains: in v1 all visual modules and LoRA, in v2 all but the weight adapters.

python -m favchat_jax.train --config=configs/stage2.py:variant=v1
"""

from configs import common


def get_config(argument: str = ""):
    config = common.get_config("stage2", argument)
    config.optimizer.learning_rate = 2e-4  # the paper's
    if config.preset == "tiny":
        config.steps = 370
        config.optimizer.learning_rate = 5e-3  # at stage 1's rate, answers on eyes and fine detail stayed at chance
        if config.variant == "v2":
            config.steps = 1000  # its Q-Formers, frozen in stage 1, first train with CA2 here
    return config
