"""The rendered clips: pictures agree with labels and texts, and a face detector finds the faces."""

import io
from collections import Counter, defaultdict

import av
import cv2
import numpy as np
import pytest

from favchat_jax.data import vocabulary
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.video import decode
from favchat_jax.embedded import dataset as builder
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.embedded.faces import LABELS, answer, render, sample_classes, sample_motion

SPLITS = {"train": 3000, "heldout": 480}


def frames_of(clip: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(clip)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def answers_by_kind(split: str) -> dict[str, Counter]:
    by_kind = defaultdict(Counter)
    for index in range(SPLITS[split]):
        classes, asked = sample_classes(0, split, index, np.random.default_rng(index))
        for label in asked:
            by_kind["detail" if label in rendered_faces.DETAILS else label][answer(label, classes[label])] += 1
    return by_kind


@pytest.fixture(scope="module")
def records():
    return [render(0, "heldout", index) for index in range(30)]


def test_the_same_arguments_give_the_same_bytes(records):
    again = render(0, "heldout", 3)
    assert again.clip == records[3].clip
    assert (again.summary, again.questions, again.labels) == (
        records[3].summary,
        records[3].questions,
        records[3].labels,
    )


def test_splits_seeds_and_indices_differ_in_clip_and_source(records):
    others = [render(0, "train", 3), render(1, "heldout", 3), render(0, "heldout", 4)]
    assert len({record.clip for record in (*others, records[3])}) == 4
    assert len({record.source for record in (*others, records[3])}) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_no_answer_makes_up_more_than_half_of_its_kind(split):
    for kind, answers in answers_by_kind(split).items():
        assert max(answers.values()) / answers.total() <= 0.505, (kind, answers)


def test_every_kind_has_enough_heldout_questions():
    by_kind = answers_by_kind("heldout")
    assert min(answers.total() for answers in by_kind.values()) >= 80
    assert sum(answers.total() for answers in by_kind.values()) >= 1400


def test_every_clip_is_16_frames_of_128_pixels(records):
    for record in records:
        assert np.shape(frames_of(record.clip)) == (16, 128, 128, 3)


def test_answers_summaries_and_attributes_agree_with_the_labels(records):
    assert {record.has_face for record in records} == {True, False}
    for record in records:
        classes = {name: LABELS[name][c] for name, c in record.labels.items() if c >= 0}
        for question in record.questions:
            asked = [label for label, wordings in rendered_faces.QUESTIONS.items() if question.question in wordings]
            assert question.answer == answer(asked[0], classes[asked[0]])
        if not record.has_face:
            assert not record.attributes.any()
            assert classes["color"] in record.summary and classes["shape"] in record.summary
            continue
        on = {name for name, there in zip(vocabulary.VOCABULARY, record.attributes, strict=True) if there}
        assert {f"{classes['hair']}_hair", classes["emotion"], classes["motion"]} <= on
        assert ("eyeglasses" in on) == (classes["glasses"] == "yes") == ("glasses" in record.summary)
        assert ("wearing_hat" in on) == (classes["hat"] == "yes") == ("a hat" in record.summary)
        assert ("wearing_earrings" in on) == (classes["earring"] != "none") == ("earring" in record.summary)
        for mark in ("mole", "scar"):
            described = f"a {mark} on the {classes[mark]} cheek" in record.summary
            assert described == (classes[mark] != "none")
        text, hair, length = record.summary.lower(), classes["hair"], classes["hair_length"]
        assert f"{length} {hair} hair" in text or f"the hair is {length} and {hair}" in text
        assert f"{classes['eyes']} eyes" in text or f"the eyes are {classes['eyes']}" in text
        assert f"{classes['skin']} skin" in text or f"the skin is {classes['skin']}" in text
        assert ("no beard" in text) == (classes["beard"] == "none")
        assert classes["beard"] == "none" or f"a {classes['beard']}" in text


@pytest.mark.parametrize("label", ["mole", "scar", "earring"])
def test_fine_details_are_on_their_side_and_a_few_pixels_wide_at_64(label):
    for index in range(12):
        classes, _ = sample_classes(0, "train", 6 * index, np.random.default_rng(index))
        classes |= {"motion": "close_eyes"}
        drawn = {}
        for side in ("none", "left", "right"):
            rng = np.random.default_rng(index)
            look = rendered_faces.sample_look(classes | {label: side}, rng)
            frame = rendered_faces.face_parts.draw_face(look, sample_motion(classes, rng, frames=1))[0]
            drawn[side] = cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA).astype(int)
        for side in ("left", "right"):
            changed = np.abs(drawn[side] - drawn["none"]).max(-1) > 40
            rows, columns = np.nonzero(changed)
            assert (columns.mean() < 32) == (side == "left")
            assert np.ptp(columns) < 7 and np.ptp(rows) < 9  # a slanted scar is the longest
            assert 2 <= changed.sum() <= 16


def test_the_detector_follows_the_face_of_nearly_all_clips_and_no_shape():
    clips = [render(0, "heldout", index) for index in range(48)]
    followed = [len(decode(clip.clip, frames=16, size=32, face_crop=FaceCrop()).tracks.tracks) for clip in clips]
    faces = [count for clip, count in zip(clips, followed, strict=True) if clip.has_face]
    assert len(faces) == 40 and set(faces) <= {0, 1} and np.mean(faces) >= 0.95
    assert sum(followed) == sum(faces)


def test_each_action_moves_its_part_of_the_head():
    spread = {}
    for motion in LABELS["motion"]:
        moved = sample_motion({"motion": motion, "emotion": "neutral"}, np.random.default_rng(0))
        spread[motion] = {
            name: np.ptp(getattr(moved, name)[1::3]) for name in ("pitch", "yaw", "eyes_open", "mouth_open")
        }
    for motion, part in {"nod": "pitch", "shake_head": "yaw", "turn": "yaw", "close_eyes": "eyes_open"}.items():
        assert spread[motion][part] > 0.5
        assert all(spread[other][part] < 0.15 for other in spread if other not in (motion, "turn", "shake_head"))
    assert spread["talk"]["mouth_open"] > 0.7
    turned = sample_motion({"motion": "turn", "emotion": "neutral"}, np.random.default_rng(1)).yaw
    assert abs(turned[-1]) > 0.6 and abs(turned[-1] - turned[-4]) < 0.1  # the head stays turned


def test_the_contact_sheet_shows_16_clips():
    assert rendered_faces.contact_sheet().shape == (4 * 128, 4 * 128, 3)


@pytest.mark.parametrize(
    ("draw", "render", "name", "labels", "frames"),
    [
        (builder.draw_stills, rendered_faces.render_still, "stills", rendered_faces.FACE_LABELS, 1),
        (builder.draw_general_clips, rendered_faces.render_shapes, "general clips", rendered_faces.GENERAL_LABELS, 16),
    ],
)
def test_pretraining_pictures_are_the_same_for_any_number_of_workers(draw, render, name, labels, frames, monkeypatch):
    monkeypatch.setattr(builder.os, "cpu_count", lambda: 1)
    drawn, classes = draw(6, seed=3, size=32)
    monkeypatch.setattr(builder.os, "cpu_count", lambda: 2)
    np.testing.assert_array_equal(drawn, draw(6, seed=3, size=32)[0])
    assert drawn.shape == (6, frames, 32, 32, 3) and drawn.dtype == np.uint8
    assert len({clip.tobytes() for clip in drawn}) == 6
    assert set(classes) == set(labels)
    for index in range(6):
        assert {label: values[index] for label, values in classes.items()} == render(3, name, index)[1]
