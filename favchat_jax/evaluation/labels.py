"""From free text to classes: which emotions an answer names, with synonyms and negation, and whether it says yes.

An answer decides for a class where it names one alone. "Not happy" names none, "not happy but sad" sadness. Where it
names several, a phrase that announces the decision ("the answer is", "mainly") settles it; else it decides for none.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence

from favchat_jax.data.reasoning import answer_of

# Words and phrases for each emotion. Signs of one (smiles, tears) are not its names.
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
# A negation reaches to the end of its clause: to a stop, or to a word that turns the sentence.
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


def named(text: str, names: Mapping[str, Sequence[str]]) -> list[str]:
    """The classes that a text names and does not deny, in the order of their first mention.

    Args:
        text: an answer.
        names: words and phrases of each class.
    """
    return list(dict.fromkeys(label for _, label, denied in _mentions(_plain(text), names) if not denied))


def decide(text: str, names: Mapping[str, Sequence[str]]) -> str | None:
    """The one class that an answer decides for, or None where it names none, or several without deciding."""
    text = _plain(answer_of(text))
    mentions = [(place, label) for place, label, denied in _mentions(text, names) if not denied]
    labels = list(dict.fromkeys(label for _, label in mentions))
    if len(labels) < 2:
        return labels[0] if labels else None
    announced = max((text.rfind(phrase) for phrase in DECISIONS), default=-1)
    after = list(dict.fromkeys(label for place, label in mentions if 0 <= announced <= place))
    return after[0] if len(after) == 1 else None


def emotion_names(classes: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Words for each class of a data set; `classes` gives the emotion of `SYNONYMS` that each class means."""
    return {label: (label, *SYNONYMS[emotion]) for label, emotion in classes.items()}


def says_same(text: str) -> bool | None:
    """Whether an answer holds two faces for the same person's; None where it does not say."""
    text = _plain(answer_of(text))
    first = re.match(r"\W*(yes|no|true|false|same|different)\b", text)
    if first:
        return first.group(1) in ("yes", "true", "same")
    said = {label == "same" for label, denied in _verdicts(text) if not denied}
    said |= {label != "same" for label, denied in _verdicts(text) if denied}
    return said.pop() if len(said) == 1 else None


def _verdicts(text: str) -> list[tuple[str, bool]]:
    found = _mentions(text, {"same": SAME, "different": DIFFERENT})
    return [(label, denied) for _, label, denied in found]


def _plain(text: str) -> str:
    """Lower case, compatible characters made one, typographic apostrophes straight, blanks single."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("’", "'").split())


def _mentions(text: str, names: Mapping[str, Sequence[str]]) -> list[tuple[int, str, bool]]:
    """Place, class and whether it is denied, of each name in a text; of overlapping names the longest counts."""
    pairs = {_plain(name): label for label, group in names.items() for name in group}
    longest_first = sorted(pairs, key=len, reverse=True)
    pattern = r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b"
    return [(m.start(), pairs[m.group()], _denied(text, m.start())) for m in re.finditer(pattern, text)]


def _denied(text: str, place: int) -> bool:
    before = text[:place].replace("not only", "").replace("no doubt", "")
    clause = re.split(CLAUSE_ENDS, before)[-1]
    return re.search(r"\b(?:" + "|".join(NEGATIONS) + r")\b", clause) is not None
