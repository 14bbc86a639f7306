"""Measures the cost of the corpus' clip step: python -m tools.benchmark_corpus --videos=DIR [--memory=1000,5000]

speed    processor seconds of `clip` on a folder of videos, and of a bare loop that decodes every frame once, looks for
         faces in the same frames and encodes as many; both take turns, so that other load on the machine affects both
memory   peak memory of `scan` and `clip` on given numbers of small drawn videos, each in a separate process
"""

import io
import itertools
import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from absl import flags
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from tqdm import tqdm

from favchat_jax import command_line
from favchat_jax.corpus.clip import clip
from favchat_jax.corpus.clips import Settings
from favchat_jax.corpus.footage import QUALITY
from favchat_jax.corpus.manifest import OK
from favchat_jax.corpus.scan import scan
from favchat_jax.data.colour import to_rgb
from favchat_jax.data.faces.detectors import Detector, load_detector
from favchat_jax.data.faces.search import fitted
from favchat_jax.errors import UserError

ROUNDS = 3


def measure_speed(videos: Path) -> dict[str, Any]:
    """Returns the processor seconds of the bare loop and of `clip` in each round, and the ratio of their speeds."""
    settings = Settings()
    detector = load_detector(settings.detector, settings.model)
    bare, clipping = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            out = Path(folder, str(turn))
            out.mkdir()
            rows = [row for row in scan([f"folder:{videos}"], out) if row["status"] == OK]
            if not rows:
                raise UserError(f"--videos={videos} holds no video that can be read: name another folder")
            seconds, (kept, _) = _processor_seconds(lambda out=out: clip(out, settings))
            clipping.append(seconds)
            lengths = {row["id"]: row["frames"] for row in kept}
            wanted = [(row["path"], lengths.get(row["id"], 0)) for row in rows]
            seconds, _ = _processor_seconds(
                lambda wanted=wanted: [bare_loop(path, detector, settings.every, length) for path, length in wanted]
            )
            bare.append(seconds)
    return {"videos": len(rows), "bare_seconds": bare, "clip_seconds": clipping, "ratio": sum(bare) / sum(clipping)}


def bare_loop(path: str, detector: Detector, every: int, length: int) -> bytes:
    """Decodes a video once, searches one frame of `every`, encodes the first `length` frames."""
    buffer, reformatter = io.BytesIO(), VideoReformatter()
    with av.open(path) as video:
        video.streams.video[0].thread_count = 1
        first = []
        for number, frame in enumerate(video.decode(video=0)):
            if number % every == 0:
                height, width = fitted((frame.height, frame.width), detector.SIDE, detector.LONGEST)
                detector(to_rgb(reformatter, frame, width, height, Interpolation.BICUBIC))
            if number < length:
                first.append(frame)
        if first:
            with av.open(buffer, "w", format="mp4") as container:
                stream = container.add_stream("libx264", rate=video.streams.video[0].average_rate, options=QUALITY)
                stream.width, stream.height, stream.pix_fmt = first[0].width, first[0].height, "yuv420p"
                stream.thread_count = 1
                for frame in first:
                    frame.pts, frame.pict_type = None, PictureType.NONE
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
    return buffer.getvalue()


def _processor_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def measure_memory(counts: list[int]) -> dict[str, float]:
    """Returns the peak MiB of `clip` by the number of videos."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        raw.mkdir()
        for number in tqdm(range(max(counts)), "encoding", unit=" videos"):
            (raw / f"{number:06d}.mp4").write_bytes(_small_video(number))
        peaks = {}
        for count in counts:
            some = Path(folder, f"raw{count}")
            some.mkdir()
            for path in itertools.islice(sorted(raw.iterdir()), count):
                (some / path.name).hardlink_to(path)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[str(count)] = pool.apply(_peak, (str(some), str(Path(folder, f"out{count}"))))
    return peaks


def _small_video(number: int) -> bytes:
    rng = np.random.default_rng(number)
    picture = np.kron(rng.integers(0, 256, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 64, 48, "yuv420p", 1
        for shift in range(40):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, shift, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _peak(raw: str, out: str) -> float:
    """Returns the peak MiB of scanning and clipping a folder. All videos are kept, so that each is encoded."""
    Path(out).mkdir()
    scan([f"folder:{raw}"], Path(out))
    kept, _ = clip(Path(out), Settings(min_share=0.0, every=40))
    assert len(kept) == len(list(Path(raw).iterdir()))
    # VmHWM is of this program alone; `ru_maxrss` would start at the value of the parent process.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def main() -> None:
    """Runs the measurements that the flags name and prints JSON."""
    if not _VIDEOS.value and not _MEMORY.value:
        raise UserError("needed: --videos=DIR, --memory=1000,5000, or both")
    figures = {}
    if _VIDEOS.value:
        figures["speed"] = measure_speed(Path(_VIDEOS.value))
    if _MEMORY.value:
        figures["memory_mib"] = measure_memory([int(count) for count in _MEMORY.value])
    print(json.dumps(figures))


if __name__ == "__main__":
    _VIDEOS = flags.DEFINE_string("videos", None, "Folder of videos to measure speed on")
    _MEMORY = flags.DEFINE_list("memory", None, "Numbers of videos to measure memory on")
    command_line.start(main)
