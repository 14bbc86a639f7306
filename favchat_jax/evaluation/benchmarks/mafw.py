"""Evaluates MAFW (Liu et al., 2022): 11 emotions of 9,172 single-labelled clips, five folds (Table 3).

ROOT/Train & Test Set/single/no_caption/set_1/test.txt ... set_5/test.txt    lines such as: 00001.mp4 anger
ROOT/data/clips/00001.mp4    or    ROOT/data/frames/00001/

The first folder may have another name, since some programs refuse `&`, and the clips may lie in `clips/unzip`, as the
archive has them, or without `data`.
"""

from pathlib import Path

from favchat_jax.errors import UserError
from favchat_jax.evaluation import published
from favchat_jax.evaluation.classification import Listed, classify
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.layout import described, find_clip, first_of, root_of
from favchat_jax.evaluation.result import Result
from favchat_jax.evaluation.session import Session
from favchat_jax.files import read_lines

SOURCE = "ask for it at https://mafw-database.github.io/MAFW"
LAYOUT = "'Train & Test Set'/ and data/"
NAMES = (
    *("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "contempt", "anxiety", "helplessness"),
    "disappointment",
)
CLASSES = {name: name for name in NAMES}
FOLD = "single/no_caption/set_{fold}/test.txt"
CLIPS = tuple(
    folder + clip
    for clip in ("clips/{name}.mp4", "clips/unzip/{name}.mp4", "frames/{name}")
    for folder in ("data/", "")
)


def run(config: EvaluationConfig, session: Session) -> Result:
    """Classifies the test clips of the folds that `config.folds` names."""
    root = root_of(config, LAYOUT, SOURCE)
    files = {fold: _list_of(root, FOLD.format(fold=fold), fold) for fold in config.folds}
    folds = {f"fold {fold}": _read(root, path) for fold, path in files.items()}
    result = classify(config, session, root, folds, CLASSES)
    clips = [clip.path for listed in folds.values() for clip in listed if clip.path]
    result["data"] = described("MAFW", root, list(files.values()), clips, sum(map(len, folds.values())))
    result["published"] = published.rows(published.EMOTION, "uar", "war", first=2)
    return result


def _list_of(root: Path, name: str, fold: int) -> Path:
    """Returns the list of a fold, below whatever folder."""
    others = sorted(str(path.relative_to(root)) for path in root.glob(f"*/{name}"))
    return first_of(root, [f"Train & Test Set/{name}", name, *others], f"fold {fold}", SOURCE)


def _read(root: Path, path: Path) -> list[Listed]:
    listed = []
    for number, line in read_lines(path):
        fields = line.split()
        if len(fields) != 2 or not fields[0].endswith(".mp4"):
            raise UserError(
                f"{path}, line {number}: expected a clip and its label such as '00001.mp4 anger', not {line!r}: "
                "copy the file again"
            )
        name, label = Path(fields[0]).stem, fields[1]
        if label not in CLASSES:
            raise UserError(
                f"{path}, line {number}: label {label!r} is not one of {', '.join(CLASSES)}: copy the file again"
            )
        listed.append(Listed(name, find_clip(root, CLIPS, name=name), label))
    return listed
