import io
import statistics
import struct
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import Interpolation

from favchat_jax.data import keyframes, picture, video
from favchat_jax.data.video import Augment, VideoError, decode, frame_indices
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.errors import UserError
from tests.data.video_files import audio_only, encode_video, numbered_picture, read_number

IRREGULAR = [0, 10, 40, 41, 200, 201, 500, 900, 1000, 1500, 1600, 1700]  # milliseconds
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"
LOSSLESS = dict(codec="ffv1", container="matroska", pixels="bgr0")
FORMATS = {
    "h264": dict(),
    "h264 with many keyframes": dict(frames=60, options={"g": "5", "bf": "2"}),
    "h264 of keyframes only": dict(options={"g": "1"}),
    "h264 with open groups": dict(frames=90, options={"x264-params": OPEN_GOP}),
    "h264 stream without times": dict(container="h264"),
    "h264 in mpeg-ts": dict(container="mpegts", frames=60),
    "h264 in matroska": dict(container="matroska", frames=60, options={"g": "7"}),
    "hevc": dict(codec="libx265", frames=60, options={"g": "10"}),
    "hevc with open groups": dict(codec="libx265", frames=90, options={"x265-params": f"log-level=none:{OPEN_GOP}"}),
    "hevc of ten bits": dict(codec="libx265", pixels="yuv420p10le"),
    "odd sides": dict(width=97, height=131, pixels="yuv444p"),
    "vp9": dict(codec="libvpx-vp9", container="webm", options={"deadline": "realtime", "cpu-used": "8"}),
    "mjpeg avi": dict(codec="mjpeg", container="avi", pixels="yuvj420p"),
    "mjpeg mov": dict(codec="mjpeg", container="mov", pixels="yuvj420p"),
    "mpeg4 avi with reordered frames": dict(codec="mpeg4", container="avi", frames=40, options={"bf": "2"}),
    "gif": dict(codec="gif", container="gif", pixels="rgb8"),
    "portrait": dict(width=64, height=176),
    "variable frame rate": dict(frames=12, times=IRREGULAR),
    "one frame": dict(frames=1),
}


def numbers(clip: video.Clip) -> list[int]:
    return [read_number(picture) for picture in clip.frames]


