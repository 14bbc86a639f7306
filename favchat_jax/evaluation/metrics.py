"""Computes metrics of answers, each by a pure function. Figures over many samples have 95 % bootstrap intervals."""

import collections
import re
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from sklearn.metrics import confusion_matrix, roc_curve

from favchat_jax.evaluation.result import Figure, figure

DRAWS = 1000  # per bootstrap


def normalise(text: str) -> str:
    """Lower-cases a text and removes punctuation, articles and extra blanks, so that equal answers compare equal."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def exact_matches(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Compares each prediction with its reference; both are normalised first."""
    return [normalise(p) == normalise(r) for p, r in zip(predictions, references, strict=True)]


def accuracy_by_kind(hits: Sequence[bool], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns n and accuracy (share of hits) for each kind of question, in alphabetical order."""
    groups = collections.defaultdict(list)
    for hit, kind in zip(hits, kinds, strict=True):
        groups[kind].append(hit)
    return {kind: {"n": len(group), "accuracy": sum(group) / len(group)} for kind, group in sorted(groups.items())}


def majority_baseline(references: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """Returns for each kind the accuracy of always giving its most frequent answer."""
    groups = collections.defaultdict(collections.Counter)
    for reference, kind in zip(references, kinds, strict=True):
        groups[kind][normalise(reference)] += 1
    return {kind: max(counts.values()) / counts.total() for kind, counts in sorted(groups.items())}


def cohens_d(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns the difference of two samples' means over their pooled standard deviation; infinite if neither varies."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    squares = np.sum((one - one.mean()) ** 2) + np.sum((other - other.mean()) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float((one.mean() - other.mean()) / np.sqrt(squares / (len(one) + len(other) - 2)))


def confusion(expected: Sequence[int], predicted: Sequence[int | None], classes: int) -> Int[np.ndarray, "K K+1"]:
    """Counts how often each class (row) was predicted as each (column); the last column counts missing predictions."""
    columns = [classes if label is None else label for label in predicted]
    if not columns:
        return np.zeros((classes, classes + 1), int)
    return confusion_matrix(expected, columns, labels=range(classes + 1))[:classes]


def war(counts: Int[np.ndarray, "*D K K+1"]) -> Float[np.ndarray, "*D"]:
    """Returns the weighted average recall: the share of correct samples."""
    with np.errstate(invalid="ignore"):
        return np.trace(counts, axis1=-2, axis2=-1) / counts.sum((-2, -1))


def uar(counts: Int[np.ndarray, "*D K K+1"]) -> Float[np.ndarray, "*D"]:
    """Returns the unweighted average recall: the mean recall of the classes that have samples."""
    of_class = counts.sum(-1)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore"):
        return (hits / np.maximum(of_class, 1)).sum(-1) / (of_class > 0).sum(-1)


def resampled(counts: Int[np.ndarray, "K K+1"], seed: int, draws: int = DRAWS) -> Int[np.ndarray, "D K K+1"]:
    """Draws the confusion matrices of bootstrap samples; drawing samples with replacement amounts to drawing cells."""
    if not counts.sum():
        return np.broadcast_to(counts, (draws, *counts.shape))
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts.ravel() / counts.sum(), draws)
    return drawn.reshape(draws, *counts.shape)


def recall_figures(folds: Sequence[Int[np.ndarray, "K K+1"]], seed: int) -> dict[str, Figure]:
    """Returns UAR and WAR averaged over the folds' confusion matrices, each with its 95 % interval."""
    folds = [counts for counts in folds if counts.sum()]
    drawn = [resampled(counts, seed + i) for i, counts in enumerate(folds)]
    found = {}
    for name, measure in (("uar", uar), ("war", war)):
        value = np.mean([measure(counts) for counts in folds]) if folds else np.nan
        found[name] = figure(value, *_interval([measure(d) for d in drawn]), scale=100)
    return found


def mean_figure(
    values: Sequence[float], seed: int, scale: int = 1, clusters: Sequence[Hashable] | None = None
) -> Figure:
    """Returns the mean of a score over samples with its 95 % interval.

    Samples of one cluster, such as the questions about one clip, are drawn together since they are not independent.
    """
    values = np.asarray(values, np.float64)
    if clusters is None:
        return statistic_figure(lambda picked: values[picked].mean(-1), len(values), seed, scale)
    places = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    members = [places[cluster] for cluster in clusters]
    sums, sizes = np.bincount(members, values, len(places)), np.bincount(members, minlength=len(places))
    return statistic_figure(lambda picked: sums[picked].sum(-1) / sizes[picked].sum(-1), len(places), seed, scale)


def statistic_figure(
    statistic: Callable[[Int[np.ndarray, "D n"]], Float[np.ndarray, " D"]], n: int, seed: int, scale: int = 1
) -> Figure:
    """Returns a figure over n samples with its 95 % interval; `statistic` takes the sample indices of each draw."""
    if not n:
        return figure(np.nan, scale=scale)
    rng = np.random.default_rng(seed)
    parts = [statistic(rng.integers(0, n, (part, n))) for part in _parts(DRAWS, n)]
    return figure(statistic(np.arange(n)[None])[0], *_interval([np.concatenate(parts)]), scale=scale)


def _parts(draws: int, n: int) -> list[int]:
    """Splits the draws into parts of about 2 million indices each, so that memory does not grow with n."""
    most = max(1, 2_000_000 // n)
    return [most] * (draws // most) + ([draws % most] if draws % most else [])


def _interval(draws: Sequence[Float[np.ndarray, " D"]]) -> tuple[float, float]:
    mean = np.mean(draws, axis=0) if len(draws) else np.array([np.nan])
    mean = mean[np.isfinite(mean)]  # a draw may hold no sample of the class or kind that is measured
    return tuple(np.percentile(mean, (2.5, 97.5))) if len(mean) else (np.nan, np.nan)


def words(text: str) -> list[str]:
    """Splits a caption into words as the Penn Treebank does, in lower case and without punctuation.

    Contractions are split ("don't" gives "do n't") and compounds kept ("middle-aged" is one word).
    """
    parted = re.sub(r"(\w)(n't)\b", r"\1 \2", text.lower().replace("’", "'"))
    return re.findall(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*", parted)


def rouge_l(answer: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> float:
    """Returns ROUGE-L of a tokenised answer (Lin, 2004): the F measure of the longest common subsequence.

    As in pycocoevalcap, precision and recall are each the best over the references.
    """
    answer, references = answer or [""], [reference or [""] for reference in references]
    common = [_longest_common_subsequence(answer, reference) for reference in references]
    precision = max(common) / len(answer)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for j, against in enumerate(other, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == against else max(row[j], row[j - 1])
    return row[-1]


def cider(
    answers: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], sigma: float = 6.0
) -> list[float]:
    """Returns CIDEr-D of each tokenised answer (Vedantam et al., 2015), as in pycocoevalcap; the mean is the corpus's.

    The score is 10 times the mean cosine between tf-idf vectors, over n-gram orders 1 to 4 and references. Counts are
    clipped to the reference's, and cosines are damped by the difference in length. The idf weights come from the
    references of all samples.
    """
    counted = [[_ngrams(reference) for reference in group] for group in references]
    documents = collections.Counter(ngram for group in counted for ngram in set().union(*group))
    total = np.log(len(references)) if references else 0.0

    def vectors(ngrams: collections.Counter) -> list[dict[tuple[str, ...], float]]:
        orders: list[dict] = [{}, {}, {}, {}]
        for ngram, count in ngrams.items():
            orders[len(ngram) - 1][ngram] = count * (total - np.log(max(1.0, documents[ngram])))
        return orders

    def length(ngrams: collections.Counter) -> int:
        """Returns the number of bigrams, by which pycocoevalcap measures length."""
        return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)

    scores = []
    for answer, group in zip(answers, counted, strict=True):
        candidate = _ngrams(answer)
        ours, cosines = vectors(candidate), []
        for reference in group:
            delta = length(candidate) - length(reference)
            damping = np.exp(-(delta**2) / (2 * sigma**2))
            cosines.append(damping * np.mean([_cosine(*pair) for pair in zip(ours, vectors(reference), strict=True)]))
        scores.append(10 * float(np.mean(cosines)))
    return scores


def _ngrams(tokens: Sequence[str]) -> collections.Counter:
    return collections.Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


def _cosine(ours: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    dot = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs)
    norm = np.sqrt(sum(x * x for x in ours.values()) * sum(x * x for x in theirs.values()))
    return dot / norm if norm else 0.0


def event_figures(
    recalled: Sequence[Sequence[bool]], supported: Sequence[Sequence[bool]], seed: int
) -> dict[str, Figure]:
    """Returns AutoDQ (Tarsier, Wang et al., 2024) from verdicts on events, one list per sample.

    Args:
        recalled: whether each event of the reference follows from the answer; their share is the sample's recall.
        supported: whether each event of the answer follows from the reference; their share is its precision. An answer
            without events has a precision of 0; a reference without events does not count towards recall.
        seed: seed of the bootstrap.
    """
    recall = np.array([np.mean(events) if len(events) else np.nan for events in recalled])
    precision = np.array([np.mean(events) if len(events) else 0.0 for events in supported])

    def f1(picked):
        # The F1 of mean precision and mean recall, as in Tarsier.
        counted = np.isfinite(recall[picked]).sum(-1)
        p, r = precision[picked].mean(-1), np.nansum(recall[picked], -1) / np.maximum(counted, 1)
        return 2 * p * r / np.where(p + r > 0, p + r, 1)

    return {
        "autodq": statistic_figure(f1, len(recall), seed),
        "autodq_recall": mean_figure(recall[np.isfinite(recall)], seed),
        "autodq_precision": mean_figure(precision, seed),
    }


def auc(same: Bool[np.ndarray, "*D n"], scores: Float[np.ndarray, "*D n"]) -> Float[np.ndarray, "*D"]:
    """Returns the area under the ROC curve: how often a pair of one person scores higher than a pair of two people."""
    ranks = rankdata(scores, axis=-1)
    yes = same.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return ((ranks * same).sum(-1) - yes * (yes + 1) / 2) / (yes * (same.shape[-1] - yes))


def roc(same: Sequence[bool], scores: Sequence[float]) -> dict[str, object]:
    """Returns the ROC curve of a score that should be higher for pairs of the same person; empty for one class only."""
    x, y = ([], []) if len(set(same)) < 2 else (axis.tolist() for axis in roc_curve(same, scores)[:2])
    return {"x": x, "y": y, "x_label": "false positive rate", "y_label": "true positive rate"}
