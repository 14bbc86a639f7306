"""Finds statements about a face that contradict CelebV-HQ's labels.

Only a plain contradiction counts: the text names a thing and says that it is present or absent. Regular expressions
find the words, so a subtle contradiction passes the checks; reviewers catch it in `review`.
"""

import re
from collections.abc import Iterable, Mapping

Labels = Mapping[str, tuple[str, ...]]  # group -> labels that are true of the clip; an empty group is unlabelled

THINGS = {
    "eyeglasses": r"(?:eye)?glasses|spectacles",
    "sunglasses": r"sunglasses",
    "wearing_hat": r"hat|cap|beanie|bonnet",
    "wearing_earrings": r"earrings?",
    "wearing_necklace": r"necklace",
    "wearing_necktie": r"neck ?tie|tie",
    "wearing_lipstick": r"lipstick",
    "wearing_mask": r"(?:face )?mask",
    "goatee": r"goatee",
    "mustache": r"mou?stache",
    "sideburns": r"sideburns",
    "bangs": r"bangs",
    "double_chin": r"double chin",
    "bald": r"bald",
}
# Labels that also justify the words of another label: sunglasses are glasses.
ALSO = {"eyeglasses": ("sunglasses",), "sunglasses": ("eyeglasses",), "mustache": ("goatee",), "goatee": ("mustache",)}
BEARD = r"beard(?:ed)?|goatee|mou?stache"
BEARDS = ("goatee", "mustache", "5_o_clock_shadow", "sideburns")
HAIR = {
    "black_hair": "black|jet-black|raven",
    "blonde_hair": "blonde?|golden",
    "gray_hair": "gr[ae]y|silver|white",
    "brown_hair": "brown|brunette|chestnut",
}
EMOTIONS = {
    "happy": r"happy|happiness|joy(?:ful)?|cheerful|delighted",
    "sadness": r"sad|sadness|sorrow(?:ful)?|gloomy",
    "anger": r"angry|anger|furious|rage",
    "fear": r"fear(?:ful)?|afraid|scared|terrified",
    "surprise": r"surprised?|astonished|amazed",
    "contempt": r"contempt(?:uous)?|scorn(?:ful)?",
    "disgust": r"disgust(?:ed)?",
    "neutral": r"neutral",
}
MALE, FEMALE = r"man|boy|he|his|him|gentleman", r"woman|girl|she|her|hers|lady"
NOT = r"(?:\b(?:no|not|without|never|neither|nor|lacks?|lacking|free of|rather than|instead of)\b|n't\b)"
BOUNDS = r"(?:and|but|with|wears|ha[sd]|he|she|while|who)\b"  # a negation ends before these words


def contradictions(text: str, labels: Labels) -> list[str]:
    """Returns the contradictions between `text` and the labels, one short sentence each."""
    found = []
    appearance, emotion = labels.get("appearance", ()), labels.get("emotion", ())
    if appearance:
        found += _things(text, appearance) + _hair(text, appearance) + _sex(text, appearance)
    named = {name for name, words in EMOTIONS.items() if True in says(text, words)}
    if emotion and named and not named & set(emotion):
        found.append(f"it says {_listed(named)}, and the labels say {_listed(emotion)}")
    return found


def pair_contradictions(question: str, answer: str, labels: Labels) -> list[str]:
    """Returns the contradictions between a pair and the labels. A yes or no applies to the words of the question."""
    start = re.match(r"\s*(yes|no)\b", answer, re.IGNORECASE)
    if not start or re.search(r"\bor\b", question):
        return contradictions(answer, labels)
    asked = re.sub(NOT, " ", question, flags=re.IGNORECASE)
    claim = asked if start[1].lower() == "yes" else re.sub(r"(\w+)", r"no \1", asked)
    return list(dict.fromkeys(contradictions(claim, labels) + contradictions(answer[start.end() :], labels)))


def sex(appearance: Iterable[str]) -> str | None:
    """Returns man or woman according to the labels; None without labels, and for a beard without male."""
    if "male" in appearance:
        return "man"
    return "woman" if appearance and not set(BEARDS) & set(appearance) else None


def says(text: str, words: str) -> set[bool]:
    """Returns whether a text asserts `words` (True), denies them (False), or both. A negation reaches six words."""
    pattern = rf"(?P<no>{NOT}(?: +(?!{BOUNDS})[\w'-]+){{0,5}}? +)?(?<![\w-])(?:{words})\b(?![- ]free)"
    return {match["no"] is None for match in re.finditer(pattern, text, re.IGNORECASE)}


def _things(text: str, appearance: Iterable[str]) -> list[str]:
    found = []
    for label, words in THINGS.items():
        asserted, holds = says(text, words), label in appearance
        excused = holds or any(other in appearance for other in ALSO.get(label, ()))
        if True in asserted and not excused:
            found.append(f"it says {_plain(label)}, and the labels deny it")
        if asserted == {False} and holds:
            found.append(f"it denies {_plain(label)}, and the labels say so")
    if "no_beard" in appearance and True in says(text, BEARD) and not set(BEARDS) & set(appearance):
        found.append("it says beard, and the labels say no beard")
    return found


def _hair(text: str, appearance: Iterable[str]) -> list[str]:
    right = {label for label in HAIR if label in appearance}
    described = r"(?:[\w'-]+,? ){0,3}?hair(?:ed)?"
    named = {label for label, words in HAIR.items() if True in says(text, rf"(?:{words})(?:-|,? ){described}")}
    if right and named and not named & right:
        return [f"it says {_listed(named)}, and the labels say {_listed(right)}"]
    return []


def _sex(text: str, appearance: Iterable[str]) -> list[str]:
    """Reports only texts whose words are all of one sex, since a text may mention a second person."""
    if sex(appearance) is None:
        return []
    male, female = (bool(re.search(rf"\b(?:{words})\b", text, re.IGNORECASE)) for words in (MALE, FEMALE))
    if male == female or male == (sex(appearance) == "man"):
        return []
    return [f"it speaks of a {'man' if male else 'woman'}, and the labels say otherwise"]


def _plain(label: str) -> str:
    return label.removeprefix("wearing_").replace("_", " ")


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(sorted(map(_plain, labels)))
