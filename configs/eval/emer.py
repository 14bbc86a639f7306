"""EMER, Table 4: a judge scores the clues to an emotion and the emotions inferred.

python -m favchat_jax.evaluate --config=configs/eval/emer.py --config.data.root=EMER --checkpoint=DIR --out=emer.json \
    --config.judge.model=gpt-4o
"""

from configs.eval import common


def get_config():
    config = common.get_config("emer")  # scenes with several people at times: face_crop as trained
    config.question = "From what clues can we infer the person's emotional state?"  # from the data set's baselines
    config.max_new_tokens = 256
    return config
