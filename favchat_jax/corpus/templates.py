"""Writes summaries and questions from labels alone, without an endpoint.

The wording varies between clips, but is the same in every run. The text states only the labels, so a clip without
labels gets no text.
"""

import hashlib
import json
from collections.abc import Sequence

from favchat_jax.corpus.annotations import Annotation
from favchat_jax.corpus.claims import BEARDS, Labels, sex
from favchat_jax.corpus.describe import VERSION, Clip, Unannotated, clip_key
from favchat_jax.data.record import Question

HAIR_COLORS = {"black_hair": "black", "blonde_hair": "blonde", "gray_hair": "gray", "brown_hair": "brown"}
HAIR_SHAPES = {"straight_hair": "straight", "wavy_hair": "wavy"}
FEATURES = {
    "pale_skin": "pale skin",
    "rosy_cheeks": "rosy cheeks",
    "oval_face": "an oval face",
    "chubby": "a full face",
    "receding_hairline": "a receding hairline",
    "bangs": "bangs",
    "arched_eyebrows": "arched eyebrows",
    "bushy_eyebrows": "bushy eyebrows",
    "bags_under_eyes": "bags under the eyes",
    "narrow_eyes": "narrow eyes",
    "big_nose": "a big nose",
    "pointy_nose": "a pointy nose",
    "high_cheekbones": "high cheekbones",
    "big_lips": "full lips",
    "double_chin": "a double chin",
    "5_o_clock_shadow": "stubble",
    "goatee": "a goatee",
    "mustache": "a mustache",
    "sideburns": "sideburns",
    "no_beard": "no beard",
}
WORN = {
    "eyeglasses": "eyeglasses",
    "sunglasses": "sunglasses",
    "wearing_hat": "a hat",
    "wearing_mask": "a mask",
    "wearing_earrings": "earrings",
    "wearing_necklace": "a necklace",
    "wearing_necktie": "a necktie",
    "wearing_lipstick": "lipstick",
    "heavy_makeup": "heavy makeup",
}
WORDS = {"man": ("he", "his"), "woman": ("she", "her"), "person": ("the person", "the person's")}
DOING = {
    "chew": "chewing",
    "close_eyes": "closing the eyes",
    "cry": "crying",
    "drink": "drinking",
    "eat": "eating",
    "gaze": "gazing",
    "glare": "glaring",
    "head_wagging": "wagging the head",
    "listen_to_music": "listening to music",
    "look_around": "looking around",
    "make_a_face": "making a face",
    "nod": "nodding",
    "play_instrument": "playing an instrument",
    "shake_head": "shaking the head",
    "smile": "smiling",
    "smoke": "smoking",
    "sneeze": "sneezing",
    "wink": "winking",
}
FEELING = {
    "neutral": "calm",
    "happy": "happy",
    "sadness": "sad",
    "anger": "angry",
    "fear": "afraid",
    "surprise": "surprised",
    "contempt": "contemptuous",
    "disgust": "disgusted",
}


class TemplateWriter:
    """Writes annotations from labels; each refused text makes it choose other words."""

    def write(self, clip: Clip, refused: Sequence[str] = ()) -> Annotation:
        """Writes one clip's annotation.

        Raises:
          Unannotated: the clip has no labels.
        """
        if not any(clip.labels.values()):
            raise Unannotated("the clip has no labels, and templates write from labels alone: use --backend=openai")
        words = _Words(clip, len(refused))
        return Annotation(
            id=clip.id,
            key=clip_key(clip, "template", ""),
            backend="template",
            model="",
            prompts=VERSION,
            features={group: list(names) for group, names in clip.labels.items()},
            summary=words.summary(),
            questions=tuple(words.questions()[:4]),
            attempts=1,
            problems=(),
        )


