"""Annotating against a real HTTP server on loopback: the requests, the answers, and the resulting texts."""

import contextlib
import dataclasses
import json
import shutil
import threading
from collections import Counter

import cv2
import numpy as np
import pytest

from favchat_jax.corpus import clip_frames
from favchat_jax.corpus.annotate import write_texts
from favchat_jax.corpus.annotations import Annotation, read_annotations
from favchat_jax.corpus.calls import Calls
from favchat_jax.corpus.kept import read_kept
from favchat_jax.corpus.manifest import KEPT, write_table
from favchat_jax.corpus.reviews import Review, Reviews
from favchat_jax.errors import UserError
from tests.corpus.annotating import LIMITS, for_step, run, unannotated
from tests.corpus.chat_server import FEATURES, PAIRS, SUMMARY, Answer, completion, good
from tests.corpus.corpus_folder import LABELS, fill, row
from tests.data.video_files import encode_video


def test_a_clip_becomes_features_a_summary_and_questions_by_three_calls(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out)
    assert sorted(asked.step for asked in server.asked) == ["features"] * 2 + ["questions"] * 2 + ["summary"] * 2
    annotations = read_annotations(out)
    assert list(annotations) == ["clip000", "clip001"]
    one = annotations["clip000"]
    assert (one.backend, one.model, one.attempts, one.problems) == ("openai", "some-model", 3, ())
    assert one.features["hair"] == "short brown hair" and one.summary.startswith("A young man")
    assert [(pair.question, pair.answer, pair.kind) for pair in one.questions] == PAIRS
    assert unannotated(out) == {}


def test_an_endpoint_sees_one_frame_in_four_the_labels_and_its_earlier_answers(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 1)
    run(out)
    contents = [asked.body["messages"][1]["content"] for asked in server.asked]
    assert [len(content) for content in contents] == [4, 4, 1]  # frames 0, 4 and 8 of 9
    assert all(part["image_url"]["url"].startswith("data:image/jpeg;base64,") for part in contents[0][1:])
    texts = [content[0]["text"] for content in contents]
    assert all("male, young, brown hair, eyeglasses, no beard" in text and "talk, nod" in text for text in texts)
    assert "short brown hair" in texts[1] and "He was filmed" in texts[2]
    assert not any("$" in text.replace("$ref", "").replace("$defs", "") for text in texts)


def test_a_long_or_large_clip_is_sent_as_small_pictures_evenly_spread(tmp_path):

    path = tmp_path / "a: clip.mp4"
    path.write_bytes(encode_video(270, width=544, height=272, options={"preset": "ultrafast"}))
    pictures = clip_frames.pictures(path)
    assert len(pictures) == clip_frames.count(270) == clip_frames.MOST

    assert cv2.imdecode(np.frombuffer(pictures[0], np.uint8), cv2.IMREAD_COLOR).shape == (256, 512, 3)


def test_a_second_run_makes_no_call_and_writes_the_same_bytes(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out)
    before = (out / "annotations.jsonl").read_bytes()
    asked = len(server.asked)
    (out / "annotations.jsonl").unlink()
    run(out)
    assert (out / "annotations.jsonl").read_bytes() == before and len(server.asked) == asked


def test_only_a_changed_clip_is_annotated_again(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out)
    (out / "kept/clip001.mp4").write_bytes((fill(tmp_path / "other", 3) / "kept/clip002.mp4").read_bytes())
    run(out)
    assert len(server.asked) == 6 + 3


@pytest.mark.parametrize(
    ("step", "bad", "refused_for"),
    [
        ("features", Answer("{}"), "schema"),
        ("features", Answer("not json"), "not JSON"),
        ("features", Answer(raw=b"<html>gateway</html>"), "not a chat completion"),
        ("features", Answer(raw=b'{"choices": []}'), "not a chat completion"),
        ("features", Answer("half of an emoji: \ud83d"), "half of a character"),
        ("features", Answer(json.dumps({**FEATURES, "hair": "half of an emoji: \ud83d"})), "not JSON"),
        ("summary", Answer(""), "empty"),
        ("summary", Answer("<think>Short hair, and"), "empty"),
        ("summary", Answer(f"<think>{SUMMARY}", finish="length"), "cut off"),
        (
            "summary",
            Answer(raw=completion(Answer()).replace(b'"content": ""', b'"refusal": "no"')),
            "refuses to answer",
        ),
        (
            "summary",
            Answer("I'm sorry, but I cannot help with that, since the video shows a real person and his face."),
            "refusal",
        ),
        ("summary", Answer(SUMMARY.replace("happy", "angry")), "anger"),
        ("summary", Answer(SUMMARY, finish="length"), "cut off"),
        ("summary", Answer(raw=b"x" * (10 << 20)), "larger than 1 MB"),
        ("questions", Answer("{}"), "schema"),
    ],
)
def test_a_bad_answer_is_requested_again_with_the_reason(start, tmp_path, step, bad, refused_for):
    server, out = start(for_step(step, bad, times=1)), fill(tmp_path / "out", 1)
    run(out)
    texts = [asked.body["messages"][1]["content"][0]["text"] for asked in server.asked if asked.step == step]
    assert len(texts) == 2 and refused_for in texts[1].removeprefix(texts[0])
    one = read_annotations(out)["clip000"]
    assert (one.attempts, one.problems, len(one.questions)) == (4, (), 4)


