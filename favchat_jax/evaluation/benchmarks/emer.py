"""Evaluates EMER (Lian et al., 2023): explanations of a person's emotion (Table 4), scored from 0 to 10 by a judge.

    ROOT/gt-eng.csv    names,emotions,subtitles,reasons    or    ROOT/final-EMER-reason.csv    name,chinese,english
    ROOT/video/sample_00000648.avi ...    or .mp4: clips of MER2023

`gt-eng.csv` is the first version, 100 samples, to which Table 4 refers. It takes precedence over the second version.
"""

from pathlib import Path

from favchat_jax.evaluation import published
from favchat_jax.evaluation.captions import captions_result, sample
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.footage import Footage
from favchat_jax.evaluation.layout import described, find_clip, first_of, read_table, root_of
from favchat_jax.evaluation.respondents import Ask
from favchat_jax.evaluation.result import Result
from favchat_jax.evaluation.session import Session, present

SOURCE = (
    "annotations: https://github.com/zeroQiaoba/AffectGPT, EMER/dataset-v1; clips: MER2023, on request from its authors"
)
LAYOUT = "gt-eng.csv and video/"
# Annotation file of each version -> its columns of names and of reasons.
VERSIONS = {"gt-eng.csv": ("names", "reasons"), "final-EMER-reason.csv": ("name", "english")}
CLIPS = ("video/{name}.avi", "video/{name}.mp4")


def run(config: EvaluationConfig, session: Session) -> Result:
    """Asks for each person's emotion and the clues to it, and scores the overlap of both with the reference."""
    root = root_of(config, LAYOUT, SOURCE)
    path = first_of(root, list(VERSIONS), "its annotations", SOURCE)
    reasons = _read(path)
    reasons = dict(list(reasons.items())[: config.limit or None])
    there = present([(name, find_clip(root, CLIPS, name=name)) for name in reasons], session, root)
    asks = [Ask(name, (Footage(name, clip),), (((config.question, None),),)) for name, clip in there]
    answers = session.ask(asks, config.max_new_tokens, "explaining")
    samples = [sample(name, name, config.question, reasons[name], answer) for name, (answer,) in answers.items()]
    rubrics = {"clue_overlap": "clues", "label_overlap": "emotions"}
    data = described("EMER", root, [path], [clip for _, clip in there], len(reasons))
    rows = published.rows(published.EMER, *rubrics)
    return captions_result(config, session, samples, rubrics, data=data, published=rows)


def _read(path: Path) -> dict[str, str]:
    name, reason = VERSIONS[path.name]
    return {row[name].strip(): row[reason].strip() for row in read_table(path, (name, reason))}
