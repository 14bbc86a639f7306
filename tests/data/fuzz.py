"""Reads mutated files in a process of its own: python -m tests.data.fuzz KIND FIRST LAST, with a KIND of `READERS`

Prints the number of each file before it is read, so that a crash or an endless read is known by its number. The process
ends with 1 where reading raises anything but a user error of one line.
"""

import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from favchat_jax.convert.pytorch.video_favchat import read_frames
from favchat_jax.data.sources import open_dataset, prepare
from favchat_jax.data.video import decode
from favchat_jax.errors import RunError, UserError
from favchat_jax.evaluation.benchmarks import benchmark_of
from favchat_jax.evaluation.config import EvaluationConfig
from tests.data import difficult_videos as make
from tests.data.test_video import FORMATS
from tests.data.video_files import encode_video, numbered_picture
from tests.evaluation.models_for_tests import Scripted, session
from tools import miniatures

PICTURE = numbered_picture(5, 120, 96)
NOTABLE = (0, 1, 34, 44, 91, 93, 123, 125, 127, 128, 255)  # bytes, among them those of JSON's marks


def videos() -> list[bytes]:
    """Makes the videos that are mutated."""
    joined = encode_video(40, container="mpegts") + encode_video(40, container="mpegts", width=160)
    return [*(encode_video(**options) for options in FORMATS.values()), joined, make.trimmed("mp4")]


def pictures() -> list[bytes]:
    """Makes the pictures that are mutated."""
    profile = make.png(PICTURE, make.COLOUR_PROFILE, (b"eXIf", make.exif(6)))
    return [
        make.jpeg(PICTURE, 6),
        profile,
        make.webp(PICTURE, 3),
        encode_video(3, codec="gif", container="gif", pixels="rgb8"),
    ]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Returns a file with bytes changed, cut off, overwritten, removed or repeated."""
    data = bytearray(content)
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 300))
    kind = rng.integers(6)
    if kind == 0:
        for _ in range(rng.integers(1, 12)):
            data[rng.integers(len(data))] = rng.integers(256)
    elif kind == 1:
        del data[max(at, 1) :]
    elif kind == 2:
        data[at : at + length] = rng.bytes(length)
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        other = int(rng.integers(len(data)))
        data[at:at] = data[other : other + length]
    else:  # near its beginning, where headers are
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(min(len(data), 600))] = rng.choice(NOTABLE)
    return bytes(data)


def read_media(files: list[bytes], number: int) -> None:
    """Reads a mutated video or picture, here and as the exported model does; each gives frames or a refusal."""
    file = mutated(files[number % len(files)], np.random.default_rng(number))
    kinds = []
    for read in (lambda: decode(file, frames=8, size=64).frames, lambda: read_frames(file, 8, 64)):
        try:
            assert read().shape == (8, 64, 64, 3)
            kinds.append("read")
        except ValueError as error:  # a UserError, or the exported model's
            assert type(error) in (ValueError, *UserError.__subclasses__()), error
            assert "\n" not in str(error)
            kinds.append("refused")
    assert kinds[0] == kinds[1], kinds


def own_clips(root: Path) -> None:
    """Makes a folder of one's own clips in CelebV-HQ's layout."""
    (root / "clips").mkdir(parents=True)
    lines, clips = [], {}
    labels = {"appearance": [1] + [0] * 39, "action": [1] + [0] * 34, "emotion": "happy"}
    for name in ("one", "two", "three"):
        (root / "clips" / f"{name}.mp4").write_bytes(encode_video(4))
        qa = [{"q": "What is shown?", "a": "a face"}]
        lines.append({"clip": name, "video": f"clips/{name}.mp4", "summary": "A face.", "qa": qa})
        clips[name] = {"ytb_id": name, "attributes": labels}
    (root / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "celebvhq_info.json").write_text(json.dumps({"clips": clips}))


def read_annotations(root: Path, number: int) -> None:
    """Packs and opens the folder with one of its annotation files mutated; each is read or refused in one line."""
    rng = np.random.default_rng(number)
    path = root / ("qa.jsonl", "celebvhq_info.json")[number % 2]
    good = path.read_bytes()
    path.write_bytes(mutated(good, rng))
    packed = root.parent / "packed"
    try:
        prepare("celebvhq", str(root), str(packed), missing_share=1.0)
        for split in ("train", "heldout"):
            source = open_dataset("celebvhq", str(packed), split)
            for i in range(len(source)):
                assert source[i].clip
    except UserError as error:
        assert "\n" not in str(error), error
    finally:
        path.write_bytes(good)
        shutil.rmtree(packed, ignore_errors=True)


def read_benchmark(lists: list[tuple[str, Path, Path]], number: int) -> None:
    """Runs a benchmark with one of its lists mutated; it has a result or is refused in one line.

    Args:
        lists: (name of the benchmark, its folder, the file to mutate).
        number: of the mutation.
    """
    name, root, path = lists[number % len(lists)]
    good = path.read_bytes()
    path.write_bytes(mutated(good, np.random.default_rng(number)))
    config = EvaluationConfig.from_ml_collections(importlib.import_module(f"configs.eval.{name}").get_config())
    try:
        made = session(Scripted(lambda *_: "happy"))
        result = benchmark_of(name).run(config.updated({"data.root": str(root)}), made)
        json.dumps(result, allow_nan=False)
    except (UserError, RunError) as error:
        assert "\n" not in str(error), error
    finally:
        path.write_bytes(good)


def benchmark_lists(folder: Path) -> list[tuple[str, Path, Path]]:
    """Makes a miniature of each published benchmark; returns its lists as `read_benchmark` takes them."""
    roots = {name: miniatures.make(name, folder / name, clips=5) for name in miniatures.MAKERS}
    found = ((name, root, path) for name, root in roots.items() for path in sorted(root.rglob("*")))
    return [(name, root, path) for name, root, path in found if path.suffix in (".csv", ".json", ".jsonl", ".txt")]


def _media(make_files: Callable[[], list[bytes]], folder: Path) -> Callable[[int], None]:
    return partial(read_media, make_files())


def _annotations(folder: Path) -> Callable[[int], None]:
    own_clips(folder / "root")
    return partial(read_annotations, folder / "root")


def _benchmarks(folder: Path) -> Callable[[int], None]:
    return partial(read_benchmark, benchmark_lists(folder))


# Kind of file -> given an empty folder, what reads the mutation of a number.
READERS: dict[str, Callable[[Path], Callable[[int], None]]] = {
    "videos": partial(_media, videos),
    "pictures": partial(_media, pictures),
    "annotations": _annotations,
    "benchmarks": _benchmarks,
}


def main(kind: str, first: int, last: int) -> None:
    """Reads the mutated files of a kind with the numbers from `first` to before `last`."""
    with tempfile.TemporaryDirectory() as folder:
        read = READERS[kind](Path(folder))
        for number in range(first, last):
            print(number, flush=True)
            read(number)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