def in_parts(answer: Answer) -> Answer:
    """Returns the same text as a server sends it that answers in parts, as `raw` bytes."""
    reply = json.loads(completion(answer))
    (choice,) = reply["choices"]
    half = len(answer.text) // 2
    choice["message"]["content"] = [{"type": "text", "text": text} for text in (answer.text[:half], answer.text[half:])]
    return Answer(raw=json.dumps(reply).encode())


@pytest.mark.parametrize(
    "change",
    [lambda answer: Answer(f"<think>Short hair? Yes.</think>\n\n{answer.text}"), in_parts],
    ids=["after a thought", "in parts"],
)
def test_texts_after_a_thought_or_in_parts_are_the_same_texts(start, tmp_path, change):
    out, reference = fill(tmp_path / "out", 1), fill(tmp_path / "reference", 1)
    server = start(lambda asked, number: change(good(asked, number)))
    run(out)
    assert len(server.asked) == 3
    start()
    run(reference)
    assert (out / "annotations.jsonl").read_bytes() == (reference / "annotations.jsonl").read_bytes()


def test_an_annotator_that_refuses_options_is_asked_as_it_wants(start, tmp_path):
    def reply(asked, number):
        if "max_tokens" in asked.body:
            return Answer(status=400, raw=b'{"error": {"message": "unsupported", "param": "max_tokens"}}')
        return good(asked, number)

    server, out = start(reply), fill(tmp_path / "out", 1)
    run(out)
    assert len(server.asked) == 1 + 3 and list(read_annotations(out)) == ["clip000"]


@pytest.mark.parametrize(
    ("reported", "instead"),
    [(b"1000", b"-1000"), (b"1000", b"1" + b"0" * 30), (b"1000", b"1e999"), (b"1000", b"[]"), (b'"stop"', b'["stop"]')],
)
def test_impossible_token_counts_and_endings_do_not_spoil_an_answer(start, tmp_path, reported, instead):
    raw = completion(Answer(json.dumps(FEATURES))).replace(reported, instead)
    server, out = start(for_step("features", Answer(raw=raw))), fill(tmp_path / "out", 1)
    run(out)
    assert len(server.asked) == 3 and list(read_annotations(out)) == ["clip000"]
    with contextlib.closing(Calls(out)) as calls:
        assert 0 < calls.totals()["features"].input_tokens < 10_000


def test_after_the_last_attempt_the_text_goes_to_the_reviewers_with_its_problems(start, tmp_path):
    server, out = start(for_step("summary", Answer(SUMMARY.replace("happy", "angry")))), fill(tmp_path / "out", 1)
    run(out, attempts=2)
    one = read_annotations(out)["clip000"]
    assert one.attempts == 3 and one.problems == ("it says anger, and the labels say happy",)
    assert one.questions == () and Counter(asked.step for asked in server.asked)["questions"] == 0


def test_a_clip_without_features_is_recorded_with_its_reason(start, tmp_path):
    server, out = start(for_step("features", Answer("no"))), fill(tmp_path / "out", 1)
    run(out, attempts=2)
    assert read_annotations(out) == {} and len(server.asked) == 2
    assert unannotated(out)["clip000"] == "no feature dictionary after 2 answers: the text is not JSON"


def test_an_equal_summary_of_a_second_clip_is_rewritten(start, tmp_path):
    def same_first(asked, number):
        first = "a reader wants another text" not in asked.body["messages"][1]["content"][0]["text"]
        return Answer(SUMMARY) if asked.step == "summary" and first else good(asked, number)

    out = fill(tmp_path / "out", 2)
    start(same_first)
    run(out)
    summaries = [annotation.summary for annotation in read_annotations(out).values()]
    assert summaries[0] == SUMMARY != summaries[1]


def test_two_equal_clips_make_no_call_twice(start, tmp_path):
    out = fill(tmp_path / "out", 2)
    shutil.copy(out / "kept/clip000.mp4", out / "kept/clip001.mp4")
    server = start(lambda asked, number: dataclasses.replace(good(asked, number), delay=0.05))
    run(out)
    assert max(Counter(request.key for request in server.asked).values()) == 1
    first, second = read_annotations(out).values()
    assert first.summary != second.summary and not first.problems + second.problems


