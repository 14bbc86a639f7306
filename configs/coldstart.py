"""Cold start: stage 3's policy learns the form `<think>...</think> <answer>...</answer>` before reinforcement.

python -m favchat_jax.train --config=configs/coldstart.py
"""

from configs import common


def get_config(argument: str = ""):
    config = common.get_config("coldstart", argument)
    config.optimizer.learning_rate = 2e-5  # stage 3's; the paper mentions this fine-tuning without details
    config.epochs = 1.0
    if config.preset == "tiny":
        config.steps = 500
        # LoRA has to learn the letters of the tags, which the embedded language model has never seen. Under Muon, LoRA
        # trains by Adam at a tenth of the rate, which takes too long. AdamW at the full rate first lowers accuracy on
        # the clips; 500 steps restore it.
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 1e-2
        config.data.questions = 1  # a clip has one response
    return config