class _Words:
    """Writes the texts about one clip's labels, in words that the clip determines."""

    def __init__(self, clip: Clip, variant: int):
        labels: Labels = clip.labels
        self._seed = f"{clip.digest} {variant}"
        self._appearance = set(labels.get("appearance", ()))
        self._doing = [DOING.get(name, f"{name}ing") for name in labels.get("action", ())]
        self._feeling = [FEELING[name] for name in labels.get("emotion", ())]
        self._noun = sex(self._appearance) or "person"
        self._who = f"a {'young ' if 'young' in self._appearance else ''}{self._noun}"
        self._they, self._their = WORDS[self._noun]

    def summary(self) -> str:
        """Returns one short paragraph: looks, accessories, actions, feelings."""
        hair = self._hair()
        features = [*([hair] if hair else []), *self._chosen(FEATURES)]
        with_these = f" with {_listed(features)}" if features else ""
        wordings = ["{who}{x} is seen", "the video shows {who}{x}", "{who}{x} is in front of the camera"]
        sentences = [self._pick("look", wordings, x=with_these)]
        if worn := self._chosen(WORN):
            sentences.append(self._pick("worn", ["{they} wears {x}", "{they} has {x} on"], x=_listed(worn)))
        if self._doing:
            wordings = ["{they} is {x}", "in the video {they} is {x}", "{they} can be seen {x}"]
            sentences.append(self._pick("deed", wordings, x=_listed(self._doing)))
        if self._feeling:
            wordings = ["{they} looks {x}", "{their} face looks {x}", "{their} expression is {x}"]
            sentences.append(self._pick("mood", wordings, x=_listed(self._feeling)))
        return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)

    def questions(self) -> list[Question]:
        """Returns all questions that the labels answer: emotion, motion, then looks in an order set by the clip."""
        pairs = []
        if self._feeling:
            asked = ["What emotion does the {noun} show?", "How does the {noun} feel?", "How does {their} face look?"]
            pairs.append(self._pair("emotion", asked, "{they} looks {x}.", x=_listed(self._feeling)))
        if self._doing:
            asked = ["What is the {noun} doing?", "What does the {noun} do in the video?"]
            pairs.append(self._pair("motion", asked, "{they} is {x}.", x=_listed(self._doing)))
        looks = self._looks() if self._appearance else []
        return pairs + sorted(looks, key=lambda pair: self._draw(pair.question))

    def _looks(self) -> list[Question]:
        pairs = []
        if hair := self._hair():
            asked = ["What is {their} hair like?", "How would you describe the hair of the {noun}?"]
            pairs.append(self._pair("appearance", asked, "{they} has {x}.", x=hair))
        glasses = self._chosen({name: WORN[name] for name in ("eyeglasses", "sunglasses")})
        answer = "yes, {they} wears {x}." if glasses else "no, {they} wears no glasses."
        asked = ["Does the {noun} wear glasses?", "Are there glasses on {their} face?"]
        pairs.append(self._pair("appearance", asked, answer, x=_listed(glasses)))
        hat = "yes, {they} wears a hat." if "wearing_hat" in self._appearance else "no, {they} wears no hat."
        pairs.append(self._pair("appearance", ["Does the {noun} wear a hat?", "Is there a hat on {their} head?"], hat))
        beard = self._chosen({name: FEATURES[name] for name in BEARDS})
        if beard or ("no_beard" in self._appearance and self._noun != "woman"):
            asked = ["What beard does the {noun} have?", "What can be said of {their} facial hair?"]
            answer = "{they} has {x}." if beard else "{they} has no beard."
            pairs.append(self._pair("appearance", asked, answer, x=_listed(beard)))
        features = self._chosen({name: words for name, words in FEATURES.items() if name not in (*BEARDS, "no_beard")})
        if features:
            asked = ["Which features of {their} face stand out?", "What is special about {their} face?"]
            pairs.append(self._pair("appearance", asked, "{they} has {x}.", x=_listed(features)))
        return pairs

    def _hair(self) -> str:
        if "bald" in self._appearance:
            return "a bald head"
        length = ["long"] if "long_hair" in self._appearance else []
        shape = [word for name, word in HAIR_SHAPES.items() if name in self._appearance]
        colors = [word for name, word in HAIR_COLORS.items() if name in self._appearance]
        words = [*length, *shape, " and ".join(colors)]
        return f"{' '.join(filter(None, words))} hair" if length or shape or colors else ""

    def _chosen(self, wording: dict[str, str]) -> list[str]:
        """Returns the words for the labels that are true. A woman's missing beard is not mentioned."""
        unsaid = {"no_beard"} if self._noun == "woman" else set()
        return [words for name, words in wording.items() if name in self._appearance - unsaid]

    def _pair(self, kind: str, questions: Sequence[str], answer: str, **known: str) -> Question:
        text = self._filled(answer, **known)
        return Question(self._pick(f"{kind} {questions[0]}", questions), text[0].upper() + text[1:], kind)

    def _pick(self, name: str, wordings: Sequence[str], **known: str) -> str:
        return self._filled(wordings[self._draw(name) % len(wordings)], **known)

    def _filled(self, wording: str, **known: str) -> str:
        return wording.format(who=self._who, noun=self._noun, they=self._they, their=self._their, **known)

    def _draw(self, name: str) -> int:
        """Returns a number that depends on the clip and a name."""
        return int.from_bytes(hashlib.sha256(json.dumps([self._seed, name]).encode()).digest()[:8], "big")


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
