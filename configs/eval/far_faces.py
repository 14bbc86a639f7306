"""Held-out rendered clips that fill a quarter of the picture's side: what the face crop gains.

python -m favchat_jax.evaluate --config=configs/eval/far_faces.py --checkpoint=runs/tiny-v1/stage3 --out=far.json
"""

from configs.eval import rendered


def get_config():
    config = rendered.get_config()
    config.data.name = "rendered_faces/far"
    config.data.face_crop = True  # faces are small; without the crop they are lost
    return config
