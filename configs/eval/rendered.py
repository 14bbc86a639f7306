"""Held-out rendered clips: the accuracy of short answers by kind of question.

python -m favchat_jax.evaluate --config=configs/eval/rendered.py --checkpoint=runs/tiny-v1/stage3 --out=rendered.json
"""

from configs.eval import common


def get_config():
    config = common.get_config("rendered")
    config.data.update({"name": "rendered_faces", "packed": "runs/data", "split": "heldout"})
    config.data.face_crop = False  # faces fill the frame
    config.batch = 32  # clips
    config.questions = 4  # most questions per clip, answered together
    config.max_new_tokens = 12
    return config
