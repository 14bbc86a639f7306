"""Decodes single frames from the keyframe before each, in files whose packets promise the frames of plain decoding.

A container of trusted times (mp4, mov, Matroska, WebM) and a codec whose keyframes are known to begin anew make that
promise. An edit list, frames that share a time, and a stream that begins within a group of pictures break it, and so
does damage on the way to a wanted frame. Damage in packets that are not decoded stays unnoticed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import av
from av.container import InputContainer

NEAR = 64  # packets; in a larger video, skipping reaches a keyframe this close, and seeking a more distant one
# Codecs of which all keyframes are checked; True where the decoder may skip frames that no other frame refers to.
# HEVC's marks of such frames hold within a temporal layer only, and the AV1 decoder cannot change its mind.
CODECS = {"h264": True, "hevc": False, "vp9": True, "av1": False}
IDR, IRAP = {5}, set(range(16, 24))  # types of the NAL units of H.264 and HEVC at which decoding can begin


class DamagedError(Exception):
    """Raised where decoding from keyframes meets damage, so that plain decoding must say which frames there are."""


@dataclass(frozen=True)
class Keyframe:
    """Holds the presentation time, the seek time and the packet's index of a keyframe, at which decoding can begin."""

    time: int
    seek: int
    position: int


@dataclass(frozen=True)
class Timeline:
    """Holds the presentation times of all frames and all keyframes, both sorted; `unit` is one tick in seconds.

    `packets` holds all packets of a stream that is small enough to keep, else None.
    """

    times: list[int]
    keys: list[Keyframe]
    packets: list[av.Packet] | None
    unit: float


def read_timeline(container: InputContainer, stream: av.VideoStream, kept_bytes: int) -> Timeline | None:
    """Reads all packets of a stream without decoding. Returns None if they do not promise the frames of plain decoding.

    Args:
        kept_bytes: packets of a stream up to this size are kept.

    Raises:
        FFmpegError: the file is damaged or truncated.
    """
    codec = stream.codec_context.codec.canonical_name
    if codec not in CODECS or stream.time_base is None:
        return None
    times: list[int] = []
    keys: list[Keyframe] = []
    kept: list[av.Packet] = []
    size = 0
    for position, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
        time = packet.pts
        if time is None or packet.is_discard or packet.is_corrupt:
            return None
        times.append(time)
        size += packet.size
        if size <= kept_bytes:
            kept.append(packet)
        if packet.is_keyframe and begins_anew(codec, packet, stream.codec_context.extradata or b""):
            keys.append(Keyframe(time, time if packet.dts is None else min(time, packet.dts), position))
    begins = bool(keys) and keys[0].position == 0 and keys[0].time == min(times)
    if not begins or len(set(times)) < len(times):
        return None
    return Timeline(
        times=sorted(times),
        keys=sorted(keys, key=lambda key: key.time),
        packets=kept if size <= kept_bytes else None,
        unit=float(stream.time_base),
    )


def begins_anew(codec: str, packet: av.Packet, extradata: bytes) -> bool:
    """Returns whether no frame from this keyframe on, in order of time, refers to a frame before it.

    Containers also mark pictures as keyframes from which a stream only recovers, such as those of intra refresh.
    """
    data = memoryview(packet)
    if codec == "h264":
        return extradata[:1] == b"\1" and _first_slice(data, (extradata[4] & 3) + 1, 0, 31, range(1, 6)) in IDR
    if codec == "hevc":
        return extradata[:1] == b"\1" and _first_slice(data, (extradata[21] & 3) + 1, 1, 63, range(32)) in IRAP
    return codec != "av1" or _is_shown_key_frame(data)


def _first_slice(data: memoryview, prefix: int, shift: int, mask: int, slices: range) -> int | None:
    """Returns the type of a packet's first NAL unit with a slice. Each unit follows its length of `prefix` bytes."""
    position = 0
    while position + prefix < len(data):
        kind = data[position + prefix] >> shift & mask
        if kind in slices:
            return kind
        position += prefix + int.from_bytes(data[position : position + prefix], "big")
    return None


