"""Encodes video files for the tests; every frame shows its number, so that a test can identify decoded frames."""

import io
from collections.abc import Callable, Sequence

import av
import numpy as np

BITS = 12


def numbered_picture(number: int, width: int, height: int) -> np.ndarray:
    """Draws `number` as black and white columns in the upper half, on a grey ground that is lighter below."""
    picture = np.full((height, width, 3), 96, np.uint8)
    picture[-height // 4 :] = 160
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for bit in range(BITS):
        picture[: height // 2, edges[bit] : edges[bit + 1]] = 235 if number >> bit & 1 else 20
    return picture


def read_number(picture: np.ndarray) -> int:
    """Reads the number in a square picture."""
    edges = np.linspace(0, picture.shape[1], BITS + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).astype(int)
    row = picture[picture.shape[0] // 4 - 2 : picture.shape[0] // 4 + 2].mean((0, 2))
    return sum(1 << bit for bit, x in enumerate(middles) if row[x] > 128)


def encode_video(
    frames: int = 24,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    width: int = 96,
    height: int = 96,
    rate: int = 25,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int | None = None,
    times: Sequence[int] | None = None,
    picture: Callable[[int, int, int], np.ndarray] = numbered_picture,
) -> bytes:
    """Encodes a video, equal frames to equal bytes.

    Args:
        times: the frames' milliseconds, for a variable frame rate.
        rotation: degrees that go into the header.
    """
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=1000 if times else rate, options={**quiet, **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count = 1  # with several, equal frames may become other bytes
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            if times:
                frame.pts = times[number]
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def audio_only() -> bytes:
    """Encodes an mp4 without a video stream."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()
