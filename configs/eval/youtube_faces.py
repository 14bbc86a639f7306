"""YouTube Faces, Table 5: do two clips show the same person? With --describer=DIR, another model reads FaVChat's words.

python -m favchat_jax.evaluate --config=configs/eval/youtube_faces.py --config.data.root=YouTubeFaces --checkpoint=DIR \
    --out=youtube_faces.json
"""

from configs.eval import common


def get_config():
    config = common.get_config("youtube_faces")
    # Or aligned_images_DB, whose pictures are cropped and aligned already: set data.face_crop=False with it.
    config.data.images = "frame_images_DB"  # whole pictures: face_crop as trained
    config.pairs = "segments"  # the paper's test, as far as described; or splits, the data set's own
    config.segment = 36  # frames per segment
    config.method = "direct"  # or likelihood, which gives an ROC curve
    # The paper gives no wording.
    config.question = "The video shows two clips, one after the other. Do both show the same person? Answer yes or no."
    config.max_new_tokens = 16
    return config
