"""Reads frames of evaluated clips for the report, if the data set is still in its folder."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from favchat_jax.data.video import VideoError
from favchat_jax.errors import UserError
from favchat_jax.evaluation.benchmarks import BENCHMARKS, benchmark_of
from favchat_jax.evaluation.config import EvaluationConfig
from favchat_jax.evaluation.footage import Footage, joined_frames
from favchat_jax.evaluation.report.examples import SIDE, STRIP, Sample
from favchat_jax.evaluation.respondents import Ask
from favchat_jax.evaluation.session import Session

log = logging.getLogger("favchat_jax")


class Clips:
    """Returns frames of any result's samples. Each data set is listed once, by its own benchmark."""

    def __init__(self):
        self._listed: dict[str, dict[str, tuple[Footage, ...]]] = {}

    def __call__(self, result: Mapping[str, Any], sample: Sample) -> UInt8[np.ndarray, "T H W 3"] | None:
        name = result["benchmark"]
        if name not in self._listed:
            self._listed[name] = _listed(result)
        clips = self._listed[name].get(sample.get("clip", sample["id"]))
        try:
            return clips and joined_frames(clips, max(STRIP, len(clips)), SIDE)
        except VideoError as error:
            log.warning("frames of %s are not shown: %s", sample["id"], error)
            return None


class _Listing(Session):
    """A session that records which clips a benchmark asks about, and then stops it."""

    def __init__(self):
        super().__init__(None, batch=1)
        self.clips: dict[str, tuple[Footage, ...]] = {}

    def ask(self, asks: Sequence[Ask], *_: Any, **__: Any) -> Any:
        self.clips = {ask.id: ask.clips for ask in asks}
        raise _Done

    likelihoods = ask

    def leave_out(self, id: str, reason: str) -> None:
        """Does nothing: the evaluation reported the missing sample."""


class _Done(Exception):
    """Stops a benchmark once its clips are known."""


def _listed(result: Mapping[str, Any]) -> dict[str, tuple[Footage, ...]]:
    """Returns the clips of a result's benchmark by the ids of its asks; warns and returns none if they are missing."""
    name = result["benchmark"]
    if name not in BENCHMARKS:
        log.warning("%s is not a benchmark of this version: its clips are not shown", name)
        return {}
    listing = _Listing()
    try:
        config = EvaluationConfig.from_json(result["provenance"]["config"])
        benchmark_of(name).run(config, listing)
    except _Done:
        return listing.clips
    except (UserError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        log.warning("clips of %s are not shown: %s", name, error)
    return {}
