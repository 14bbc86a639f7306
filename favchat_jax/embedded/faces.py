"""Draws and describes the clips of the embedded data set; (seed, split, index) determines a clip and its questions.

They replace CelebV-HQ in the demo and the tests, with the same 83 labels, summaries and question-answer pairs (paper,
section 3.2). Faces fill the frame and have bold features, so that a model can read them in 8 frames of 64 x 64 pixels.
Moles, earrings and scars are 1-3 of those pixels wide, too small for the general encoder's patches.

Answers are balanced: clips with the same kind of question take its classes in turn, in shuffled blocks. Therefore, a
constant answer never scores above one half. Left and right are the viewer's.

    python -m favchat_jax.embedded.faces --contact_sheet=docs/figures/rendered_faces.png
"""

import argparse
import dataclasses
import io
import zlib

import av
import cv2
import numpy as np
from jaxtyping import UInt8

from favchat_jax.data import vocabulary
from favchat_jax.data.record import Question, Record
from favchat_jax.embedded import drawing, face_parts

FPS = 12
FAR = 4
GENERAL_EVERY = 6  # one clip in six shows no face
SIDES = ("none", "left", "right")
LABELS: dict[str, tuple[str, ...]] = {
    "hair": ("black", "blonde", "gray", "brown"),
    "hair_length": ("short", "long"),
    "glasses": ("no", "yes"),
    "hat": ("no", "yes"),
    "beard": ("none", "goatee", "mustache"),
    "eyes": ("blue", "green", "brown"),
    "skin": ("pale", "tan", "dark"),
    "mole": SIDES,
    "earring": SIDES,
    "scar": SIDES,
    "emotion": ("neutral", "happy", "sadness", "surprise", "anger"),
    "motion": ("nod", "shake_head", "turn", "close_eyes", "talk"),
    "shape": ("circle", "square", "triangle", "star"),
    "color": ("red", "green", "blue", "yellow"),
    "direction": ("left", "right", "up", "down"),
    "count": ("one", "two", "three"),
}
APPEARANCE = ("hair", "hair_length", "glasses", "hat", "beard", "eyes", "skin")
DETAILS = ("mole", "earring", "scar")
FACE_LABELS = (*APPEARANCE, *DETAILS, "emotion", "motion")
GENERAL_LABELS = ("shape", "color", "direction", "count")

ANSWERS = {
    "mole": {"left": "left cheek", "right": "right cheek"},
    "scar": {"left": "left cheek", "right": "right cheek"},
    "earring": {"left": "left ear", "right": "right ear"},
    "emotion": {"sadness": "sad", "surprise": "surprised", "anger": "angry"},
    "motion": {
        "nod": "nodding",
        "shake_head": "shaking the head",
        "turn": "turning the head",
        "close_eyes": "closing the eyes",
        "talk": "talking",
    },
}
QUESTIONS = {
    "hair": ("What color is the hair?", "What is the hair color of this person?", "Which hair color do you see?"),
    "hair_length": ("Is the hair long or short?", "How long is the hair?", "Does the person have long or short hair?"),
    "glasses": ("Does the person wear glasses?", "Are there glasses on the face?", "Is the person wearing glasses?"),
    "hat": ("Does the person wear a hat?", "Is there a hat on the head?", "Is the person wearing a hat?"),
    "beard": ("What beard does the person have?", "Which kind of beard do you see?", "What beard is on the face?"),
    "eyes": ("What color are the eyes?", "What is the eye color of this person?", "Which eye color do you see?"),
    "skin": ("Is the skin pale, tan or dark?", "What is the skin tone?", "Which skin tone does the person have?"),
    "mole": ("Which cheek has a mole?", "On which cheek is the mole?", "Is there a mole on the left or right cheek?"),
    "earring": ("Which ear has an earring?", "In which ear is the earring?", "Is an earring in the left or right ear?"),
    "scar": ("Which cheek has a scar?", "On which cheek is the scar?", "Is there a scar on the left or right cheek?"),
    "emotion": ("What emotion does the person show?", "How does the person feel?", "Which emotion is on the face?"),
    "motion": ("What is the person doing?", "What does the person do?", "Which action do you see?"),
    "shape": ("What shape is moving?", "Which shape do you see?", "What is the shape of the object?"),
    "color": ("What color is the shape?", "Which color does the shape have?", "What is the color of the object?"),
    "direction": ("Which way does it move?", "In which direction does the shape move?", "Where is the object going?"),
}


