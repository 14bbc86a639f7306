import shutil
import subprocess
import sys

import flax.linen as nn
import numpy as np
import pytest

import favchat_jax
from favchat_jax.data.faces.detectors import centerface_file
from favchat_jax.data.sources import open_dataset
from favchat_jax.errors import UserError
from favchat_jax.generation.sampler import Sampling
from tests.conftest import ROOT
from tests.data.face_videos import beside, rendered, video
from tests.data.video_files import encode_video

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


def test_a_second_start_with_a_cache_traces_nothing_and_answers_the_same(model, clips, trained, tmp_path, monkeypatch):
    def said(asked_model):
        question = "Which hair?"
        pieces = asked_model.stream(clips[0], question, max_new_tokens=5)
        return asked_model.answer(clips[0], question), "".join(pieces), asked_model.stream_weights(clips[0], question)

    first = said(favchat_jax.load(trained.folder / "stage3", cache=tmp_path))
    assert first == said(model)
    monkeypatch.setattr(nn.Module, "apply", lambda *_, **__: pytest.fail("the model is traced again"))
    monkeypatch.setattr(nn.Module, "init", lambda *_, **__: pytest.fail("the weights' shapes are traced again"))
    assert said(favchat_jax.load(trained.folder / "stage3", cache=tmp_path)) == first


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
        ([0, 1], ["Which hair?"], "2 videos, 1 questions: give one for each video, or one for all"),
        (b"", "Which hair?", "the video is empty"),
    ],
)
def test_what_cannot_be_answered_is_a_user_error(model, clips, video, question, message):
    video = [clips[i] for i in video] if isinstance(video, list) else clips[video] if video == 0 else video
    with pytest.raises(favchat_jax.UserError, match=message):
        model.answer(video, question)


OUT_OF_RANGE = {
    "max_new_tokens": (0, -1, 10**9),
    "temperature": (-1.0, float("nan"), float("inf")),
    "top_p": (-0.1, 2.0, float("nan")),
    "seed": (2**64, -(2**64)),
    "top_k": (-1,),
    "repetition_penalty": (0.0, -1.0, float("nan")),
    "stop": ("", ["one", ""]),
}


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_an_option_out_of_range_is_a_user_error_that_names_it(model, clips, option):
    for value in OUT_OF_RANGE[option]:
        with pytest.raises(favchat_jax.UserError, match=f"^{option}="):
            model.answer(clips[0], "Which hair?", **{option: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "Which hair?"), "a video is a path, the bytes of a file or an EncodedClip, not NoneType"),
        ((0, None), "a question is text, not NoneType"),
        ((0, ["Which hair?", b"why"]), "a question is text, not bytes"),
    ],
)
def test_an_argument_of_another_type_is_named(model, clips, arguments, message):
    video, question = arguments
    with pytest.raises(TypeError, match=message):
        model.answer(clips[0] if video == 0 else video, question)


def test_a_checkpoint_that_is_no_path_and_a_cache_that_is_no_folder_are_refused(tmp_path):
    with pytest.raises(TypeError, match="a checkpoint is a path, not NoneType"):
        favchat_jax.load(None)
    with pytest.raises(favchat_jax.UserError, match="is empty text"):
        favchat_jax.load("")
    (tmp_path / "file").touch()
    with pytest.raises(favchat_jax.UserError, match="cache=.*file cannot be a folder"):
        favchat_jax.load(tmp_path, cache=tmp_path / "file")


def test_a_storage_and_a_mesh_that_are_none_are_refused(tmp_path):
    with pytest.raises(favchat_jax.UserError, match="storage=int3 is unknown: choose one of full, int8, int4"):
        favchat_jax.load(tmp_path, storage="int3")
    with pytest.raises(favchat_jax.UserError, match="mesh has the unknown axis model: the axes are data, fsdp, tensor"):
        favchat_jax.load(tmp_path, mesh={"model": 2})
    with pytest.raises(TypeError, match="a mesh is a mapping from axes to numbers of devices"):
        favchat_jax.load(tmp_path, mesh="data=2")
    with pytest.raises(favchat_jax.UserError, match="data"):
        favchat_jax.load(tmp_path, mesh={"data": 0})


def test_narrow_answers_are_answers(trained, clips):
    narrow = favchat_jax.load(trained.folder / "stage3", storage="int8", mesh={"data": 1})
    assert isinstance(narrow.answer(clips[0], "Which hair?", max_new_tokens=4), str)


@pytest.mark.parametrize("history", ["hi", ["ab"], [("Which hair?",)], None, [("Which hair?", None)]])
def test_a_history_that_is_no_list_of_pairs_is_named(model, clips, history):
    with pytest.raises(TypeError, match="history is a list of pairs of texts"):
        model.answer(clips[0], "And eyes?", history=history)


def test_an_unknown_option_is_named_with_those_there_are(model, clips):
    with pytest.raises(
        TypeError,
        match="unknown option beams: the options are face_crop, face, max_new_tokens, temperature, top_p, top_k, ",
    ):
        model.answer(clips[0], "Which hair?", beams=3)


def test_one_stop_text_or_several_end_an_answer(model, clips):
    def said(seed, **how):
        return model.answer(clips[0], "Which hair?", temperature=2.0, seed=seed, **how)

    seed, whole = next((seed, text) for seed in range(20) if len(text := said(seed)) > 4)
    for stop in (whole[3], [whole[3]], ("never there", whole[3])):
        assert said(seed, stop=stop) == whole[: whole.index(whole[3])].strip()