def test_a_summary_that_equals_a_rewritten_one_is_rewritten_too(tmp_path):
    texts = {"clip000": ["S"], "clip001": ["S", "T"], "clip002": ["T", "U"]}

    class Writing:
        def write(self, clip, refused=()):
            return Annotation(clip.id, "", "openai", "", "", {}, texts[clip.id][len(refused)], (), 3, ())

    out = fill(tmp_path / "out", 3)
    written = write_texts(read_kept(out), Writing(), Reviews(out), 2, threading.Event())
    assert {name: text.summary for name, text in written.annotations.items()} == {
        "clip000": "S",
        "clip001": "T",
        "clip002": "U",
    }


def test_equal_summaries_that_stay_equal_are_a_problem(start, tmp_path):
    out = fill(tmp_path / "out", 2)
    start(for_step("summary", Answer(SUMMARY)))
    run(out)
    problems = [annotation.problems for annotation in read_annotations(out).values()]
    assert problems == [(), ("its summary is that of clip clip000",)]


def test_the_dry_run_makes_no_call_and_reports_the_work_left(start, tmp_path, capsys):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out, dry_run=True)
    table = capsys.readouterr().out.splitlines()
    assert not server.asked and table[1].split()[:4] == ["to", "do", "2", "6"]
    assert table[2].split()[2:4] == ["61,007", "183,021"]
    run(out)
    run(out, dry_run=True)
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[2:] == ["0", "0", "0", "0", "0.00", "0.00"] and table[3].startswith("paid so far: $0.02")
    # The server reports 100 output tokens per call.
    assert table[2].split()[3:6:2] == ["183,021", f"{183_021 * 100:,}"]


def test_the_dry_run_counts_refused_answers(start, tmp_path, capsys):
    out = fill(tmp_path / "out", 2)
    start(for_step("features", Answer("{}"), times=2))  # 4 answers for 2 clips
    run(out, dataclasses.replace(LIMITS, concurrency=1))
    run(out, dry_run=True)
    assert capsys.readouterr().out.splitlines()[2].split()[3] == f"{61_007 * 4:,}"


def test_a_text_that_a_reviewer_wants_rewritten_is_rewritten_differently(start, tmp_path):
    server, out = start(), fill(tmp_path / "out", 2)
    run(out)
    before = read_annotations(out)
    one = before["clip000"]
    Reviews(out).add(Review("clip000", "ada", "regenerate", one.summary, one.questions, "2025-01-01", one.text()))
    run(out)
    after = read_annotations(out)
    assert after["clip001"] == before["clip001"] and after["clip000"].summary != one.summary
    assert [asked.step for asked in server.asked[6:]] == ["summary", "questions"]  # the features are paid for
    assert one.summary in server.asked[6].body["messages"][1]["content"][0]["text"]
    run(out)
    assert read_annotations(out) == after and len(server.asked) == 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attributes": '{"emotion": ["glad"]}'}, "'glad' is not a label of CelebV-HQ's emotion"),
        ({"path": "kept/gone.mp4"}, "gone.mp4 cannot be read"),
        ({"path": "kept/empty.mp4"}, "empty.mp4 is empty: give a video file"),
        ({"path": "kept/text.mp4"}, "text.mp4 cannot be read as a video"),
    ],
)
def test_an_unusable_clip_is_recorded_and_the_others_are_annotated(start, tmp_path, change, reason):
    start()
    out = fill(tmp_path / "out", 2)
    (out / "kept/empty.mp4").touch()
    (out / "kept/text.mp4").write_text("no video")
    write_table(out, KEPT, [row("clip000", **change), row("clip001")])
    run(out)
    assert list(read_annotations(out)) == ["clip001"] and reason in unannotated(out)["clip000"]


def test_timed_emotions_are_labels_too(start, tmp_path):
    timed = {**LABELS, "emotion": [{"emotion": "happy", "start_sec": 0, "end_sec": 1}, {"emotion": "neutral"}]}
    server, out = start(), fill(tmp_path / "out", 1, timed)
    run(out)
    assert "emotion: happy, neutral" in server.asked[0].body["messages"][1]["content"][0]["text"]


def test_a_path_outside_the_folder_is_refused(start, tmp_path):
    start()
    out = fill(tmp_path / "out", 1)
    write_table(out, KEPT, [row("clip000", path="../../secret.mp4")])
    with pytest.raises(UserError, match="clip000 is stored outside"):
        run(out)


def test_templates_annotate_without_an_endpoint(tmp_path):
    out = fill(tmp_path / "out", 3)
    write_table(out, KEPT, [row("clip000"), row("clip001"), row("clip002", None)])
    run(out, backend="template")
    before = (out / "annotations.jsonl").read_bytes()
    assert list(read_annotations(out)) == ["clip000", "clip001"] and "no labels" in unannotated(out)["clip002"]
    run(out, backend="template")
    assert (out / "annotations.jsonl").read_bytes() == before
    write_table(out, KEPT, [row("clip002", None)])
    with pytest.raises(UserError, match="none of the 1 clips has any: use --backend=openai"):
        run(out, backend="template")
    assert (out / "annotations.jsonl").read_bytes() == before