# Colours in RGB, from which each clip's colours are drawn.
HAIR = {"black": (30, 26, 30), "blonde": (222, 182, 84), "gray": (146, 148, 156), "brown": (116, 64, 28)}
EYES = {"blue": (40, 104, 220), "green": (34, 140, 60), "brown": (104, 56, 22)}
SKIN = {"pale": (250, 226, 212), "tan": (222, 170, 126), "dark": (170, 118, 84)}
HATS = ((180, 40, 50), (40, 80, 170), (40, 130, 80), (110, 60, 140), (60, 60, 70))
SHAPE_COLORS = {"red": (214, 44, 48), "green": (48, 166, 72), "blue": (48, 84, 214), "yellow": (240, 210, 50)}


def render(seed: int, split: str, index: int) -> Record:
    """Draws, encodes and describes clip `index` of `split`. Equal arguments give equal bytes; splits differ."""
    rng = generator(seed, split, "clip", index)
    classes, asked = sample_classes(seed, split, index, rng)
    has_face = "emotion" in classes
    if has_face:
        frames = face_parts.draw_face(sample_look(classes, rng), sample_motion(classes, rng))
    else:
        frames = drawing.draw_shapes(sample_shapes(classes, rng))
    name = f"{split}-{seed}-{index:05d}"
    return Record(
        id=name,
        clip=encode(frames, crf=int(rng.integers(16, 20))),
        attributes=_attributes(classes),
        summary=_summary(classes, rng) if has_face else _general_summary(classes, rng),
        questions=tuple(_question(label, classes[label], rng) for label in asked),
        targets=_targets(classes) if has_face else _general_targets(classes),
        source=name,  # every clip shows another person
        has_face=has_face,
        labels=dict.fromkeys(LABELS, -1) | _indices(classes),  # -1: absent, such as the shape of a face
    )


def render_still(seed: int, split: str, index: int) -> tuple[UInt8[np.ndarray, "1 h w 3"], dict[str, int]]:
    """Draws one frame of a face clip that is in no split; returns it with the random class of each of `FACE_LABELS`.

    It pretrains the facial encoder, and is four times cheaper than a clip.
    """
    rng = generator(seed, split, "still", index)
    classes = _random_classes(FACE_LABELS, rng)
    look, motion = sample_look(classes, rng), sample_motion(classes, rng)
    frames = face_parts.draw_face(look, motion.at(int(rng.integers(drawing.FRAMES))))
    return frames, _indices(classes)


def render_shapes(seed: int, split: str, index: int) -> tuple[UInt8[np.ndarray, "T h w 3"], dict[str, int]]:
    """Draws the frames of a general clip that is in no split; returns them with the class of each of `GENERAL_LABELS`.

    It pretrains the general encoder.
    """
    rng = generator(seed, split, "shapes", index)
    classes = _random_classes(GENERAL_LABELS, rng)
    return drawing.draw_shapes(sample_shapes(classes, rng)), _indices(classes)


