"""YouTube Faces, Table 5: are two clips of the same person? With --describer=DIR, another model given FaVChat's words.

python -m favchat_jax.evaluate --config=configs/eval/youtube_faces.py --config.data.root=YouTubeFaces --checkpoint=DIR \
    --out=youtube_faces.json
"""

from configs.eval import common


def get_config():
    config = common.get_config("youtube_faces")
    config.data.images = "frame_images_DB"  # or aligned_images_DB
    config.pairs = "segments"  # the paper's test as far as it says; or splits, the data set's own
    config.segment = 36  # frames of a segment
    config.method = "direct"  # or likelihood, which gives a whole ROC curve
    # The paper gives no wording.
    config.question = "The video shows two clips, one after the other. Do both show the same person? Answer yes or no."
    config.max_new_tokens = 16
    return config
