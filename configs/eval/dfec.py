"""DFEC, Table 1: descriptions of facial expressions, scored by n-grams, events and a judge.

python -m favchat_jax.evaluate --config=configs/eval/dfec.py --config.data.root=DFEC --checkpoint=DIR --out=dfec.json \
    --config.judge.model=gpt-4o
"""

from configs.eval import common


def get_config():
    config = common.get_config("dfec")  # clips of films: face_crop as trained
    config.question = (
        "Describe the person and the changes of the facial expressions in the video in detail."  # a choice
    )
    config.max_new_tokens = 256
    return config
