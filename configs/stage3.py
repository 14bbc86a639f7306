"""Stage 3: the adapters learn from questions about faces (Section 4.2, 110K CelebV-HQ pairs).

`favchat_jax/stages.py` lists what trains: in v1 the mixture and LoRA, in v2 also the Q-Formers and their layers.

python -m favchat_jax.train --config=configs/stage3.py
python -m favchat_jax.train --config=configs/stage3.py:preset=paper,variant=v1 --workdir=DIR
"""

from configs import common


def get_config(argument: str = ""):
    config = common.get_config("stage3", argument)
    config.optimizer.learning_rate = 2e-5  # the paper's
    if config.preset == "tiny":
        config.steps = 30
        config.optimizer.learning_rate = 1e-3
    return config
