"""Cold start: stage 3's policy learns the form `<think>...</think> <answer>...</answer>` before it is reinforced.

python -m favchat_jax.train --config=configs/coldstart.py
"""

from configs import common


def get_config(argument: str = ""):
    config = common.get_config("coldstart", argument)
    config.optimizer.learning_rate = 2e-5  # the paper says that there is such a fine-tuning and no more: stage 3's
    config.batch = 4
    config.epochs = 1.0
    if config.preset == "tiny":
        config.steps = 500
        config.batch = 16
        # The embedded language model has never seen the letters of the tags: LoRA has to learn them, which Adam at the
        # tenth of Muon's rate that LoRA gets does not within minutes. At first that costs it what it tells of a clip;
        # 500 steps bring it back.
        config.optimizer.update({"name": "adamw", "learning_rate": 1e-2})
        config.data.questions = 1
    return config
