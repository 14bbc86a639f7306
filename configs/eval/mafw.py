"""MAFW, Table 3: eleven emotions, five folds.

python -m favchat_jax.evaluate --config=configs/eval/mafw.py --config.data.root=MAFW --checkpoint=DIR --out=mafw.json
"""

from configs.eval import dfew


def get_config():
    config = dfew.get_config()
    config.benchmark = "mafw"  # clips of films and series, in which the face is often small: face_crop as trained
    return config
