"""Cold start: stage 3's policy learns the form `<think>...</think> <answer>...</answer>` before reinforcement.

python -m favchat_jax.train --config=configs/coldstart.py
python -m favchat_jax.train --config=configs/coldstart.py:recipe=published --workdir=DIR    (the authors' public code)
"""

from configs import common


def get_config(argument: str = ""):
    recipe, argument = common.split_recipe(argument)
    config = common.get_config("coldstart", argument)
    config.optimizer.learning_rate = 2e-5  # stage 3's; the paper mentions this fine-tuning without details
    config.epochs = 1.0
    if recipe == "published":
        config.optimizer.update(
            {
                "learning_rate": 1e-6,
                "weight_decay": 0.0,
                "clip_norm": 5.0,
                "warmup": 0.0,
                "decay": "linear",
                "floor": 0.0,
            }
        )
        config.batch = 8  # four GPUs, two steps of accumulation
    if config.preset == "tiny":
        config.steps = 500
        # LoRA has to learn the letters of the tags, which the embedded language model has never seen. Under Muon, LoRA
        # trains by Adam at a tenth of the rate, which takes too long. AdamW at the full rate first lowers accuracy on
        # the clips; 500 steps restore it.
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 1e-2
        config.data.questions = 1  # a clip has one response
    return config
