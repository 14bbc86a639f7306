"""Evaluates DFEW (Jiang et al., 2020): 7 emotions of 11,697 single-labelled film clips, five folds (Table 3).

    ROOT/EmoLabel_DataSplit/test(single-labeled)/set_1.csv ... set_5.csv    or    ROOT/label/single_testset_1.csv ...
    ROOT/Clip/original/1.mp4    or another pattern of `CLIPS`

The first line of a fold's file is `video_name,label`; labels are 1 to 7 in the order of `CLASSES`.
"""

from pathlib import Path

from favchat_jax.errors import UserError
from favchat_jax.evaluation import published
from favchat_jax.evaluation.classification import Listed, classify
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.layout import described, find_clip, first_of, read_table, root_of
from favchat_jax.evaluation.result import Result
from favchat_jax.evaluation.session import Session

SOURCE = "ask for it at https://dfew-dataset.github.io"
LAYOUT = "EmoLabel_DataSplit/ and Clip/"
CLASSES = {
    "happy": "happiness",
    "sad": "sadness",
    "neutral": "neutral",
    "angry": "anger",
    "surprise": "surprise",
    "disgust": "disgust",
    "fear": "fear",
}
FOLDS = ("EmoLabel_DataSplit/test(single-labeled)/set_{fold}.csv", "label/single_testset_{fold}.csv")
# The first that exists is read: uncropped clips, then the authors' cropped faces, as videos or folders of frames.
CLIPS = (
    "Clip/original/{number}.mp4",
    "Clip/clip_224x224/{number:05d}.mp4",
    "Clip/clip_224x224_avi/{number:05d}.avi",
    "Clip/clip_224x224/{number:05d}",
    "Clip/clip_224x224_16f/{number:05d}",
    "Clip/jpg_256/{number:05d}",
    "data/{number:05d}",
)


def run(config: EvaluationConfig, session: Session) -> Result:
    """Classifies the test clips of the folds that `config.folds` names."""
    root = root_of(config, LAYOUT, SOURCE)
    files = {
        fold: first_of(root, [name.format(fold=fold) for name in FOLDS], f"fold {fold}", SOURCE)
        for fold in config.folds
    }
    folds = {f"fold {fold}": _read(root, path) for fold, path in files.items()}
    result = classify(config, session, root, folds, CLASSES)
    clips = [clip.path for listed in folds.values() for clip in listed if clip.path]
    result["data"] = described("DFEW", root, list(files.values()), clips, sum(map(len, folds.values())))
    result["published"] = published.rows(published.EMOTION, "uar", "war")
    return result


def _read(root: Path, path: Path) -> list[Listed]:
    listed = []
    for row in read_table(path, ("video_name", "label")):
        name, label = row["video_name"].strip(), row["label"].strip()
        if not name.isdigit():
            raise UserError(f"{path}, line {row['line']}: video_name {name!r} is not a number: copy the file again")
        if not label.isdigit() or not 1 <= int(label) <= len(CLASSES):
            raise UserError(
                f"{path}, line {row['line']}: label {label!r} is not a number from 1 to {len(CLASSES)}: "
                "copy the file again"
            )
        listed.append(Listed(name, find_clip(root, CLIPS, number=int(name)), list(CLASSES)[int(label) - 1]))
    return listed
