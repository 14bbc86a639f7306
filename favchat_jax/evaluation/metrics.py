"""Figures of merit, each a pure function of answers."""

import collections
import re
from collections.abc import Sequence

import numpy as np


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks, so that wording of equal content is equal."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def exact_matches(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each prediction equals its reference once both are normalised."""
    return [normalise(p) == normalise(r) for p, r in zip(predictions, references, strict=True)]


def accuracy_by_kind(hits: Sequence[bool], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each kind of question, in alphabetical order: n, and the share of hits as accuracy."""
    groups = collections.defaultdict(list)
    for hit, kind in zip(hits, kinds, strict=True):
        groups[kind].append(hit)
    return {kind: {"n": len(group), "accuracy": sum(group) / len(group)} for kind, group in sorted(groups.items())}


def majority_baseline(references: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """For each kind, the accuracy of always giving its commonest answer."""
    groups = collections.defaultdict(collections.Counter)
    for reference, kind in zip(references, kinds, strict=True):
        groups[kind][normalise(reference)] += 1
    return {kind: max(counts.values()) / counts.total() for kind, counts in sorted(groups.items())}


def cohens_d(one: Sequence[float], other: Sequence[float]) -> float:
    """Difference of the means of two samples over their pooled standard deviation; infinite where neither varies."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    squares = np.sum((one - one.mean()) ** 2) + np.sum((other - other.mean()) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float((one.mean() - other.mean()) / np.sqrt(squares / (len(one) + len(other) - 2)))
