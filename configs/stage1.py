"""Stage 1: visual modules learn to describe clips; the language model is frozen (Section 4.2, 60K summaries).

`favchat_jax/stages.py` lists what trains: in v1 all visual modules, in v2 all but the Q-Formers and their layers.

python -m favchat_jax.train --config=configs/stage1.py
"""

from configs import common


def get_config(argument: str = ""):
    config = common.get_config("stage1", argument)
    config.optimizer.learning_rate = 2e-4  # the paper's
    if config.preset == "tiny":
        config.steps = 240
        config.optimizer.learning_rate = 1e-2  # Muon's; twice or half of it does not help
        config.data.questions = 1  # a clip has one summary
    else:
        config.batch = 8
    return config
