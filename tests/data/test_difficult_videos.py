"""Videos and pictures of kinds that are easily read wrong give the frames of plain decoding, here and in PyTorch."""

import io

import av
import numpy as np
import pytest

from favchat_jax.convert.pytorch.video_favchat import read_frames
from favchat_jax.data import video
from favchat_jax.data.colour import tone_mapped
from favchat_jax.data.picture import RESIZING
from favchat_jax.data.video import VideoError, decode, frame_indices
from tests.data import difficult_videos as make
from tests.data.video_files import encode_video, numbered_picture, read_number

AV1 = dict(codec="libsvtav1", frames=60, options={"preset": "8", "svtav1-params": "keyint=20:lp=1"})
REFRESH = {"x264-params": "intra-refresh=1:keyint=30:bframes=0"}
TWO_HALVES = [*range(40), *range(200, 240)]


def two_streams(**second) -> bytes:
    first = encode_video(40, container="mpegts")
    return first + encode_video(40, container="mpegts", picture=make.from_number(200), **second)


# A file, and the numbers that its frames show in order.
DIFFICULT = {
    "AV1 in mp4": (lambda: encode_video(**AV1), range(60)),
    "AV1 in WebM": (lambda: encode_video(**AV1, container="webm"), range(60)),
    "mp4 with an edit list": (lambda: make.trimmed("mp4"), range(10, 60)),
    "mov with an edit list": (lambda: make.trimmed("mov"), range(10, 60)),
    "HEVC mp4 with an edit list": (lambda: make.trimmed("mp4", codec="libx265", options={"g": "60"}), range(10, 60)),
    "intra refresh in mp4": (lambda: encode_video(120, options=REFRESH), range(120)),
    "intra refresh in MPEG-TS": (lambda: encode_video(120, options=REFRESH, container="mpegts"), range(120)),
    "begun within a group": (
        lambda: make.copied(encode_video(60, options={"g": "30", "bf": "0"}), "matroska", lambda all: all[12:]),
        range(30, 60),
    ),
    "two joined MPEG-TS files": (two_streams, TWO_HALVES),
    "joined MPEG-TS files of two sizes": (lambda: two_streams(width=160, height=128), TWO_HALVES),
    "H.264 with B-frames in AVI": (lambda: encode_video(40, container="avi", options={"bf": "3"}), range(40)),
    "frames that share a time": (make.sharing_times, range(40)),
    "more frames than FLV's milliseconds": (lambda: encode_video(60, container="flv", rate=2000), range(60)),
    "MPEG-2 in MPEG-PS": (
        lambda: encode_video(40, codec="mpeg2video", container="mpeg", options={"bf": "2"}),
        range(40),
    ),
}


@pytest.fixture(scope="module", params=DIFFICULT)
def difficult(request) -> tuple[bytes, list[int]]:
    file, shown = DIFFICULT[request.param]
    return file(), list(shown)


@pytest.mark.parametrize("kept", [video.KEPT_BYTES, 0])
@pytest.mark.parametrize("frames", [5, 16])
def test_sampled_frames_are_those_of_plain_decoding(difficult, frames, kept, monkeypatch):
    monkeypatch.setattr(video, "KEPT_BYTES", kept)
    file, shown = difficult
    clip = decode(file, frames=frames, size=96)
    with av.open(io.BytesIO(file)) as container:
        every = list(video.read_frames(container, container.streams.video[0]))
    wanted = frame_indices(len(every), frames).tolist()
    plain = [every[i].reformat(96, 96, "rgb24", interpolation=RESIZING, threads=1).to_ndarray() for i in wanted]
    assert [read_number(picture) for picture in clip.frames] == [shown[i] for i in wanted]
    np.testing.assert_allclose(clip.frames, plain, atol=0 if every[0].width != 96 else 8)
    assert (np.diff(clip.seconds) > 0).all()


def test_the_exported_model_reads_the_same_pixels(difficult):
    for frames, size in ((5, 64), (16, 96)):
        ours = decode(difficult[0], frames=frames, size=size).frames
        np.testing.assert_array_equal(read_frames(difficult[0], frames, size), ours)


