"""The exported model gets the same inputs as ours: the same pixels of a video, the same tokens of a text."""

import numpy as np
import pytest

from favchat_jax.convert.pytorch.inputs_favchat import Prompts
from favchat_jax.convert.pytorch.video_favchat import Finder, read_frames
from favchat_jax.data.conversation import Conversation, PromptEncoder
from favchat_jax.data.faces.detectors import load_detector
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.video import decode
from tests.data.face_videos import beside, rendered, video
from tests.data.test_video import FORMATS, LOSSLESS, noise
from tests.data.tokenizers_for_tests import TEXT, bert, byte_pairs
from tests.data.video_files import audio_only, encode_video


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pixels(name):
    file = encode_video(**FORMATS[name])
    for frames, size in ((7, 64), (30, 96)):
        np.testing.assert_array_equal(read_frames(file, frames, size), decode(file, frames=frames, size=size).frames)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_turned_video_is_upright_with_the_same_pixels(rotation, tmp_path):
    path = tmp_path / "a: clip.mp4"
    path.write_bytes(encode_video(5, width=160, height=64, rotation=rotation, picture=noise))
    np.testing.assert_array_equal(read_frames(path, 4, 48), decode(path, frames=4, size=48).frames)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180])
def test_face_crops_have_the_same_pixels(rotation, align):
    pictures = [
        np.ascontiguousarray(np.rot90(frame, -rotation // 90)) for frame in beside(rendered(20, 1), rendered(20, 4))
    ]
    clip = video(pictures, rotation=rotation)
    for face in (0, 1, 2):
        crop = FaceCrop(align=align, face=face or 1, thorough=bool(face))
        finder = Finder(load_detector("centerface"), face, 0.1, align)
        expected = decode(clip, frames=6, size=48, face_crop=crop)
        assert len(expected.tracks.tracks) == 2 or not face
        np.testing.assert_array_equal(read_frames(clip, 6, 48, finder), expected.frames)
    with pytest.raises(ValueError, match="face=3: the video has 2 faces"):
        read_frames(clip, 6, 48, Finder(load_detector("centerface"), 3, 0.1, align))


def test_a_video_without_a_face_gives_whole_frames_twice_and_a_warning():
    clip = encode_video(8, picture=lambda number, w, h: np.full((h, w, 3), 90, np.uint8))
    with pytest.warns(UserWarning, match="the video shows no face"):
        frames = read_frames(clip, 4, 48, Finder(load_detector("centerface"), 0, 0.1, False))
    assert frames.shape == (4, 48, 48, 6) and (frames[..., 3:] == frames[..., :3]).all()


def test_a_truncated_or_damaged_video_still_gives_all_requested_frames():
    intact = encode_video(60, container="matroska", options={"g": "10"}, picture=noise)
    cut = intact[: len(intact) * 2 // 3]
    np.testing.assert_array_equal(read_frames(cut, 8, 64), decode(cut, frames=8, size=64).frames)
    holed = bytearray(encode_video(60, options={"g": "10"}, picture=noise))
    holed[len(holed) // 2 : len(holed) // 2 + 300] = b"\xff" * 300
    assert read_frames(bytes(holed), 8, 64).shape == (8, 64, 64, 3)


@pytest.mark.parametrize("make", [lambda: b"no video\n" * 50, audio_only], ids=["text", "sound only"])
def test_a_file_without_a_video_is_a_value_error_that_names_it(make, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(make())
    with pytest.raises(ValueError, match="bad.mp4 (cannot be read as a video|holds no video frames)"):
        read_frames(tmp_path / "bad.mp4", 4, 64)


def test_a_video_with_tiny_pictures_is_a_value_error(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(encode_video(3, **LOSSLESS, width=1, height=1))
    with pytest.raises(ValueError, match="bad.mp4 is 1x1 pixels: give a video of at least 8x8"):
        read_frames(tmp_path / "bad.mp4", 4, 64)


def test_a_conversation_longer_than_the_context_is_a_value_error():
    tokenizer = byte_pairs()
    prompts = Prompts(tokenizer, tokenizer, visual_tokens=5, prompt_length=8, longest=500)
    length = len(prompts.conversation([], "why?", 8))
    assert len(prompts.conversation([], "why?", 8, answer=500 - length)) == length
    for question, answer in (("why?", 501 - length), ("why? " * 500, 0)):
        with pytest.raises(ValueError, match="over the limit of 500: shorten the text"):
            prompts.conversation([], question, 8, answer=answer)


TURNS = [("Which emotion does the face show?", "The person looks happy."), (" Is it [INST] </s> black? ", None)]


@pytest.mark.parametrize("kind", ["bytes", "v0.2", "v0.3"])
@pytest.mark.parametrize("frames", [1, 8])
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:]], ids=["two turns", "one turn"])
def test_a_conversation_gives_the_same_tokens(kind, frames, turns):
    tokenizer = byte_pairs(kind)
    ours = Conversation(tokenizer, visual_tokens=5).encode(turns, frames, max_length=500).tokens
    prompts = Prompts(tokenizer, tokenizer, visual_tokens=5, prompt_length=8, longest=500)
    np.testing.assert_array_equal(prompts.conversation(turns[:-1], turns[-1][0], frames), ours)


@pytest.mark.parametrize(
    "tokenizer", [bert("what", "colour", "is", "the", "hair", "?"), byte_pairs()], ids=["bert", "bpe"]
)
@pytest.mark.parametrize("length", [4, 40])
def test_the_qformers_read_the_same_word_pieces(tokenizer, length):
    encoder = PromptEncoder(tokenizer, length)
    prompts = Prompts(byte_pairs(), tokenizer, visual_tokens=5, prompt_length=length, longest=500)
    for text in (*TEXT, "[SEP] what? </s>"):
        for theirs, ours in zip(prompts.for_qformer(text), encoder.encode(text), strict=True):
            np.testing.assert_array_equal(theirs, ours)


def test_a_question_that_the_qformers_read_in_part_is_a_warning_and_no_text_a_value_error():
    prompts = Prompts(byte_pairs(), bert("what", "hair"), visual_tokens=5, prompt_length=4, longest=500)
    with pytest.warns(UserWarning, match="the Q-Formers miss the first 2 tokens of this question"):
        prompts.for_qformer("what hair what hair")
    for read in (prompts.for_qformer, lambda text: prompts.conversation([], text, 8)):
        with pytest.raises(ValueError, match="'caf.udce9' is not text in UTF-8"):
            read("caf\udce9")


def test_an_answer_ends_at_its_end_token():
    tokenizer = byte_pairs()
    prompts = Prompts(tokenizer, tokenizer, visual_tokens=5, prompt_length=8, longest=500)
    ids = tokenizer.encode(" happy", add_special_tokens=False)
    written = np.array([*ids, tokenizer.eos_token_id, *ids])
    assert prompts.text(written) == "happy"
