"""Makes video files and pictures of kinds that are easily read wrong; every frame shows its number."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence

import av
import cv2
import numpy as np

from tests.data.video_files import encode_video, numbered_picture


def from_number(first: int) -> Callable[[int, int, int], np.ndarray]:
    """Returns a picture function that counts from `first`."""
    return lambda number, width, height: numbered_picture(first + number, width, height)


def copied(file: bytes, container: str, change: Callable[[list[av.Packet]], Sequence[av.Packet]]) -> bytes:
    """Writes the changed packets of a video into another file without encoding them again."""
    target = io.BytesIO()
    with av.open(io.BytesIO(file)) as source, av.open(target, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in change([packet for packet in source.demux(video=0) if packet.size]):
            packet.stream = stream
            output.mux(packet)
    return target.getvalue()


def trimmed(container: str, frames: int = 10, **options) -> bytes:
    """Cuts the first frames off without encoding again: an edit list hides them, since others refer to them."""

    def earlier(packets: list[av.Packet]) -> list[av.Packet]:
        step = packets[0].duration
        for packet in packets:
            packet.pts, packet.dts = packet.pts - frames * step, packet.dts - frames * step
        return packets

    return copied(encode_video(60, **{"options": {"g": "60", "bf": "2"}, **options}), container, earlier)


def sharing_times() -> bytes:
    """Encodes a video of which every two frames have one time."""

    def halved(packets: list[av.Packet]) -> list[av.Packet]:
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = number // 2 * 80  # milliseconds
        return packets

    return copied(encode_video(40, container="matroska", options={"g": "1"}), "matroska", halved)


def of_fields(number: int, width: int, height: int) -> np.ndarray:
    """Draws a grey picture with a bar that moves between its two fields."""
    picture = np.full((height, width, 3), 60, np.uint8)
    for field in (0, 1):
        left = (8 * (2 * number + field)) % (width - width // 4)
        picture[field::2, left : left + width // 4] = 220
    return picture


def exif(orientation: int) -> bytes:
    """Returns a TIFF header with one entry: the orientation, 1 to 8."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def stored(picture: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the picture as a camera stores it that states this EXIF orientation."""
    if orientation >= 5:
        picture = picture.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    return np.ascontiguousarray(picture[::rows, ::columns])


def jpeg(picture: np.ndarray, orientation: int) -> bytes:
    """Encodes a picture as JPEG with EXIF."""
    data = b"Exif\0\0" + exif(orientation)
    file = cv2.imencode(".jpg", stored(picture, orientation)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    return file[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + file[2:]


def png(picture: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """Encodes a picture as PNG with more chunks, each given by its kind and content."""
    file = cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes()
    more = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return file[:33] + more + file[33:]  # after the header


COLOUR_PROFILE = (b"iCCP", b"Display P3\0\0" + zlib.compress(bytes(128) + struct.pack(">I", 0)))


def webp(picture: np.ndarray, orientation: int) -> bytes:
    """Encodes a picture as lossless WebP with EXIF."""
    turned = stored(picture, orientation)
    height, width = turned.shape[:2]
    image = cv2.imencode(".webp", turned[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()[12:]
    head = bytes([0x08, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    data = exif(orientation)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + head + image + b"EXIF" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body