class Spy:
    """Counts the packets that the decoder gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.packets = 0
        original = keyframes.decode_packet

        def counted(packet: av.Packet) -> list[av.VideoFrame]:
            self.packets += 1
            return original(packet)

        monkeypatch.setattr(keyframes, "decode_packet", counted)


def test_middle_takes_the_middle_frame_of_each_equal_interval():
    assert frame_indices(24, 8).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    # edges 0, 3, 6, 10 (10/3 and 20/3 rounded down)
    assert frame_indices(10, 3).tolist() == [1, 4, 7]


def test_rand_takes_any_frame_of_each_interval_and_no_other():
    rng = np.random.default_rng(0)
    drawn = np.stack([frame_indices(10, 3, "rand", rng) for _ in range(300)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]


@pytest.mark.parametrize("sampling", ["middle", "rand"])
def test_a_short_clip_gives_all_its_frames_and_then_its_last_one(sampling):
    assert frame_indices(3, 6, sampling, np.random.default_rng(0)).tolist() == [0, 1, 2, 2, 2, 2]


def test_an_unknown_sampling_is_a_user_error():
    with pytest.raises(UserError, match="'middle' or 'rand'"):
        frame_indices(8, 4, "uniform")


@pytest.mark.parametrize(("frames", "kept"), [(5, video.KEPT_BYTES), (16, video.KEPT_BYTES), (16, 0)])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_exactly_the_requested_frames(name, frames, kept, monkeypatch):
    monkeypatch.setattr(video, "KEPT_BYTES", kept)
    made = FORMATS[name]
    clip = decode(encode_video(**made), frames=frames, size=96)
    assert clip.frames.shape == (frames, 96, 96, 3) and clip.frames.dtype == np.uint8
    assert numbers(clip) == frame_indices(made.get("frames", 24), frames).tolist()


@pytest.mark.parametrize("name", ["h264", "h264 with open groups", "hevc with open groups", "vp9"])
def test_skipping_frames_while_decoding_does_not_change_the_others(name):
    file = encode_video(**{**FORMATS[name], "picture": noise})
    clip = decode(file, frames=9, size=64)
    with av.open(io.BytesIO(file)) as container:
        every = list(container.decode(video=0))
    expected = [
        every[i].reformat(64, 64, "rgb24", interpolation=picture.RESIZING, threads=1).to_ndarray()
        for i in frame_indices(len(every), 9)
    ]
    np.testing.assert_array_equal(clip.frames, expected)


def noise(number: int, width: int, height: int) -> np.ndarray:
    coarse = np.random.default_rng(number // 3).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return np.roll(coarse.repeat(8, 0).repeat(8, 1), 3 * (number % 3), axis=1)


def test_a_path_and_its_bytes_give_the_same_frames(tmp_path):
    file = encode_video()
    (tmp_path / "a: clip.mp4").write_bytes(file)
    from_path = decode(tmp_path / "a: clip.mp4", frames=8, size=64)
    np.testing.assert_array_equal(from_path.frames, decode(file, frames=8, size=64).frames)


def test_seconds_are_the_times_of_the_frames_at_a_variable_frame_rate():
    clip = decode(encode_video(12, times=IRREGULAR), frames=12, size=64)
    np.testing.assert_allclose(clip.seconds, np.array(IRREGULAR) / 1000, atol=1e-3)


@pytest.mark.parametrize("kept", [video.KEPT_BYTES, 0])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_sampling_sixteen_frames_does_not_decode_all_ten_minutes(container, kept, monkeypatch):
    monkeypatch.setattr(video, "KEPT_BYTES", kept)
    frames = 1200  # at two a second
    file = encode_video(frames, rate=2, container=container, options={"preset": "ultrafast", "g": "40"})
    spy = Spy(monkeypatch)
    clip = decode(file, frames=16, size=96)
    assert numbers(clip) == frame_indices(frames, 16).tolist()
    assert clip.seconds[-1] == pytest.approx(frame_indices(frames, 16)[-1] / 2)
    assert spy.packets <= 16 * 40 / 2 * 1.4


def test_nothing_is_decoded_after_the_last_requested_frame(monkeypatch):
    spy = Spy(monkeypatch)
    decode(encode_video(100, options={"bf": "0"}), frames=1, size=64)
    assert spy.packets == 50  # frame 49 is the middle of 100


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotation_metadata_is_applied(turns):
    stored = encode_video(
        width=64 if turns % 2 else 128,
        height=128 if turns % 2 else 64,
        rotation=90 * turns,
        picture=lambda number, width, height: np.rot90(
            numbered_picture(number, *((height, width) if turns % 2 else (width, height))), -turns
        ).copy(),
    )
    clip = decode(stored, frames=6, size=96)
    assert numbers(clip) == frame_indices(24, 6).tolist()
    assert clip.frames[0, -5:].mean() > clip.frames[0, 60:65].mean() + 30  # the lighter ground is at the bottom


def test_metadata_that_are_not_utf8_do_not_matter():
    video = encode_video()
    assert b"Lavf" in video  # the muxer's name is in the metadata
    assert (
        numbers(decode(video.replace(b"Lavf", b"\xe9\xe8\xff\xe0"), frames=6, size=96)) == frame_indices(24, 6).tolist()
    )


def test_a_mirrored_display_matrix_is_applied():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        stream.set_display_matrix([-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30])
        picture = np.ascontiguousarray(numbered_picture(5, 96, 96)[:, ::-1])
        output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    assert numbers(decode(file.getvalue(), frames=1, size=96)) == [5]


def test_frames_are_resized_with_the_bicubic_filter():
    picture = noise(0, 96, 96)
    file = encode_video(1, **LOSSLESS, picture=lambda *_: picture)
    ours = decode(file, frames=1, size=64).frames[0]
    source = av.VideoFrame.from_ndarray(picture, format="rgb24")
    error = {
        kind: np.abs(ours - source.reformat(64, 64, interpolation=kind).to_ndarray().astype(float)).mean()
        for kind in (Interpolation.BICUBIC, Interpolation.BILINEAR)
    }
    assert error[Interpolation.BICUBIC] < 1 < error[Interpolation.BILINEAR]


def ramp(number: int, width: int, height: int) -> np.ndarray:
    """Draws a picture whose red grows to the right and whose green grows downwards."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, width)
    picture[..., 1] = np.linspace(0, 255, height)[:, None]
    return picture