def test_a_stream_is_refused_when_it_is_asked_for_and_has_no_empty_pieces(model, clips):
    with pytest.raises(favchat_jax.UserError, match="nowhere.mp4"):
        model.stream("nowhere.mp4", "Which hair?")
    with pytest.raises(favchat_jax.UserError, match="the question is empty"):
        model.stream_weights(clips[0], " ")
    assert all(model.stream(clips[0], "Which hair?", temperature=1.5, seed=3))


def test_a_bad_video_among_many_is_named_by_its_number(model, clips):
    with open(clips[0], "rb") as file:
        good = file.read()
    with pytest.raises(favchat_jax.UserError, match="^video 2 of 3 "):
        model.answer([good, b"x", good], "Which hair?")


def test_encoded_clips_are_not_encoded_again_and_only_serve_their_model(model, clips, trained, monkeypatch):
    encoded = [model.encode(clip) for clip in clips]
    expected = model.answer(clips, "Which hair?", max_new_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(model.sampler, "encode", lambda frames: pytest.fail("encoded again"))
        assert model.answer(encoded, "Which hair?", max_new_tokens=4) == expected
    assert model.answer([encoded[0], *clips[1:]], "Which hair?", max_new_tokens=4) == expected
    other = favchat_jax.load(trained.folder / "stage3")
    with pytest.raises(favchat_jax.UserError, match="encoded by another model"):
        other.answer(encoded[0], "Which hair?")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> str:
    """A video of two faces side by side."""
    path = tmp_path_factory.mktemp("pair") / "pair.mp4"
    path.write_bytes(video(beside(rendered(12, 1), rendered(12, 4))))
    return str(path)


def test_the_facial_encoder_reads_the_face_that_is_asked_for(model, pair):
    whole, first, second = (model.encode(pair, **how) for how in ({}, {"face": 1}, {"face": 2}))
    assert whole.frames.shape[-1] == 3 and whole.tracks is None and len(first.tracks.tracks) == 2
    assert (first.frames[..., :3] == whole.frames).all() and (second.frames[..., :3] == whole.frames).all()
    assert (first.frames[..., 3:] != second.frames[..., 3:]).any()
    answers = [model.answer(pair, "Which hair?", max_new_tokens=4, **how) for how in ({"face": 2}, {"face_crop": True})]
    expected = [second, model.encode(pair, face_crop=True)]
    assert answers == [model.answer(clip, "Which hair?", max_new_tokens=4) for clip in expected]
    assert model.answer([pair, pair], "Which hair?", max_new_tokens=4, face=2) == answers[:1] * 2
    assert "".join(model.stream(pair, "Which hair?", max_new_tokens=4, face=2)).strip() == answers[0]


@pytest.mark.parametrize(
    "how, message",
    [
        ({"face": 3}, r"face=3: .*pair.mp4 has 2 faces: 1 \((left|right), .*choose one of these"),
        ({"face": 0}, "face=0: give the number of a face"),
        ({"face": True}, "face=True: give the number"),
        ({"face": "2"}, "face='2': give the number of a face, a whole number"),
        ({"face": 1, "face_crop": False}, "leave out face_crop=False"),
    ],
)
def test_a_face_that_cannot_be_read_is_refused(model, pair, how, message):
    with pytest.raises(UserError, match=message):
        model.answer(pair, "Which hair?", **how)


def test_a_clip_without_a_face_is_read_as_a_whole_with_a_warning(model, clips, tmp_path, caplog):
    path = tmp_path / "grey.mp4"
    path.write_bytes(encode_video(8, picture=lambda number, w, h: np.full((h, w, 3), 90, np.uint8)))
    clip = model.encode(path, face_crop=True)
    assert (clip.frames[..., 3:] == clip.frames[..., :3]).all() and clip.tracks.tracks == ()
    least = "10% of the picture's shorter side"
    assert f"{path} shows no face of at least {least}: the facial encoder reads whole frames" in caplog.text
    with pytest.raises(UserError, match="face=2: .*grey.mp4 has no face; leave out the number"):
        model.encode(path, face=2)


def test_a_number_of_a_face_may_be_of_numpy_and_a_crop_is_true_or_false(model, pair):
    assert len(model.encode(pair, face=np.int64(2)).tracks.tracks) == 2
    with pytest.raises(TypeError, match="face_crop is True, False or None, not str"):
        model.encode(pair, face_crop="no")


def test_another_detector_than_the_checkpoints_is_named_when_it_is_loaded(trained, pair, tmp_path):
    folder = trained.folder / "stage3"
    with pytest.raises(UserError, match="detector model gone.onnx: no such file"):
        favchat_jax.load(folder, detector_model="gone.onnx")
    with pytest.raises(UserError, match="name AntelopeV2's scrfd_10g_bnkps.onnx"):
        favchat_jax.load(folder, detector="scrfd")
    moved = shutil.copyfile(centerface_file(), tmp_path / "moved.onnx")
    found = favchat_jax.load(folder, detector_model=moved).encode(pair, face=1)
    assert len(found.tracks.tracks) == 2


def test_the_crop_of_an_encoded_clip_is_chosen_when_it_is_encoded(model, pair):
    with pytest.raises(UserError, match="give face_crop and face to `encode`"):
        model.answer(model.encode(pair), "Which hair?", face=1)
    assert len(model.answer([model.encode(pair), pair], "Which hair?", face_crop=None)) == 2
    with pytest.raises(UserError, match="encode all of them alike"):
        model.answer([model.encode(pair, face=1), pair], "Which hair?")


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