def _is_shown_key_frame(data: memoryview) -> bool:
    """Returns whether the first frame header of an AV1 temporal unit is that of a key frame which is shown at once."""
    position = 0
    while position < len(data):
        header = data[position]
        kind, extended, sized = header >> 3 & 15, header >> 2 & 1, header >> 1 & 1
        position += 1 + extended
        size = shift = 0
        while sized and position < len(data):  # a number in groups of seven bits
            size |= (data[position] & 127) << shift
            shift, position = shift + 7, position + 1
            if not data[position - 1] & 128:
                break
        if kind in (3, 6) and position < len(data):  # a frame header, alone or with its frame
            return data[position] >> 4 == 0b0001  # not a repeated frame; of type key; shown
        if not sized:
            return False
        position += size
    return False


class Reader:
    """Decodes runs of a stream that start at keyframes.

    It finds a keyframe in the list of kept packets, or else skips packets or seeks, whichever is cheaper.
    """

    def __init__(self, container: InputContainer, stream: av.VideoStream, timeline: Timeline):
        self._container, self._stream, self._timeline = container, stream, timeline
        self._skips = CODECS[stream.codec_context.codec.canonical_name]
        self._packets: Iterator[av.Packet] = iter(())
        self._position: int | None = None  # index of the next packet in the stream; None before the first seek

    def frames(self, indices: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields the frames of `indices` with their index.

        Raises:
            DamagedError: a frame on the way to one of them is missing or only patched up.
            FFmpegError: a packet on the way cannot be read or decoded.
        """
        times, key_times = self._timeline.times, [key.time for key in self._timeline.keys]
        runs: dict[int, dict[int, int]] = {}  # keyframe -> {time: index} of the wanted frames that follow it
        for index in indices:
            runs.setdefault(bisect_right(key_times, times[index]) - 1, {})[times[index]] = index
        for key, wanted in runs.items():
            begin, end = key_times[key], max(wanted)
            missing = set(wanted if self._skips else times[bisect_left(times, begin) : bisect_right(times, end)])
            for frame in self._decode_run(self._timeline.keys[key], set(wanted)):
                missing.discard(frame.pts)
                if frame.is_corrupt:
                    raise DamagedError
                if frame.pts in wanted:
                    yield wanted[frame.pts], frame
            if missing:
                raise DamagedError

    def _decode_run(self, key: Keyframe, wanted: set[int]) -> Iterator[av.VideoFrame]:
        """Decodes from `key` to the last packet of the wanted times."""
        packet = self._go_to(key)
        context = self._stream.codec_context
        context.flush_buffers()
        unfed: set[int | None] = set(wanted)
        while packet is not None and packet.size:
            context.skip_frame = "NONREF" if self._skips and packet.pts not in unfed else "DEFAULT"
            unfed.discard(packet.pts)
            yield from decode_packet(packet)
            packet = self._next() if unfed else None
        yield from context.decode(None)  # the frames that the decoder holds back for reordering

    def _go_to(self, key: Keyframe) -> av.Packet | None:
        """Returns the packet of a keyframe, or None if the stream does not contain it."""
        if self._timeline.packets is not None:
            self._packets = iter(self._timeline.packets[key.position :])
            return next(self._packets)
        if self._position is None or not 0 <= key.position - self._position <= NEAR:
            self._seek(key.seek)
        packet = self._skip_to(key)
        if packet is None:  # the container's index is wrong: search for the keyframe from the start
            self._seek(0)
            packet = self._skip_to(key)
        if packet is not None:
            self._position = key.position + 1
        return packet

    def _seek(self, time: int) -> None:
        self._container.seek(time, stream=self._stream)
        self._packets = iter(self._container.demux(self._stream))

    def _skip_to(self, key: Keyframe) -> av.Packet | None:
        while (packet := self._next()) is not None and packet.size:
            if packet.is_keyframe and packet.pts == key.time:
                return packet
            if packet.is_keyframe and packet.pts is not None and packet.pts > key.time:
                return None
        return None

    def _next(self) -> av.Packet | None:
        packet = next(self._packets, None)
        if self._position is not None:
            self._position += 1
        return packet


def decode_packet(packet: av.Packet) -> list[av.VideoFrame]:
    """Returns the frames that the decoder gives after this packet, often those of earlier packets.

    Raises:
        FFmpegError: the packet is damaged.
    """
    return packet.decode()
