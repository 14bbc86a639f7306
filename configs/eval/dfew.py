"""DFEW, Table 3: seven emotions, five folds.

python -m favchat_jax.evaluate --config=configs/eval/dfew.py --config.data.root=DFEW --checkpoint=DIR --out=dfew.json
"""

from configs.eval import common


def get_config():
    config = common.get_config("dfew")
    # Its clips are scenes of films: data.face_crop stays as the checkpoint was trained.
    config.folds = (1, 2, 3, 4, 5)
    config.method = "describe"  # and infer a class, as in the paper; or direct, or likelihood (of class names)
    # The paper gives no wording.
    config.describe = "Describe the person's facial expressions in the video in detail."
    config.question = "Which one of these emotions does the person show: {classes}? Answer with one of them."
    config.max_new_tokens = 32
    return config
