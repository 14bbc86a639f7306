"""Ablation of the mixture (Table 6, w/o MoE; v2: w/o adapters): a plain sum of both streams with two learned weights.

python -m favchat_jax.train --config=configs/ablations/no_moe.py
python -m favchat_jax.train --config=configs/ablations/no_moe.py:stage=stage1,variant=v2
"""

from configs import ablations


def get_config(argument: str = ""):
    return ablations.get_config("no_moe", argument)
