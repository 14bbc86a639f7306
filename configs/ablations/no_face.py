"""Ablation of the facial encoder (Table 6, w/o FE): granularity fusion uses the general encoder's blocks instead.

python -m favchat_jax.train --config=configs/ablations/no_face.py
python -m favchat_jax.train --config=configs/ablations/no_face.py:stage=stage1,variant=v2
"""

from configs import ablations


def get_config(argument: str = ""):
    return ablations.get_config("no_face", argument)
