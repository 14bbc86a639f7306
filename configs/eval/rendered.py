"""Held-out rendered clips: accuracy of short answers by kind of question.

python -m favchat_jax.evaluate --config=configs/eval/rendered.py --checkpoint=runs/tiny-v1/stage3 --out=rendered.json
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "benchmark": "rendered",
            "data": {"name": "rendered_faces", "root": "", "packed": "runs/data", "split": "heldout"},
            "batch": 32,  # clips
            "questions": 4,  # of a clip, at most; answered together
            "max_new_tokens": 12,
            "limit": 0,  # clips; 0 for all
        }
    )
