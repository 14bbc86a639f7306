"""Sampled frames of a video for FaVChat in PyTorch, as upright RGB squares; PyAV decodes them."""

import io
import os
import warnings
from fractions import Fraction

import numpy as np
import torch

try:
    import av
    from av.filter import Graph
    from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter
except ImportError:  # PyAV is only needed to read a video
    av = None

from .faces_favchat import LOOKS, cut, link, listing, search, squares

SMALLEST_SIDE = 8  # pixels; swscale's chroma filters fail below this, and such pictures show nothing


def frame_indices(total, frames):
    """Returns the middle frame of each of `frames` equal intervals of `total`; a short video repeats its last frame."""
    taken = min(total, frames)
    edges = [int(i * (total / taken)) for i in range(taken)] + [total]
    indices = [(begin + end - 1) // 2 for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    return indices + indices[-1:] * (frames - taken)


def read_frames(video, frames, size, finder=None):
    """Reads sampled frames of a video (path or bytes), upright, RGB, squashed: uint8 [frames, size, size, 3].

    With a `Finder`, three more channels hold the face in each frame. The video is decoded from start to end. Frames
    that cannot be decoded are left out before sampling. The number of packets nearly always is the number of frames;
    where it is not, the video is decoded once more.

    Raises:
        ValueError: no frame can be decoded, or the picture is too small.
    """
    if av is None:
        raise ImportError("reading a video needs PyAV: pip install 'av>=18', or pass the frames as an array")
    total = _count_packets(video)
    while True:
        wanted, squares, found, kept, count = frame_indices(max(total, 1), frames), None, {}, {}, 0
        with _open(video) as container:
            for frame in _decoded(container):
                if count in wanted:
                    squares = squares or _Squares(frame, size, _name(video))
                    found[count] = squares(frame)
                if finder and count in {*wanted, *_looks(total, frames)}:
                    kept[count] = frame
                count += 1
        if count == 0:
            raise ValueError(f"{_name(video)} holds no video frames that can be decoded: give an intact video file")
        if count == total:
            whole = np.stack([found[number] for number in wanted])
            faces = [finder.cut(kept, _looks(total, frames), wanted, whole, _name(video))] if finder else []
            return torch.from_numpy(np.concatenate([whole, *faces], axis=-1))
        total = count


def _looks(total, frames):
    return sorted(set(frame_indices(total, min(frames, LOOKS))))


class Finder:
    """Finds and follows the faces of a video, and cuts one out.

    Args:
        detector: of `load_detector`.
        face: number of the face, from 1; 0 takes the first face, and whole frames of a video without one.
        smallest: height of the smallest face that counts, as a share of the picture's shorter side.
        align: whether crops turn with the line between the eyes.
    """

    def __init__(self, detector, face, smallest, align):
        self.detector, self.face, self.smallest, self.align = detector, face, smallest, align

    def cut(self, frames, looks, wanted, whole, name):
        """Returns the face in the wanted frames [T, size, size, 3]; `frames` are decoded frames by number."""
        first, reformatter = frames[min(frames)], VideoReformatter()
        axes, stored = _display_axes(first), (first.height, first.width)
        height, width = stored[::-1] if abs(axes[0][1]) > abs(axes[0][0]) else stored

        def picture(number, shape):
            frame = frames[number]
            frame = _filtered(frame, ("field", "type=top")) if frame.interlaced_frame else frame
            way = Interpolation.AREA if shape[0] < stored[0] else Interpolation.BICUBIC
            return _as_shown(_to_rgb(reformatter, frame, shape, way), *axes)

        found = search(self.detector, looks, picture, stored, thorough=bool(self.face))
        found = [faces.at_least(self.smallest, height, width) for faces in found]
        tracks = link(found, looks, (height, width))
        if not tracks.tracks and self.face <= 1:
            warnings.warn(f"{name} shows no face: the facial encoder reads whole frames", stacklevel=2)
            return whole
        if self.face > len(tracks.tracks):
            advice = "choose one of these" if tracks.tracks else "leave out the number, and whole frames are read"
            raise ValueError(f"face={self.face}: {name} has {listing(tracks)}; {advice}")
        track, chosen = tracks.tracks[max(self.face, 1) - 1], sorted(set(wanted))
        around = squares(tracks, track, chosen, self.align)
        crops = {n: cut(picture(n, stored), square, whole.shape[1]) for n, square in zip(chosen, around, strict=True)}
        return np.stack([crops[number] for number in wanted])


def _as_shown(picture, x_axis, y_axis):
    if abs(x_axis[1]) > abs(x_axis[0]):
        picture, x_axis, y_axis = picture.swapaxes(0, 1), y_axis, x_axis
    return picture[:: -1 if y_axis[1] < 0 else 1, :: -1 if x_axis[0] < 0 else 1]


def _name(video):
    return "the video" if isinstance(video, bytes) else os.fspath(video)


def _open(video):
    try:
        # "file:" keeps a colon in a name from being read as a protocol; the white list keeps playlists off the network.
        source = io.BytesIO(video) if isinstance(video, bytes) else f"file:{os.fspath(video)}"
        # PyAV 18 cannot open a file whose metadata are not UTF-8 without this; PyAV 19 can, and has no such argument.
        lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        return av.open(source, options={"protocol_whitelist": "file"}, **lenient)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{_name(video)} cannot be read as a video ({error.strerror}): give a video file") from error


def _packets(container):
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:  # a cover picture is not a video
            break
    else:
        return
    if stream.codec_context is None:
        raise ValueError("the video uses a codec that this FFmpeg lacks: re-encode it, for example as H.264")
    stream.codec_context.thread_count = 1  # more would patch up damaged frames in another way
    if stream.codec_context.name == "mjpeg":  # it fills the missing part of a truncated JPEG with one colour
        stream.codec_context.options = {"err_detect": "explode"}
    reading = True
    while reading:
        reading = False
        try:
            yield from container.demux(stream)
        except IndexError:  # PyAV fails at a packet of a stream that begins later in the file; the next is read
            reading = True
        except av.error.FFmpegError:
            return  # a truncated file: its first part is still usable


def _count_packets(video):
    with _open(video) as container:
        return sum(packet.size > 0 and not packet.is_discard for packet in _packets(container))


def _decoded(container):
    for packet in _packets(container):
        try:
            yield from packet.decode()
        except av.error.FFmpegError:  # a damaged part: the frames around it may still be usable
            continue


class _Squares:
    """Turns the decoded frames of a clip into upright squares, by the display matrix of one of them."""

    def __init__(self, frame, size, name):
        if min(frame.width, frame.height) < SMALLEST_SIDE:
            small, limit = f"{frame.width}x{frame.height}", f"{SMALLEST_SIDE}x{SMALLEST_SIDE}"
            raise ValueError(f"{name} is {small} pixels: give a video of at least {limit}")
        self.axes, self.size, self.reformatter = _display_axes(frame), size, VideoReformatter()

    def __call__(self, frame):
        if frame.interlaced_frame:  # one field shows one moment
            frame = _filtered(frame, ("field", "type=top"))
        # Full chroma resolution keeps small coloured detail.
        same = (frame.width, frame.height) == (self.size, self.size)
        how = Interpolation.BICUBIC if same else Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
        return _as_shown(_to_rgb(self.reformatter, frame, (self.size, self.size), how), *self.axes)


def _display_axes(frame):
    """Returns the displayed directions of the stored picture's x and y axes: right is (1, 0), down is (0, 1)."""
    # PyAV 18 crashes on a colour profile with a name, and does not know EXIF (31).
    known = _filtered(frame, ("sidedata", "mode=delete:type=ICC_PROFILE"), ("sidedata", "mode=delete:type=31"))
    try:
        data = known.side_data.get("DISPLAYMATRIX")
    except ValueError:  # another kind that PyAV does not know: it still tells quarter turns
        turns = round(frame.rotation / 90) % 4
        return ((1, 0), (0, -1), (-1, 0), (0, 1))[turns], ((0, 1), (1, 0), (0, -1), (-1, 0))[turns]
    matrix = [1, 0, 0, 0, 1] if data is None else np.frombuffer(data, np.int32).tolist()
    return (matrix[0], matrix[1]), (matrix[3], matrix[4])


def _filtered(frame, *filters):
    graph = Graph()
    unit = frame.time_base or Fraction(1, 25)
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=unit)
    graph.link_nodes(source, *(graph.add(*each) for each in filters), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def _to_rgb(reformatter, frame, shape, interpolation):
    """Returns a frame as 8-bit RGB; untagged ones have BT.601's colours below HD and BT.709's from there on."""
    matrix = None
    if not frame.format.is_rgb:
        high = frame.width >= 1280 or frame.height > 576
        known = {1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601}
        known |= {7: Colorspace.SMPTE240M, 9: Colorspace.BT2020, 10: Colorspace.BT2020}
        matrix = known.get(int(frame.colorspace), Colorspace.ITU709 if high else Colorspace.ITU601)
    hdr = frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
    picture = reformatter.reformat(
        frame,
        shape[1],
        shape[0],
        "rgb48le" if hdr else "rgb24",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        interpolation=interpolation,
        threads=1,
    ).to_ndarray()
    return _tone_mapped(picture, frame.color_trc, frame.color_primaries) if hdr else picture


def _tone_mapped(signal, transfer, primaries):
    """Maps a PQ or HLG picture to standard range by ITU-R BT.2390's curve on the largest component, for 203 cd/m2."""
    codes = np.arange(65536) / 65535
    if transfer == ColorTrc.SMPTE2084:
        light = _pq_light(codes).astype(np.float32)[signal]
    else:  # HLG, for a display of 1000 cd/m2 (ITU-R BT.2100)
        bright = (np.exp((codes - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = np.where(codes <= 0.5, codes**2 / 3, bright).astype(np.float32)[signal]
        light = 1000.0 * light * (light @ np.array([0.2627, 0.6780, 0.0593], np.float32))[..., None] ** 0.2
    brightest = light.max(axis=-1, keepdims=True)
    peak = _pq_signal(1000.0)
    top = _pq_signal(203.0) / peak
    share, knee = np.linspace(0, 1, 1023), 1.5 * top - 0.5
    t = (share - knee) / (1 - knee)
    rolled = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    before = np.append(_pq_light(share * peak), 10000.0)
    after = np.append(_pq_light(np.where(share < knee, share, rolled) * peak), 203.0)
    light *= np.interp(brightest, before, after).astype(np.float32) / np.maximum(brightest, 1e-6)
    if primaries != ColorPrimaries.BT709:  # all others are taken for BT.2020's
        rows = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
        light = light @ np.array(rows, np.float32).T
    return np.rint(255 * (light / 203.0).clip(0, 1) ** (1 / 2.4)).astype(np.uint8)


def _pq_light(signal):
    """Returns light in cd/m2 of a PQ signal (SMPTE ST 2084)."""
    root = signal ** (32 / 2523)
    fraction = np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)
    return 10000 * fraction ** (16384 / 2610)


def _pq_signal(light):
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