def sample_classes(
    seed: int, split: str, index: int, rng: np.random.Generator
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Draws the class of each label of clip `index`; returns them with the labels that its questions ask about."""
    ordinal, place = divmod(index, GENERAL_EVERY)
    if place == GENERAL_EVERY - 1:
        return {label: _balanced(seed, split, label, ordinal) for label in GENERAL_LABELS}, GENERAL_LABELS[:3]
    asked = _plan(index - ordinal)
    balanced = {label: _balanced(seed, split, label, turn) for label, turn in asked.items()}
    return _random_classes(FACE_LABELS, rng) | balanced, tuple(asked)


def _random_classes(labels: tuple[str, ...], rng: np.random.Generator) -> dict[str, str]:
    return {label: LABELS[label][rng.integers(len(LABELS[label]))] for label in labels}


def _indices(classes: dict[str, str]) -> dict[str, int]:
    """Returns the index of each label's class in LABELS."""
    return {label: LABELS[label].index(value) for label, value in classes.items()}


def generator(seed: int, split: str, purpose: str, number: int) -> np.random.Generator:
    """Returns the random generator of one purpose; purposes, splits and seeds share no random numbers."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), zlib.crc32(purpose.encode()), number])


def _balanced(seed: int, split: str, label: str, turn: int) -> str:
    """Returns the class of the `turn`-th clip that asks about `label`; every shuffled block holds all classes."""
    block, place = divmod(turn, len(LABELS[label]))
    return LABELS[label][generator(seed, split, label, block).permutation(len(LABELS[label]))[place]]


def _plan(ordinal: int) -> dict[str, int]:
    """Chooses the questions of a face clip in turn: two on appearance, one on a detail, and one on emotion or motion.

    Returns label -> number of earlier clips that ask about it.
    """
    asked = {APPEARANCE[place % 7]: place // 7 for place in (2 * ordinal, 2 * ordinal + 1)}
    asked[DETAILS[ordinal % 3]] = ordinal // 3
    asked[("emotion", "motion")[ordinal % 2]] = ordinal // 2
    return asked


def near(rng: np.random.Generator, color: tuple[float, ...], spread: float) -> drawing.Color:
    """Draws a colour close to `color`."""
    return tuple(int(np.clip(c, 0, 255)) for c in rng.normal(color, spread))


def sample_look(classes: dict[str, str], rng: np.random.Generator) -> drawing.Look:
    """Draws a person and a scene that show `classes`; everything else is random."""

    def pick(*colors):
        return colors[rng.integers(len(colors))]

    skin = near(rng, SKIN[classes["skin"]], 4)
    return drawing.Look(
        hair=near(rng, HAIR[classes["hair"]], 6),
        long_hair=classes["hair_length"] == "long",
        fringe=int(rng.integers(4)),
        skin=skin,
        eyes=near(rng, EYES[classes["eyes"]], 6),
        glasses=pick((16, 16, 20), (120, 20, 30), (24, 40, 120)) if classes["glasses"] == "yes" else None,
        glasses_round=bool(rng.integers(2)),
        hat=near(rng, pick(*HATS), 10) if classes["hat"] == "yes" else None,
        hat_brim=bool(rng.integers(2)),
        beard=classes["beard"],
        mole=classes["mole"],
        earring=classes["earring"],
        scar=classes["scar"],
        earring_color=pick((30, 225, 235), (60, 240, 200)),  # turquoise differs from everything near an ear
        mole_at=(rng.uniform(0.44, 0.58), rng.uniform(0.3, 0.42)),
        scar_at=(rng.uniform(0.56, 0.62), rng.uniform(0.66, 0.72)),
        face_width=rng.uniform(0.93, 1.04),
        jaw=rng.uniform(0.72, 0.9),
        eye_distance=rng.uniform(0.39, 0.44),
        eye_size=rng.uniform(0.9, 1.1),
        nose=rng.uniform(0.8, 1.3),
        brow_width=rng.uniform(0.055, 0.075),
        mouth_height=rng.uniform(0.68, 0.74),
        lips=drawing.mix(drawing.shade(skin, 0.8), near(rng, (170, 40, 60), 10), rng.uniform(0.5, 0.9)),
        clothes=near(rng, (125, 125, 125), 50),
        background=_background(rng),
        light=(rng.uniform(-1, 1), rng.uniform(0, 1)),
        scale=rng.uniform(73, 80),
        center=(128 + rng.uniform(-8, 8), 132 + rng.uniform(-6, 6)),
    )


def _background(rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Draws a colour gradient with blurred patches."""
    a, b = rng.uniform(30, 170, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    ramp = 0.5 + 0.4 * (np.cos(angle) * x + np.sin(angle) * y)
    image = a + (b - a) * ramp[..., None]
    patches = cv2.resize(rng.normal(0, 22, (6, 6, 3)), (32, 32), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + patches * rng.uniform(0, 1), 0, 255).astype(np.uint8)
    return cv2.resize(image, (drawing.CANVAS, drawing.CANVAS), interpolation=cv2.INTER_LINEAR)


def sample_motion(classes: dict[str, str], rng: np.random.Generator, frames: int = drawing.FRAMES) -> drawing.Motion:
    """Draws the motion of head, eyes and mouth: the large motion of `classes` and a small drift of the pose."""
    t = np.arange(frames) / frames
    cycles, phase = rng.uniform(1.8, 2.3), rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * cycles * t + phase)

    def drift(size):
        return rng.uniform(-size, size) + 0.4 * size * np.sin(2 * np.pi * (rng.uniform(0.3, 0.7) * t + rng.uniform()))

    yaw, pitch, roll = drift(0.12), drift(0.06), drift(0.07)
    eyes, mouth = np.ones(frames), np.zeros(frames)
    motion = classes["motion"]
    if motion == "nod":
        pitch = pitch + rng.uniform(0.34, 0.44) * wave
    elif motion == "shake_head":
        yaw = yaw + rng.uniform(0.5, 0.65) * wave
    elif motion == "turn":
        start = rng.uniform(0.1, 0.3)
        share = np.clip((t - start) / rng.uniform(0.3, 0.45), 0, 1)
        yaw = yaw + rng.choice([-1, 1]) * rng.uniform(0.75, 0.9) * share**2 * (3 - 2 * share)
    elif motion == "close_eyes":
        eyes = np.clip(0.5 + 2.5 * (wave - 0.05), 0, 1)
    else:
        mouth = np.clip(0.5 + 0.75 * wave, 0, 1) * rng.uniform(0.85, 1.0)
    return drawing.Motion(yaw, pitch, roll, eyes, mouth, classes["emotion"])


def sample_shapes(classes: dict[str, str], rng: np.random.Generator) -> drawing.Shapes:
    """Draws a general scene that shows `classes` before a dull background."""
    count = LABELS["count"].index(classes["count"]) + 1
    way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[classes["direction"]]
    across = 0.5 + (0.36 if count == 2 else 0.3) * (np.arange(count) - (count - 1) / 2) + rng.uniform(-0.04, 0.04)
    along = 0.5 + rng.uniform(-0.06, 0.06, count)
    backdrop = _background(rng)
    backdrop = (0.3 * backdrop + 0.3 * backdrop.mean(-1, keepdims=True) + rng.uniform(0, 80)).astype(np.uint8)
    return drawing.Shapes(
        shape=classes["shape"],
        color=near(rng, SHAPE_COLORS[classes["color"]], 8),
        middle=np.stack([along, across] if way[0] else [across, along], -1),
        step=tuple(w * rng.uniform(0.03, 0.036) for w in way),
        radius=(0.2, 0.17, 0.14)[count - 1] * rng.uniform(1, 1.15),
        spin=rng.uniform(-0.3, 0.3),
        background=backdrop,
    )


def answer(label: str, value: str) -> str:
    """Returns the canonical answer to a question about `label` for the class `value`."""
    return ANSWERS.get(label, {}).get(value, value)


def _question(label: str, value: str, rng: np.random.Generator) -> Question:
    wording = QUESTIONS[label][rng.integers(len(QUESTIONS[label]))]
    return Question(wording, answer(label, value), "detail" if label in DETAILS else label)


def _attributes(classes: dict[str, str]) -> UInt8[np.ndarray, " 83"]:
    if "emotion" not in classes:
        return np.zeros(len(vocabulary.VOCABULARY), np.uint8)
    names = {f"{classes['hair']}_hair", classes["motion"], classes["emotion"]}
    names |= {"no_beard" if classes["beard"] == "none" else classes["beard"]}
    present = {
        "long_hair": classes["hair_length"] == "long",
        "eyeglasses": classes["glasses"] == "yes",
        "wearing_hat": classes["hat"] == "yes",
        "pale_skin": classes["skin"] == "pale",
        "wearing_earrings": classes["earring"] != "none",
        "smile": classes["emotion"] == "happy",
    }
    names |= {name for name, is_present in present.items() if is_present}
    return np.array([name in names for name in vocabulary.VOCABULARY], np.uint8)


def _enumerated(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _summary(classes: dict[str, str], rng: np.random.Generator) -> str:
    """Writes two or three sentences about everything visible, in one of several wordings."""
    length, hair, eyes, skin, beard = (classes[name] for name in ("hair_length", "hair", "eyes", "skin", "beard"))
    emotion, motion = answer("emotion", classes["emotion"]), answer("motion", classes["motion"])
    has = [f"a {mark} on the {classes[mark]} cheek" for mark in ("mole", "scar") if classes[mark] != "none"]
    wears = ["glasses"] * (classes["glasses"] == "yes") + ["a hat"] * (classes["hat"] == "yes")
    wears += [f"an earring in the {classes['earring']} ear"] * (classes["earring"] != "none")
    sentences = []
    # One wording is "The person has blue eyes", the other "The eyes are blue".
    if rng.integers(2):
        has += [f"{eyes} eyes", f"{skin} skin", "no beard" if beard == "none" else f"a {beard}"]
        rng.shuffle(has)
        has.insert(0, f"{length} {hair} hair")
    else:
        looks = [f"the hair is {length} and {hair}", f"the eyes are {eyes}", f"the skin is {skin}"]
        looks.append("there is no beard" if beard == "none" else f"the beard is a {beard}")
        rng.shuffle(looks)
        sentences.append(f"{_enumerated(looks).capitalize()}.")
    clauses = [f"{verb} {_enumerated(things)}" for verb, things in (("has", has), ("wears", wears)) if things]
    if clauses:
        sentences.append(f"The person {' and '.join(clauses)}.")
    does = (
        f"The person looks {emotion} and is {motion}.",
        f"The person is {motion} and looks {emotion}.",
        f"The face is {emotion} and the person is {motion}.",
    )[rng.integers(3)]
    sentences.insert(len(sentences) * rng.integers(2), does)
    return " ".join(sentences)


def _targets(classes: dict[str, str]) -> dict[str, str]:
    words = [classes["hair_length"], classes["hair"], "hair"]
    words += ["glasses"] * (classes["glasses"] == "yes") + ["hat"] * (classes["hat"] == "yes")
    words += [classes["beard"]] * (classes["beard"] != "none") + [classes["skin"], "skin", classes["eyes"], "eyes"]
    for detail in DETAILS:
        if classes[detail] != "none":
            words += [detail, classes[detail]]
    return {
        "attributes": " ".join(words),
        "emotion": answer("emotion", classes["emotion"]),
        "action": answer("motion", classes["motion"]),
    }


def _shapes_named(classes: dict[str, str]) -> str:
    return f"{classes['count']} {classes['color']} {classes['shape']}{'s' * (classes['count'] != 'one')}"


def _general_summary(classes: dict[str, str], rng: np.random.Generator) -> str:
    verb = ("move", "go")[rng.integers(2)] if classes["count"] != "one" else ("moves", "goes")[rng.integers(2)]
    where = {"left": "to the left", "right": "to the right"}.get(classes["direction"], classes["direction"])
    return f"{_shapes_named(classes).capitalize()} {verb} {where}. No person is there."


def _general_targets(classes: dict[str, str]) -> dict[str, str]:
    return {"attributes": _shapes_named(classes), "emotion": "none", "action": f"move {classes['direction']}"}


def render_far(seed: int, split: str, index: int) -> Record:
    """Draws the record of `render`; a clip of a face lies somewhere in a picture of FAR times its side."""
    record = render(seed, split, index)
    if not record.has_face:
        return record
    with av.open(io.BytesIO(record.clip)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    rng = generator(seed, split, "place", index)
    side = frames.shape[1]
    behind = cv2.resize(rng.integers(40, 216, (6, 6, 3), np.uint8), (FAR * side,) * 2, interpolation=cv2.INTER_CUBIC)
    pictures = np.repeat(behind[None], len(frames), axis=0)
    top, left = rng.integers(0, (FAR - 1) * side, 2)
    pictures[:, top : top + side, left : left + side] = frames
    return dataclasses.replace(record, clip=encode(pictures))


def encode(frames: UInt8[np.ndarray, "T H W 3"], crf: int = 18) -> bytes:
    """Encodes RGB frames as H.264 mp4 at `FPS`, on one thread so that equal frames give equal bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": str(crf)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def contact_sheet(clips: int = 16, across: int = 4) -> UInt8[np.ndarray, "H W 3"]:
    """Tiles one frame of each of the first held-out clips into an RGB picture."""
    tiles = []
    for index in range(clips):
        with av.open(io.BytesIO(render(0, "heldout", index).clip)) as container:
            tiles.append([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][8])
    return np.concatenate([np.concatenate(tiles[i : i + across], 1) for i in range(0, clips, across)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws the first 16 held-out clips into one picture.")
    parser.add_argument("--contact_sheet", required=True, help="PNG file to write")
    cv2.imwrite(parser.parse_args().contact_sheet, cv2.cvtColor(contact_sheet(), cv2.COLOR_RGB2BGR))