def test_a_random_crop_is_a_part_of_the_picture_of_the_drawn_area_and_shape():
    file = encode_video(4, **LOSSLESS, width=160, height=120, picture=ramp)
    places = set()
    for seed in range(30):
        augment = Augment(scale=(0.25, 0.5))
        frames = decode(file, frames=4, size=64, rng=np.random.default_rng(seed), augment=augment).frames
        assert (frames == frames[0]).all(), "one crop a clip"
        red, green = frames[0, ..., 0].mean(0), frames[0, ..., 1].mean(1)
        width, height = (red[-3] - red[2]) / 59 * 64 / 255 * 160, (green[-3] - green[2]) / 59 * 64 / 255 * 120
        assert 0.25 - 0.03 < width * height / (160 * 120) < 0.5 + 0.03
        assert 0.7 < width / height < 1.4
        assert red[-1] > red[0], "not mirrored"
        places.add((round(red[0]), round(green[0])))
    assert len(places) > 20


def test_flip_mirrors_about_half_of_the_clips_and_all_frames_of_a_clip():
    file = encode_video(2, **LOSSLESS, picture=ramp)
    mirrored = []
    for seed in range(40):
        clip = decode(file, frames=2, size=64, rng=np.random.default_rng(seed), augment=Augment(flip=True))
        left_to_right = clip.frames[:, 32, -1, 0].astype(int) - clip.frames[:, 32, 0, 0]
        assert abs(np.sign(left_to_right).sum()) == 2
        mirrored.append(left_to_right[0] < 0)
    assert 8 < sum(mirrored) < 32


def test_a_crop_of_a_rotated_very_long_picture_is_square_and_inside_it():
    file = encode_video(3, width=320, height=32, rotation=90)
    clip = decode(file, frames=3, size=48, rng=np.random.default_rng(0), augment=Augment())
    assert clip.frames.shape == (3, 48, 48, 3)


def test_the_same_generator_gives_the_same_clip():
    file = encode_video(60)
    first, second = (
        decode(file, frames=8, size=64, sampling="rand", rng=np.random.default_rng(7), augment=Augment())
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.frames, second.frames)


