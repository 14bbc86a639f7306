"""Sessions: batches, unreadable clips, descriptions, and evaluations that are stopped and resumed."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluation.footage import Footage
from favchat_jax.evaluation.respondents import Ask, Unanswered
from favchat_jax.evaluation.result import data_hash
from favchat_jax.evaluation.session import DESCRIBE, Journal, Session, present
from tests.data.face_videos import rendered, video
from tests.data.video_files import encode_video
from tests.evaluation.models_for_tests import Scripted, session

CLIP = encode_video(6)


def asks(count: int) -> list[Ask]:
    return [Ask(f"clip {i}", (Footage(f"clip {i}", CLIP),), (((f"{i}?", None),),)) for i in range(count)]


def repeat(id: str, question: str) -> str:
    return f"{id} {question}"


def test_every_ask_gets_its_own_answer_in_batches_of_one_size():
    model = Scripted(repeat)
    assert session(model, 4).ask(asks(10), 8) == {f"clip {i}": [f"clip {i} {i}?"] for i in range(10)}
    assert [len(batch) for batch in model.batches] == [4, 4, 2]


def test_no_questions_give_no_answers():
    assert session(Scripted(repeat)).ask([], 8) == {}


def test_unreadable_clips_are_listed_and_the_others_answered():
    broken = Ask("broken", (Footage("broken", b"no video"),), ((("?", None),),))
    asked = [*asks(2), broken, Ask("gone", (Footage("gone", Path("nowhere.mp4")),), ((("?", None),),))]
    made = session(Scripted(repeat))
    assert set(made.ask(asked, 8)) == {"clip 0", "clip 1"}
    assert [row["id"] for row in made.missing] == ["broken", "gone"]
    assert "cannot be read as a video" in made.missing[0]["reason"]
    assert "does not exist" in made.missing[1]["reason"]


def test_a_question_that_the_model_does_not_answer_is_listed_as_missing():
    class Refusing(Scripted):
        def answer(self, asks, frames, max_new_tokens):
            return [
                Unanswered("no") if a.id == "clip 1" else said
                for a, said in zip(asks, super().answer(asks, frames, 1), strict=True)
            ]

    made = session(Refusing(repeat))
    assert set(made.ask(asks(3), 8)) == {"clip 0", "clip 2"}
    assert made.missing == [{"id": "clip 1", "reason": "no"}]


class Stopped(Exception):
    pass


class Stopping(Scripted):
    """A model that raises in its third batch, as if the process ended there."""

    def answer(self, asks, frames, max_new_tokens):
        if len(self.batches) == 2:
            raise Stopped
        return super().answer(asks, frames, max_new_tokens)


def test_a_stopped_session_resumes_at_its_unfinished_batch(tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(Stopped):
        session(Stopping(repeat), 3, journal=Journal(path)).ask(asks(10), 8)
    path.write_text(path.read_text() + '\n{"key": "torn')
    model = Scripted(repeat)
    resumed = session(model, 3, journal=Journal(path)).ask(asks(10), 8)
    assert model.batches == [["clip 6", "clip 7", "clip 8"], ["clip 9"]]
    assert resumed == session(Scripted(repeat), 3).ask(asks(10), 8)


def test_a_partly_written_batch_is_answered_again_completely(tmp_path):
    path = tmp_path / "answers.jsonl"
    session(Scripted(repeat), 3, journal=Journal(path)).ask(asks(6), 8)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    model = Scripted(repeat)
    session(model, 3, journal=Journal(path)).ask(asks(6), 8)
    assert model.batches == [["clip 3", "clip 4", "clip 5"]]


@pytest.mark.parametrize("change", ["tokens", "question", "clip", "model"])
def test_answers_to_other_questions_clips_models_or_settings_are_not_reused(change, tmp_path):
    path = tmp_path / "answers.jsonl"
    session(Scripted(repeat), 3, journal=Journal(path)).ask(asks(2), 8)
    model = Scripted(repeat, name="another" if change == "model" else "scripted")
    question = "else?" if change == "question" else "0?"
    clip = encode_video(7) if change == "clip" else CLIP
    asked = [Ask("clip 0", (Footage("clip 0", clip),), (((question, None),),)), asks(2)[1]]
    session(model, 3, journal=Journal(path)).ask(asked, 9 if change == "tokens" else 8)
    assert model.batches == [["clip 0", "clip 1"]]


def test_a_run_without_any_answer_fails_and_a_later_run_asks_again(tmp_path):
    class Refusing(Scripted):
        def answer(self, asks, frames, max_new_tokens):
            return [Unanswered("the server refused") for _ in asks]

    path = tmp_path / "answers.jsonl"
    with pytest.raises(RunError, match="none of 5 samples was answered; the first: the server refused"):
        session(Refusing(repeat), 3, journal=Journal(path)).ask(asks(5), 8)
    assert set(session(Scripted(repeat), 3, journal=Journal(path)).ask(asks(5), 8)) == {f"clip {i}" for i in range(5)}


def test_missing_clips_stay_missing_when_a_session_resumes(tmp_path):
    broken = Ask("broken", (Footage("broken", b"no video"),), ((("?", None),),))
    made = [session(Scripted(repeat), 3, journal=Journal(tmp_path / "a.jsonl")) for _ in range(2)]
    answers = [one.ask([*asks(1), broken], 8) for one in made]
    assert answers[0] == answers[1] and made[0].missing == made[1].missing != []


def test_the_descriptions_precede_the_question():
    model, describer = Scripted(repeat), Scripted(lambda id, question: f"a face in {id}")
    pair = Ask("pair", (Footage("a", CLIP), Footage("b", CLIP)), ((("Same?", None),),))
    alone = Ask("alone", (Footage("a", CLIP),), ((("Who?", None),),))
    made = session(model, describer=describer)
    made.ask([pair, alone], 8)
    assert describer.questions == [DESCRIBE, DESCRIBE]  # each clip once
    assert model.questions == [
        "Description of video 1: a face in a\nDescription of video 2: a face in b\nSame?",
        "Description of the video: a face in a\nWho?",
    ]
    assert made.is_described and not session(model).is_described


def test_missing_clips_are_listed_and_a_folder_without_any_clip_is_refused(tmp_path):
    there = tmp_path / "a.mp4"
    there.write_bytes(CLIP)
    made = session(Scripted(repeat))
    assert present([("a", there), ("b", tmp_path / "b.mp4"), ("c", None)], made, tmp_path) == [("a", there)]
    assert [row["id"] for row in made.missing] == ["b", "c"]
    with pytest.raises(UserError, match="holds none of the 1 listed clips"):
        present([("c", None)], made, tmp_path)


def test_videos_and_folders_of_pictures_give_the_middle_frames_of_equal_parts(tmp_path):
    import cv2

    record = rendered_faces.render(0, "footage", 0)
    video = Footage("clip", record.clip).read(4, 32).frames
    every = Footage("clip", record.clip).read(16, 64).frames
    for number, frame in enumerate(every):
        cv2.imwrite(str(tmp_path / f"0.{number}.png"), frame[:, :, ::-1])
    pictures = Footage("folder", tmp_path).read(4, 64).frames
    assert video.shape == (4, 32, 32, 3)
    assert (pictures == every[[1, 5, 9, 13]]).all()
    assert (Footage("part", tmp_path, first=10, count=2).read(2, 64).frames == every[10:12]).all()


@pytest.mark.parametrize("name", ["._0.1.png", ".0.9.png"])
def test_files_that_a_computers_system_adds_are_no_frames(name, tmp_path):
    import cv2

    for number in range(4):
        cv2.imwrite(str(tmp_path / f"0.{number}.png"), np.full((32, 32, 3), 50 * number, np.uint8))
    before = Footage("folder", tmp_path).read(4, 32).frames, data_hash([], [tmp_path])
    (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (tmp_path / "@eaDir").mkdir()
    assert (Footage("folder", tmp_path).read(4, 32).frames == before[0]).all()
    assert data_hash([], [tmp_path]) == before[1]


def test_the_journal_has_one_json_object_per_line(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    journal.add(["x", "y"], [["1"], "gone"])
    entries = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines() if line]
    assert entries == [{"key": "x", "value": ["1"]}, {"key": "y", "value": "gone"}]
    assert Journal(tmp_path / "a.jsonl").get(["x", "y"]) == [["1"], "gone"]
    assert Session(Scripted(repeat), batch=1).missing == []


def test_clips_without_a_face_are_named_also_by_a_session_that_finds_the_answers_on_disk(tmp_path):
    class Looking(Scripted):
        def without_face(self, ask):
            return ["clip 2"] if ask.id == "clip 2" else []

    for model in (Looking(repeat), Looking(repeat)):
        made = session(model, 2, journal=Journal(tmp_path / "answers.jsonl"))
        made.ask(asks(4), 8)
        assert made.without_face == ["clip 2"]
    assert model.batches == []
    made = session(Scripted(repeat))
    made.ask(asks(2), 8)
    assert made.without_face is None


def test_a_folder_of_frames_gives_the_crops_of_its_video(tmp_path):
    frames = rendered(16)
    for number, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / f"{number}.png"), frame[:, :, ::-1])
    clip = Footage("folder", tmp_path).read(8, 48, FaceCrop())
    again = Footage("video", video(list(frames))).read(8, 48, FaceCrop())
    assert len(clip.tracks.tracks) == 1 and clip.frames.shape == (8, 48, 48, 6)
    assert np.abs(clip.frames.astype(int) - again.frames).mean() < 6
