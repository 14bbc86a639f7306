"""Ablation of granularity fusion (Table 6, w/o MG; v2: w/o CA2): the projector reads the facial encoder's last output.

python -m favchat_jax.train --config=configs/ablations/no_granularity.py
python -m favchat_jax.train --config=configs/ablations/no_granularity.py:stage=stage1,variant=v2
"""

from configs import ablations


def get_config(argument: str = ""):
    return ablations.get_config("no_granularity", argument)