PICTURE = numbered_picture(5, 120, 96)
PROFILE = (make.COLOUR_PROFILE, (b"eXIf", make.exif(1)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("encode", [make.jpeg, make.webp])
def test_a_photo_is_shown_as_its_orientation_says(encode, orientation):
    clip = decode(encode(PICTURE, orientation), frames=2, size=96)
    assert [read_number(picture) for picture in clip.frames] == [5, 5]
    assert clip.frames[0, -5:].mean() > clip.frames[0, 60:65].mean() + 30  # the lighter ground is at the bottom
    np.testing.assert_array_equal(read_frames(encode(PICTURE, orientation), 2, 96), clip.frames)


@pytest.mark.parametrize("chunks", [PROFILE[:1], PROFILE[1:], PROFILE], ids=["profile", "EXIF", "both"])
def test_a_png_with_a_colour_profile_or_exif_is_read(chunks):
    file = make.png(PICTURE, *chunks)
    np.testing.assert_array_equal(
        decode(file, frames=1, size=96).frames, decode(make.png(PICTURE), frames=1, size=96).frames
    )
    np.testing.assert_array_equal(read_frames(file, 1, 96), decode(file, frames=1, size=96).frames)


def test_an_animated_webp_is_not_called_damaged():
    pictures = encode_video(5, codec="libwebp_anim", container="webp", pixels="yuv420p")
    with pytest.raises(VideoError, match="animated WebP; convert it to mp4 or GIF"):
        decode(pictures, frames=4, size=64)


@pytest.mark.parametrize("size", [64, 224])
def test_an_interlaced_frame_shows_one_moment(size):
    options = {"x264-params": "interlaced=1", "crf": "10"}
    file = encode_video(8, width=320, height=480, options=options, picture=make.of_fields)
    clip = decode(file, frames=2, size=size)
    rows = clip.frames[0].astype(int).mean(-1)
    assert np.abs(rows[0::2] - rows[1::2]).mean() < 5
    assert rows.std() > 30, "the bar is there"
    np.testing.assert_array_equal(read_frames(file, 2, size), clip.frames)


def plain_colour(colour: tuple[int, int, int]):
    return lambda _, width, height: np.full((height, width, 3), colour, np.uint8)


def in_matrix(colour: tuple[int, int, int], matrix: str, width: int, height: int, tag: str | None) -> bytes:
    """Encodes pictures of one colour, converted by a matrix; `tag` is the matrix that the stream states, if any."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25, options={"x264-params": f"colormatrix={tag}"} if tag else {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        picture = av.VideoFrame.from_ndarray(plain_colour(colour)(0, width, height), format="rgb24")
        for number in range(3):
            frame = picture.reformat(format="yuv420p", dst_colorspace=matrix)
            frame.pts, frame.colorspace = number, 2
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


ORANGE = (220, 120, 40)
COLOURS = {
    "HD is BT.709": ("ITU709", 1280, 720, None),
    "upright HD is BT.709": ("ITU709", 608, 1080, None),
    "SD is BT.601": ("ITU601", 640, 480, None),
    "tagged SD": ("ITU709", 320, 240, "bt709"),
    "tagged HD": ("ITU601", 1280, 720, "smpte170m"),
    "BT.2020 with constant luminance": ("BT2020", 320, 240, "bt2020c"),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_those_of_the_matrix(name):
    file = in_matrix(ORANGE, *COLOURS[name])
    pictures = decode(file, frames=2, size=64).frames
    np.testing.assert_allclose(pictures.reshape(-1, 3).astype(int), np.tile(ORANGE, (2 * 64 * 64, 1)), atol=3)
    np.testing.assert_array_equal(read_frames(file, 2, 64), pictures)


@pytest.mark.parametrize("tag", ["YCgCo", "ictcp", "chroma-derived-c"])
def test_a_matrix_that_cannot_be_converted_is_taken_for_untagged(tag):
    file = encode_video(12, options={"x264-params": f"colormatrix={tag}"})
    assert [read_number(picture) for picture in decode(file, frames=3, size=96).frames] == frame_indices(12, 3).tolist()


PQ, HLG = 16, 18
# Signals of 10 bits, and the values that a display of 203 cd/m2 and gamma 2.4 needs: by hand from SMPTE ST 2084 and
# ITU-R BT.2100. 20 and 100 cd/m2 lie below the knee; 10,000 cd/m2 is white.
GREYS = {PQ: ((0.0, 0), (0.3570, 97), (0.5081, 190), (1.0, 255)), HLG: ((0.0, 0), (1.0, 255))}


@pytest.mark.parametrize("transfer", GREYS)
def test_tone_mapping_keeps_what_a_standard_display_shows_and_rolls_off_the_rest(transfer):
    for signal, expected in GREYS[transfer]:
        grey = tone_mapped(np.full((2, 2, 3), round(signal * 65535), np.uint16), transfer, primaries=9)
        assert np.abs(grey.astype(int) - expected).max() <= 1
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None, :, None].repeat(3, 2)
    mapped = tone_mapped(ramp, transfer, primaries=9)[0, :, 0].astype(int)
    assert (np.diff(mapped) >= 0).all() and len(set(mapped[mapped > 190])) > 20, "bright parts stay apart"


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_mapped_the_same_way_in_the_exported_model(transfer):
    tags = f"log-level=none:transfer={transfer}:colorprim=bt2020:colormatrix=bt2020nc"
    file = encode_video(4, codec="libx265", pixels="yuv420p10le", options={"x265-params": tags}, width=128, height=64)
    clip = decode(file, frames=2, size=64)
    np.testing.assert_array_equal(read_frames(file, 2, 64), clip.frames)
    untagged = decode(encode_video(4, codec="libx265", pixels="yuv420p10le", width=128, height=64), frames=2, size=64)
    assert np.abs(clip.frames.astype(int) - untagged.frames).mean() > 5


def test_damaged_packets_are_counted_and_left_out():
    file = encode_video(60, container="matroska", options={"g": "1"})
    assert decode(file, frames=4, size=96).damaged == 0

    def broken(packets: list[av.Packet]) -> list[av.Packet]:
        for number in (0, 30):
            packet = av.Packet(b"\0\0\0\5" + bytes([0x65]) + b"\xff" * 4)
            packet.pts, packet.dts, packet.time_base = (
                packets[number].pts,
                packets[number].dts,
                packets[number].time_base,
            )
            packet.is_keyframe = True
            packets[number] = packet
        return packets

    clip = decode(make.copied(file, "matroska", broken), frames=58, size=96)
    assert clip.damaged == 2
    assert [read_number(picture) for picture in clip.frames] == [*range(1, 30), *range(31, 60)]


@pytest.mark.parametrize("read", [lambda file: decode(file, frames=1, size=64), lambda file: read_frames(file, 1, 64)])
def test_a_jpeg_without_its_second_half_is_refused_and_one_with_more_after_its_end_is_read(read):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    whole = make.jpeg(noise, 1)
    with pytest.raises(ValueError, match="can be decoded|truncated|no video"):
        read(whole[: len(whole) // 2])
    read(whole), read(whole + bytes(50)), read(whole[:-2])