def of_zero_length(container: str, **options: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.open()
        output.start_encoding()
    return file.getvalue()


BAD_FILES = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"this is not a video\n" * 50, "cannot be read as a video"),
    "truncated before its index": (lambda: encode_video()[:-400], "cannot be read as a video"),
    "only the head of it": (lambda: encode_video()[:40], "cannot be read as a video"),
    "audio only": (audio_only, "no video stream"),
    "mp4 of zero length": (lambda: of_zero_length("mp4"), "no video stream"),
    "fragmented mp4 of zero length": (lambda: of_zero_length("mp4", movflags="empty_moov"), "no video frames"),
    "matroska of zero length": (lambda: of_zero_length("matroska"), "cannot be read as a video"),
    "avi of zero length": (lambda: of_zero_length("avi"), "no video frames"),
    "1x1": (
        lambda: encode_video(3, **LOSSLESS, width=1, height=1),
        "1x1 pixels",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(name, tmp_path):
    make, expected = BAD_FILES[name]
    path = tmp_path / "bad.mp4"
    path.write_bytes(make())
    with pytest.raises(VideoError) as caught:
        decode(path, frames=4, size=64)
    assert expected in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(VideoError, match="^clip 17 "):
        decode(path.read_bytes(), frames=4, size=64, name="clip 17")


def test_a_missing_file_a_folder_and_an_unreadable_path_are_named(tmp_path):
    with pytest.raises(VideoError, match="nowhere.mp4 does not exist"):
        decode(tmp_path / "nowhere.mp4", frames=4, size=64)
    with pytest.raises(VideoError, match="is a folder"):
        decode(str(tmp_path), frames=4, size=64)
    with pytest.raises(VideoError, match="does not exist"):
        decode("http://example.invalid/clip.mp4", frames=4, size=64)


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(2))
    monkeypatch.setattr(video.os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(VideoError, match="clip.mp4 cannot be read: check its permissions"):
        decode(path, frames=4, size=64)


def test_a_playlist_named_mp4_reaches_no_other_file(tmp_path):
    (tmp_path / "secret.ts").write_bytes(encode_video(4, container="mpegts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    with pytest.raises(VideoError):
        decode(playlist.encode(), frames=2, size=64, name="upload")


def test_a_truncated_video_gives_its_remaining_frames():
    intact = encode_video(90, container="matroska", options={"g": "10"}, picture=noise)
    clip = decode(intact[: len(intact) * 2 // 3], frames=8, size=64)
    assert clip.frames.shape == (8, 64, 64, 3)
    assert 0.5 < clip.seconds[-1] < 2.7, "sampled over the part that is left"


def with_index_first(mp4: bytes) -> bytes:
    """An mp4 file with its index before the frames, as for streaming."""
    boxes, place = {}, 0
    while place < len(mp4):
        size, kind = struct.unpack_from(">I4s", mp4, place)
        boxes[kind], place = mp4[place : place + size], place + size
    index = bytearray(boxes.pop(b"moov"))
    offsets = index.index(b"stco") + 8
    for entry in range(offsets + 4, offsets + 4 + 4 * struct.unpack_from(">I", index, offsets)[0], 4):
        struct.pack_into(">I", index, entry, struct.unpack_from(">I", index, entry)[0] + len(index))
    return boxes.pop(b"ftyp") + bytes(index) + b"".join(boxes.values())


@pytest.mark.parametrize("at", ["a packet", "the middle of one"])
@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_frames_beyond_the_end_of_a_truncated_mp4_are_counted(at, kind, tmp_path, caplog):
    whole = with_index_first(encode_video(90, options={"g": "10", "bf": "0"}, picture=noise))
    with av.open(io.BytesIO(whole)) as container:
        end = container.streams.video[0].index_entries[60]
    cut = whole[: end.pos + (0 if at == "a packet" else end.size // 2)]
    (tmp_path / "clip.mp4").write_bytes(cut)
    found = decode(cut if kind == "bytes" else tmp_path / "clip.mp4", frames=8, size=64, name=f"{at}, {kind}")
    assert found.damaged >= 30 and found.seconds[-1] < 60 / 25
    assert f"{at}, {kind}: {found.damaged} damaged or missing frames" in caplog.text
    assert decode(whole, frames=8, size=64).damaged == 0


def test_damaged_bytes_in_the_middle_do_not_stop_decoding():
    file = bytearray(encode_video(60, options={"g": "10"}, picture=noise))
    file[len(file) // 2 : len(file) // 2 + 300] = b"\xff" * 300
    assert decode(bytes(file), frames=8, size=64).frames.shape == (8, 64, 64, 3)


def opencv(path: Path, frames: int, size: int) -> np.ndarray:
    """Decodes the same frames with OpenCV's fastest method: it skips unwanted frames, on one thread."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    wanted = frame_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), frames).tolist()
    pictures = []
    for index in range(wanted[-1] + 1):
        capture.grab()
        if index in wanted:
            resized = cv2.resize(capture.retrieve()[1], (size, size), interpolation=cv2.INTER_CUBIC)
            pictures.append(cv2.cvtColor(resized, cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(pictures)


def median_milliseconds(work: list, repeats: int) -> list[float]:
    """Times the functions in turn, so that other load on the machine affects them equally."""
    times = [[] for _ in work]
    for _ in range(repeats):
        for function, into in zip(work, times, strict=True):
            begin = time.perf_counter()
            function()
            into.append(1000 * (time.perf_counter() - begin))
    return [statistics.median(each) for each in times]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rendered faces, 128x128, 16 frames", "1280x720, 120 frames"])
def test_decoding_is_at_least_as_fast_as_opencv(kind, tmp_path):
    if kind.startswith("rendered"):
        files, size, repeats = [rendered_faces.render(0, "train", number).clip for number in range(8)], 64, 40
    else:
        files, size, repeats = [encode_video(120, width=1280, height=720, picture=noise)], 224, 11
    paths = [tmp_path / f"{number}.mp4" for number in range(len(files))]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    cv2.setNumThreads(1)
    work = [
        lambda: [decode(path, frames=8, size=size) for path in paths],
        lambda: [opencv(path, 8, size) for path in paths],
    ]
    ours, theirs = (each / len(paths) for each in median_milliseconds(work, repeats))
    print(f"{kind}, 8 taken at {size}: ours {ours:.2f} ms, OpenCV {theirs:.2f} ms")
    assert ours <= theirs
