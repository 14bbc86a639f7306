"""Reads a class from a free-text answer: the emotion that it names, or whether it says that two faces are the same.

Synonyms count as names; signs of an emotion, such as smiles and tears, do not. `clauses.py` weighs each mention. The
label of the heaviest ones is the answer's class; an answer without any, or with several of equal weight, has none.
"""

from collections.abc import Mapping

from favchat_jax.data.reasoning import answer_of
from favchat_jax.evaluation.clauses import Mention, Weight, mentions
from favchat_jax.evaluation.phrases import plain, words

# Words and phrases that name each emotion. Signs of an emotion, such as smiles and tears, do not count.
SYNONYMS: dict[str, tuple[str, ...]] = {
    emotion: tuple(" ".join(names.split()).split(", "))
    for emotion, names in {
        "happiness": """
            happy, happily, happiness, happier, happiest, joy, joyful, joyfully, joyous, overjoyed, glad, gladness,
            cheer, cheerful, cheerfully, cheery, delight, delighted, elated, elation, pleased, pleasure, amused,
            amusement, ecstatic, euphoric, euphoria, thrilled, jubilant, gleeful, glee, merry, jolly, jovial, mirth,
            excited, excitement, contented, contentment, satisfied, blissful, bliss, upbeat, good mood, high spirits,
            is content, looks content, seems content, appears content
        """,
        "sadness": """
            sad, sadly, sadness, sadder, saddest, saddened, sorrow, sorrowful, unhappy, unhappiness, grief, grieving,
            grieves, depressed, depression, gloomy, gloom, glum, heartbroken, melancholy, melancholic, miserable,
            misery, mournful, mourning, dejected, dejection, despondent, forlorn, downhearted, somber, sombre,
            devastated, anguish, anguished, low spirits, heartache
        """,
        "neutral": """
            neutral, neutrality, calm(?! (?:down|him|her|them)(?:self|selves)?), calmly, calmness, expressionless,
            emotionless, unemotional, composed, composure, impassive, indifferent, indifference, blank(?!
            (?:wall|background|screen|page)), deadpan, poker face, poker faced, stoic, placid, unmoved,
            dispassionate, matter of fact, flat affect, straight face, resting face
        """,
        "anger": """
            angry, angrily, anger, angered, angrier, furious, furiously, fury, rage, raging, enraged, irritated,
            irritation, mad, annoyed, annoyance, infuriated, livid, irate, outraged, outrage, fuming, seething,
            wrath, incensed, indignant, indignation, resentful, resentment, exasperated, exasperation, hostile,
            hostility, pissed, pissed off
        """,
        "surprise": """
            surprise, surprised, surprising, astonished, astonishment, amazed, amazement, shocked, shock, startled,
            stunned, astounded, dumbfounded, flabbergasted, taken aback, caught off guard
        """,
        "disgust": """
            disgust, disgusted, disgusting, revulsion, revolted, repulsed, repulsion, repelled, loathing, distaste,
            sickened, nauseated, grossed out, aversion, repugnance, abhorrence
        """,
        "fear": """
            fear, fearful, fearfully, afraid, scared, frightened, fright, terrified, terror, horrified, horror,
            panic, panicked, panicking, panicky, petrified, dread, alarmed, spooked
        """,
        "contempt": """
            contempt, contemptuous, contemptuously, scorn, scornful, disdain, disdainful, despise, despises,
            derision, derisive, condescending, condescension, looks down on, looking down on
        """,
        "anxiety": """
            anxiety, anxious, anxiously, worried, worry, worrying, worries, nervous, nervously, nervousness, uneasy,
            unease, uneasiness, apprehensive, apprehension, concerned, on edge, jittery
        """,
        "helplessness": """
            helpless, helplessness, helplessly, powerless, powerlessness, hopeless, hopelessness, desperate,
            desperation, despair
        """,
        "disappointment": """
            disappointed, disappointment, disappointing, let down, letdown, dismayed, dismay, disheartened,
            disillusioned, discouraged, crestfallen, dissatisfied, dissatisfaction
        """,
    }.items()
}
# "shows no particular emotion" names the neutral class, "no emotion of anger" and "no other emotion" do not.
NO_EMOTION = (
    r"(?:no|not (?:\w+ ){0,3}?any|(?:without|lack(?:s|ing)?(?: of)?|devoid of|absence of)(?: any)?|little(?: to no)?|"
    r"(?:hardly|barely) any) (?:(?!other|these|those|the|single|one|dominant|further|more|additional|such|identif|"
    r"determin|recogni|judge|assess)\w+ ){0,4}?(?:emotions?|expression|feelings?|affect)"
    r"(?! (?:of|is|are|dominates|can|could|other|except|besides|label)\b)"
)


def emotion_names(classes: Mapping[str, str]) -> dict[str, str]:
    """Returns a pattern of each class's names in a data set; `classes` maps a class to its emotion in `SYNONYMS`."""
    others = {"neutral": (NO_EMOTION,)}
    return {
        label: "|".join((label, *SYNONYMS[emotion], *others.get(emotion, ()))) for label, emotion in classes.items()
    }


