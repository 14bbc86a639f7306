import subprocess
import sys

import numpy as np
import pytest

import favchat_jax
from favchat_jax.data.sources import open_dataset
from favchat_jax.generation.sampler import Sampling
from tests.conftest import ROOT

LONG = "why " * 400


@pytest.fixture(scope="module")
def model(trained) -> favchat_jax.Model:
    return favchat_jax.load(trained.folder / "stage3")


@pytest.fixture(scope="module")
def clips(small_world, tmp_path_factory) -> list[str]:
    folder, source = (
        tmp_path_factory.mktemp("clips"),
        open_dataset("rendered_faces/smoke", small_world.packed, "heldout"),
    )
    for i in range(3):
        (folder / f"{i}.mp4").write_bytes(source[i].clip)
    return [str(folder / f"{i}.mp4") for i in range(3)]


def test_the_two_lines_of_the_readme_answer(model, clips):
    clip = model.encode(clips[0])
    expected = model.sampler.answer(clip.features, [[[("Which hair?", None)]]], Sampling(max_new_tokens=7))[0][0]
    assert model.answer(clips[0], "Which hair?", max_new_tokens=7) == expected


def test_a_path_its_bytes_and_an_encoded_clip_give_the_same_answer(model, clips):
    with open(clips[0], "rb") as file:
        forms = [clips[0], file.read(), model.encode(clips[0])]
    assert len({model.answer(form, "Which hair?") for form in forms}) == 1


def test_pieces_of_a_streamed_answer_add_up_to_the_answer(model, clips):
    assert "".join(model.stream(clips[1], "What is seen?")).strip() == model.answer(clips[1], "What is seen?")


def test_many_questions_about_one_clip_are_answered_in_their_order(model, clips):
    questions = [f"Question number {i}?" for i in range(9)]  # more than one batch
    answers = model.answer(clips[0], questions, max_new_tokens=4)
    assert answers == [model.answer(clips[0], question, max_new_tokens=4) for question in questions]


def test_each_clip_of_a_list_gets_its_own_question(model, clips):
    questions = ["Which hair?", "Which eyes?", "What moves?"]
    expected = [model.answer(clip, asked, max_new_tokens=4) for clip, asked in zip(clips, questions, strict=True)]
    assert model.answer(clips, questions, max_new_tokens=4) == expected
    assert model.answer(clips * 3, questions * 3, max_new_tokens=4) == expected * 3


def test_one_question_is_asked_about_every_clip_of_a_list(model, clips):
    expected = [model.answer(clip, "Which hair?", max_new_tokens=4) for clip in clips]
    assert model.answer(clips, "Which hair?", max_new_tokens=4) == expected


def test_the_turns_before_a_question_are_read(model, clips):
    clip, history = model.encode(clips[0]), [("Which hair?", "brown")]
    expected = model.sampler.answer(clip.features, [[[*history, ("And eyes?", None)]]], Sampling())[0][0]
    assert model.answer(clip, "And eyes?", history=history) == expected


def test_stream_weights_of_v1_are_a_distribution_over_the_two_streams(model, clips):
    general, facial = model.stream_weights(clips[0], "Which hair?")
    assert 0 < general < 1 and general + facial == pytest.approx(1)


def test_an_encoded_clip_holds_the_frames_that_the_model_saw(model, clips):
    clip = model.encode(clips[0])
    size = model.sampler.image_size
    assert clip.frames.shape == (model.sampler.frames, size, size, 3) and clip.frames.dtype == np.uint8
    assert clip.seconds.shape == (model.sampler.frames,) and np.all(np.diff(clip.seconds) >= 0)


@pytest.mark.parametrize(
    ("video", "question", "message"),
    [
        ("nowhere.mp4", "Which hair?", "nowhere.mp4"),
        (0, "  ", "the question is empty"),
        (0, LONG, "over the limit"),
        ([0, 1], ["Which hair?"], "2 videos and 1 questions"),
    ],
)
def test_what_cannot_be_answered_is_a_user_error(model, clips, video, question, message):
    video = [clips[i] for i in video] if isinstance(video, list) else clips[video] if video == 0 else video
    with pytest.raises(favchat_jax.UserError, match=message):
        model.answer(video, question)


def test_a_folder_without_a_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(favchat_jax.UserError, match="config.json is missing"):
        favchat_jax.load(tmp_path)


def test_importing_the_package_is_light_and_the_api_needs_no_data_set_library():
    code = (
        "import sys, time; started = time.perf_counter(); import favchat_jax; took = time.perf_counter() - started;"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'tensorflow_datasets', 'grain', 'apache_beam'};"
        "first = sorted(heavy & sys.modules.keys()); favchat_jax.load;"
        "then = sorted({'tensorflow_datasets', 'torch', 'apache_beam', 'grain', 'tensorflow'} & sys.modules.keys());"
        "print(took < 3, first, then)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout.strip(), ended.stderr) == ("True [] []", "")


def test_every_public_name_is_there():
    assert all(hasattr(favchat_jax, name) for name in favchat_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = favchat_jax.nothing
