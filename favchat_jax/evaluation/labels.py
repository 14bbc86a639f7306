"""Reads a class from a free-text answer: the emotion that it names, or whether it says that two faces are the same.

Synonyms count as names, and negated names do not: "not happy" names no emotion, "not happy but sad" names sadness. An
answer with one emotion has that class. An answer with several has the class after a phrase such as "the answer is" or
"mainly", and no class without such a phrase.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence

from favchat_jax.data.reasoning import answer_of

# Words and phrases that name each emotion. Signs of an emotion, such as smiles and tears, do not count.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "happiness": (
        *("happy", "happily", "happiness", "happier", "joy", "joyful", "joyous", "glad", "cheerful", "delighted"),
        *("delight", "elated", "pleased", "amused", "amusement"),
    ),
    "sadness": (
        *("sad", "sadly", "sadness", "sorrow", "sorrowful", "unhappy", "grief", "grieving", "depressed", "gloomy"),
        *("heartbroken", "melancholy", "melancholic", "miserable"),
    ),
    "neutral": (
        *("neutral", "neutrality", "calm", "expressionless", "emotionless", "no emotion", "no expression", "composed"),
        *("no particular emotion", "no strong emotion", "no obvious emotion", "no clear emotion", "impassive"),
    ),
    "anger": (
        *("angry", "angrily", "anger", "angered", "furious", "fury", "rage", "enraged", "irritated", "irritation"),
        "mad",
    ),
    "surprise": (
        *("surprise", "surprised", "surprising", "astonished", "astonishment", "amazed", "amazement"),
        *("shocked", "shock", "startled", "stunned"),
    ),
    "disgust": ("disgust", "disgusted", "disgusting", "revulsion", "repulsed", "repulsion", "loathing", "distaste"),
    "fear": (
        *("fear", "fearful", "afraid", "scared", "frightened", "fright", "terrified", "terror", "horrified", "horror"),
        "panic",
    ),
    "contempt": ("contempt", "contemptuous", "scorn", "scornful", "disdain", "disdainful", "despise"),
    "anxiety": (
        *("anxiety", "anxious", "anxiously", "worried", "worry", "nervous", "nervousness", "uneasy", "apprehensive"),
    ),
    "helplessness": ("helpless", "helplessness", "helplessly", "powerless", "hopeless", "hopelessness", "desperate"),
    "disappointment": ("disappointed", "disappointment", "disappointing", "let down", "dismayed", "dismay"),
}

NEGATIONS = (
    *("not", "no", "never", "without", "neither", "nor", "cannot", "hardly", "barely", "isn't", "doesn't", "don't"),
    *("aren't", "wasn't", "didn't", "rather than", "instead of", "lack of", "free of", "absence of", "lacks"),
)
# A negation reaches to the end of its clause: a punctuation mark or a conjunction.
CLAUSE_ENDS = r"[.,;:!?\n()]|\b(?:but|and|however|although|though|yet)\b"
DECISIONS = (
    *("answer is", "answer:", "emotion is", "emotion:", "label is", "label:", "mainly", "primarily", "mostly"),
    *("predominantly", "most likely", "overall", "in conclusion", "therefore"),
)
SAME = ("same person", "same individual", "same man", "same woman", "same identity", "same face", "identical person")
DIFFERENT = (
    *("different people", "different persons", "different person", "different individuals", "different individual"),
    *("two people", "different identities", "different men", "different women", "two individuals"),
)


def decide(text: str, names: Mapping[str, Sequence[str]]) -> str | None:
    """Returns the class of an answer, or None if it names no class, or several without a decision.

    Args:
        text: the answer.
        names: class -> words and phrases that name it.
    """
    text = _plain(answer_of(text))
    mentions = [(place, label) for place, label, negated in _mentions(text, names) if not negated]
    labels = {label for _, label in mentions}
    if len(labels) > 1:
        decision = max(text.rfind(phrase) for phrase in DECISIONS)
        labels = {label for place, label in mentions if 0 <= decision <= place}
    return labels.pop() if len(labels) == 1 else None


def emotion_names(classes: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Returns the words for each class of a data set; `classes` maps a class to its emotion in `SYNONYMS`."""
    return {label: (label, *SYNONYMS[emotion]) for label, emotion in classes.items()}


def says_same(text: str) -> bool | None:
    """Returns whether an answer says that two faces are the same person's, or None if it does not decide."""
    text = _plain(answer_of(text))
    first = re.match(r"\W*(yes|no|true|false|same|different)\b", text)
    if first:
        return first.group(1) in ("yes", "true", "same")
    mentions = _mentions(text, {"same": SAME, "different": DIFFERENT})
    verdicts = {(label == "same") != negated for _, label, negated in mentions}
    return verdicts.pop() if len(verdicts) == 1 else None


def _plain(text: str) -> str:
    """Normalises a text: NFKC, lower case, straight apostrophes, single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("’", "'").split())


def _mentions(text: str, names: Mapping[str, Sequence[str]]) -> list[tuple[int, str, bool]]:
    """Returns (place, class, is negated) of each name in a text; of overlapping names, the longest counts."""
    pairs = {_plain(name): label for label, group in names.items() for name in group}
    longest_first = sorted(pairs, key=len, reverse=True)
    pattern = r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b"
    return [(m.start(), pairs[m.group()], _negated(text, m.start())) for m in re.finditer(pattern, text)]


def _negated(text: str, place: int) -> bool:
    before = text[:place].replace("not only", "").replace("no doubt", "")
    clause = re.split(CLAUSE_ENDS, before)[-1]
    return re.search(r"\b(?:" + "|".join(NEGATIONS) + r")\b", clause) is not None
