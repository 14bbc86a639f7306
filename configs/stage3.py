"""Stage 3: the mixture adapter and LoRA train on questions about faces (Section 4.2, 110K CelebV-HQ pairs).

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