def decide(text: str, names: Mapping[str, str]) -> str | None:
    """Returns the class of an answer, or None if it names no class, or several of equal weight.

    Args:
        text: the answer.
        names: class -> pattern of the words that name it, see `emotion_names`.
    """
    return _heaviest(emotion_mentions(text, names), Weight.SLIGHT)


def emotion_mentions(text: str, names: Mapping[str, str]) -> list[Mention]:
    """Returns the mentions of classes in an answer; see `decide`."""
    pattern = words("|".join(f"(?P<label{number}>{name})" for number, name in enumerate(names.values())))
    labels = list(names)

    def find(clause: str, key: str) -> list[tuple[int, int, str]]:
        return [(m.start(), m.end(), labels[int(m.lastgroup[5:])]) for m in pattern.finditer(clause)]

    return mentions(plain(answer_of(text)), find)


PERSON = (
    "persons?|people|individuals?|m[ae]n|wom[ae]n|guys?|girls?|boys?|lad(?:y|ies)|gentlem[ae]n|actors?|actress(?:es)?|"
    "subjects?|humans?|characters?|identit(?:y|ies)|faces?|child|children|kids?|speakers?|celebrit(?:y|ies)|persona"
)
# What two clips of one person may differ in, and two people may share.
TRAIT = (
    r"hair\w*|noses?|eyes?|brows?|eyebrows?|jaws?|jawlines?|chins?|mouths?|lips?|ears?|skin|tones?|complexions?|foreheads?|"
    r"cheeks?|cheekbones?|beards?|m(?:o)?ustaches?|glasses|cloth\w+|outfits?|shirts?|jackets?|hats?|makeup|lighting|light|"
    r"backgrounds?|settings?|scenes?|angles?|poses?|cameras?|quality|resolution|expressions?|ages?|gender|sex|ethnicity|race|"
    r"build|height|weight|structures?|shapes?|features?|proportions?|moles?|scars?|tattoos?|voices?|earrings?|styles?|"
    r"colou?rs?|appearances?|teeth|smiles?|wrinkles?|accessories"
)
FOOTAGE = r"videos?|clips?|footage|shots?|photos?|pictures?|images?|segments?|halves|parts?|recordings?|frames?"
IN_FOOTAGE = words(rf"(?:in|from|of|across) (?:\w+ ){{0,3}}(?:{FOOTAGE})")
_GAP = rf"(?:(?!(?:of|as|from|than|in|on|to|the|for|with|,|{TRAIT}|{FOOTAGE}) )\w+ ){{0,2}}"
_PREDICATE = r"(?= (?:,|from|than|in|across|as|to|here|too|throughout|enough|for|by)(?: |$)|$)"  # no noun follows
# Names of "same" and "different" that speak of people, and those that do unless their clause speaks of a trait.
IDENTITY = {
    "same": rf"(?:same|identical) {_GAP}(?:{PERSON})|one and the same|(?:is|are) (?:him|her)(?= again| in both|$)|"
    rf"(?:(?<=not )|(?:a|just|only|of|to|shows?|is|are) )(?:one|single) {_GAP}(?:{PERSON})|"
    rf"^(?:one|a single) (?:{PERSON})(?=$)|"
    rf"(?:(?<=is )|(?<=not ))the (?:{PERSON}|one) (?:\w+ ){{0,2}}(?:in|from) the (?:second|first|other)(?: \w+)?(?=$)",
    "different": rf"(?:different|distinct|separate|another|unrelated) {_GAP}(?:{PERSON})|(?:some(?:one|body)) else|"
    rf"(?<!the )(?<!these )(?<!those )(?<!both )two (?:people|persons|individuals|men|women|guys|girls|boys|ladies)",
}
LIKENESS = {
    "same": rf"(?:same|identical){_PREDICATE}|match(?:es|ing)?",
    "different": rf"(?:different|distinct){_PREDICATE}|differ|mismatch",
}


def says_same(text: str) -> bool | None:
    """Returns whether an answer says that two faces are the same person's, or None if it does not decide."""
    verdict = _heaviest(mentions(plain(answer_of(text)), _identities, ("same", "different")), Weight.SAID)
    return None if verdict is None else verdict == "same"


def _identities(clause: str, key: str) -> list[tuple[int, int, str]]:
    found = [(m.start(), m.end(), label) for label, name in IDENTITY.items() for m in words(name).finditer(clause)]
    if not found and not words(TRAIT, FOOTAGE).search(IN_FOOTAGE.sub("", f"{key} {clause}")):
        found = [(m.start(), m.end(), label) for label, name in LIKENESS.items() for m in words(name).finditer(clause)]
    return sorted(found)


def _heaviest(found: list[Mention], least: Weight) -> str | None:
    """Returns the label of the heaviest mentions that are not denied; None for several labels, or for a light one."""
    said = [mention for mention in found if not mention.denied and mention.weight >= least]
    most = max((mention.weight for mention in said), default=None)
    labels = {mention.label for mention in said if mention.weight == most}
    return labels.pop() if len(labels) == 1 else None
