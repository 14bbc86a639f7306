"""The later version's test: questions about your own clips, scored from 0 to 10 by a judge.

python -m favchat_jax.evaluate --config=configs/eval/held_out_qa.py --config.data.root=DIR --checkpoint=DIR \
    --out=qa.json --config.judge.model=gpt-4o
"""

from configs.eval import common


def get_config():
    config = common.get_config("held_out_qa")  # your own clips, of any kind: face_crop as trained
    config.limit = 2000  # questions
    config.questions = 4  # questions per clip, answered together
    config.max_new_tokens = 128
    return config
