"""Lists the videos in a data set's folder by its layout, with the labels that the data set has for each.

celebvhq       celebvhq_info.json; clips named after their ids, or the full videos named after their `ytb_id`, from
               which the clips are cut and cropped
hmdb51         ACTION/VIDEO.avi
youtube_faces  [frame_images_DB/]PERSON/NUMBER/NUMBER.FRAME.jpg
faceforensics  original_sequences/.../VIDEO.mp4, manipulated_sequences/.../TARGET_SOURCE.mp4
ferv39k        .../SCENE/EMOTION/NUMBER.mp4, or a folder of frames in place of the file
folder         any files, at any depth
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from favchat_jax.corpus.manifest import SOURCES, is_box, is_time
from favchat_jax.data import vocabulary
from favchat_jax.data.sources import celebvhq
from favchat_jax.errors import UserError
from favchat_jax.files import is_hidden

VIDEOS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp"}
MARGIN = 0.02  # share of the picture: `expand` in download_and_process.py of github.com/CelebV-HQ/CelebV-HQ
# Classes of other sources that CelebV-HQ has a label for.
HMDB51_ACTIONS = {"chew", "drink", "eat", "kiss", "laugh", "smile", "smoke", "talk"}
FERV39K_EMOTIONS = {
    "angry": "anger",
    "disgust": "disgust",
    "fear": "fear",
    "happy": "happy",
    "neutral": "neutral",
    "sad": "sadness",
    "surprise": "surprise",
}


@dataclass(frozen=True)
class Found:
    """A video of a source that has not been opened yet.

    Attributes:
        name: its name within the source, from which `id` is made.
        path: the file, or the folder of its frames.
        group: the source video or the person.
        attributes: labels by group, see `manifest`.
        start, end, box: the part of the file that is the clip, see `manifest`.
        problem: why it is unusable, if the source itself shows that.
    """

    source: str
    name: str
    path: Path
    group: str
    attributes: dict[str, list] | None = None
    start: float | None = None
    end: float | None = None
    box: str = ""
    problem: str = ""
    id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {**vars(self), "path": str(self.path)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Found":
        """Restores the result of `to_json`."""
        return cls(**{**value, "path": Path(value["path"])})


def find(given: str) -> list[Found]:
    """Returns all videos of a source, each with its id: `given` is a folder, or LAYOUT:FOLDER to name its layout.

    Raises:
        UserError: the folder is missing or has no such videos, or its annotation file is unreadable.
    """
    layout, root = parse_source(given)
    layout = layout or guess_layout(root)
    found = [replace(video, id=_id(video)) for video in LAYOUTS[layout](root)]
    if not found:
        raise UserError(f"--source={given}: no video there has the layout {layout}; name another as LAYOUT:FOLDER")
    return found


def parse_source(given: str) -> tuple[str, Path]:
    """Returns the layout, "" if none is named, and the folder of a source."""
    layout, colon, folder = given.partition(":")
    if not colon or layout not in SOURCES:
        layout, folder = "", given
    root = Path(folder).expanduser().absolute()  # the next step may run in another folder, or on another machine
    if not root.is_dir():
        raise UserError(f"--source={given}: {root} is not a folder; name one, or LAYOUT:FOLDER ({', '.join(SOURCES)})")
    return layout, root


def guess_layout(root: Path) -> str:
    """Returns the layout with the distinguishing marks of a folder, or `folder`."""
    below = {entry.name for entry in root.iterdir() if entry.is_dir()}
    if (root / celebvhq.INFO).is_file():
        return "celebvhq"
    if below & {"original_sequences", "manipulated_sequences"}:
        return "faceforensics"
    if "frame_images_DB" in below or _is_youtube_faces(root):
        return "youtube_faces"
    if "2_ClipsforFaceCrop" in below or _ferv39k_scenes(root):
        return "ferv39k"
    if _is_hmdb51(root):
        return "hmdb51"
    return "folder"


def _id(video: Found) -> str:
    """Returns a safe file name of the source and the video, with a hash that keeps replaced characters unique."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", video.name)
    if video.source == "celebvhq" and plain == video.name and 1 <= len(plain) <= 100:
        return plain
    digest = hashlib.sha256(f"{video.source}/{video.name}".encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{video.source}-{plain[-80:].strip('_')}-{digest}"


def _celebvhq(root: Path) -> Iterator[Found]:
    info = root / celebvhq.INFO
    entries = celebvhq.read_annotation(celebvhq.read_info(info), info)
    videos = {path.stem: path for path in _files(root) if path.suffix.lower() in VIDEOS}
    for clip, entry in entries.items():
        try:
            source = celebvhq.read_entry(clip, entry, info)["source"]
            video = Found("celebvhq", clip, videos.get(clip, root / f"{clip}.mp4"), source, _labels(entry))
            if clip not in videos:
                video = _cut_from(videos, video, entry)
        except UserError as error:
            path = videos.get(clip, root / f"{clip}.mp4")
            video = Found("celebvhq", clip, path, clip, problem=str(error).removeprefix(f"{info}: "))
        yield video


def _labels(entry: dict) -> dict[str, list]:
    labels = entry["attributes"]
    groups = (("appearance", vocabulary.APPEARANCE), ("action", vocabulary.ACTION))
    attributes = {group: [n for n, held in zip(known, labels[group], strict=True) if held] for group, known in groups}
    shown = labels["emotion"]
    shown = shown.get("labels", shown.get("emotion", [])) if isinstance(shown, dict) else shown
    attributes["emotion"] = [
        {**item, "emotion": item["emotion"].lower()} if isinstance(item, dict) else item.lower()
        for item in ([shown] if isinstance(shown, str) else shown)
    ]
    return attributes


def _cut_from(videos: dict[str, Path], video: Found, entry: dict) -> Found:
    """Returns the clip as a part of its full video."""
    full = videos.get(str(entry.get("ytb_id") or ""))
    if full is None:
        return replace(video, problem=f"there is no video named {video.name}, nor one named after its ytb_id")
    try:
        start, end = (float(entry["duration"][name]) for name in ("start_sec", "end_sec"))
        box = [float(entry["bbox"][name]) for name in ("top", "bottom", "left", "right")]
        valid = is_time(start, end) and is_box(box)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        return replace(video, problem="its duration or bbox is not a time in seconds or a box in shares of the picture")
    return replace(video, path=full, start=start, end=end, box="" if box == [0, 1, 0, 1] else json.dumps(_widened(box)))


def _widened(box: list[float]) -> list[float]:
    """Returns a box with `MARGIN` more on each side, as CelebV-HQ's authors widen theirs; `clips` cuts a square."""
    top, bottom, left, right = box
    sides = max(top - MARGIN, 0.0), min(bottom + MARGIN, 1.0), max(left - MARGIN, 0.0), min(right + MARGIN, 1.0)
    return [round(side, 6) for side in sides]


def _hmdb51(root: Path) -> Iterator[Found]:
    for path in _files(root):
        if path.suffix.lower() in VIDEOS and path.parent != root:
            action = path.parent.name
            # VIDEO_ACTION_FLAGS_NUMBER: clips of one video share the part before the action.
            group = re.split(rf"_{re.escape(action)}_", path.stem)[0]
            attributes = {"action": [action]} if action in HMDB51_ACTIONS else None
            yield Found("hmdb51", str(path.relative_to(root)), path, group, attributes)


def _is_hmdb51(root: Path) -> bool:
    """Returns whether the first video of every folder is named after it, as VIDEO_ACTION_FLAGS_NUMBER."""
    firsts = [next(_files(folder), None) for folder in _folders(root)]
    return bool(firsts) and all(file and f"_{file.parent.name}_" in file.stem for file in firsts)


def _youtube_faces(root: Path) -> Iterator[Found]:
    top = root / "frame_images_DB" if (root / "frame_images_DB").is_dir() else root
    for person in _folders(top):
        for video in _folders(person):
            yield Found("youtube_faces", f"{person.name}/{video.name}", video, person.name)


def _is_youtube_faces(root: Path) -> bool:
    """Returns whether the first person's first video holds frames named NUMBER.FRAME.jpg."""
    video = next((video for person in _folders(root) for video in _folders(person)), None)
    return video is not None and any(re.fullmatch(rf"{re.escape(video.name)}\.\d+\.jpg", f.name) for f in _below(video))


def _faceforensics(root: Path) -> Iterator[Found]:
    paths = [path for path in _files(root) if path.suffix.lower() in VIDEOS]
    groups = _joined([_identities(path) for path in paths])
    for path in paths:
        yield Found("faceforensics", str(path.relative_to(root)), path, groups[_identities(path)[0]])


def _identities(path: Path) -> tuple[str, ...]:
    """Returns the videos or actors in a file: 033_097.mp4, or 01_02__walking__XYZ.mp4 and 01__walking.mp4."""
    head, acted, _ = path.stem.partition("__")
    names = tuple(head.split("_")) if re.fullmatch(r"\d+(_\d+)?", head) else (head,)
    return tuple(f"actor{name}" for name in names) if acted else names


def _joined(together: list[tuple[str, ...]]) -> dict[str, str]:
    """Maps each name to the smallest name that rows of `together` connect it to, directly or through others."""
    leader: dict[str, str] = {}

    def find_leader(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = name = leader[leader[name]]
        return name

    for names in together:
        first, *others = sorted({find_leader(name) for name in names})
        leader.update(dict.fromkeys(others, first))
    return {name: find_leader(name) for name in leader}


def _ferv39k(root: Path) -> Iterator[Found]:
    for emotion in _ferv39k_scenes(root) or _ferv39k_scenes(root / "2_ClipsforFaceCrop"):
        label = {"emotion": [FERV39K_EMOTIONS[emotion.name.lower()]]}
        for clip in _below(emotion):
            if clip.is_dir() or clip.suffix.lower() in VIDEOS:
                name = str(clip.relative_to(root))
                yield Found("ferv39k", name, clip, f"{emotion.parent.name}/{emotion.name}/{clip.stem}", label)


def _ferv39k_scenes(root: Path) -> list[Path]:
    """Returns the folders SCENE/EMOTION, or [] if folders at that depth have other names."""
    folders = [emotion for scene in _folders(root) for emotion in _folders(scene)]
    return folders if all(folder.name.lower() in FERV39K_EMOTIONS for folder in folders) else []


def _folder(root: Path) -> Iterator[Found]:
    for path in _files(root):
        name = str(path.relative_to(root))
        yield Found("folder", name, path, name)


def _files(root: Path) -> Iterator[Path]:
    """Yields all files below a folder that are not hidden, in a fixed order."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not is_hidden(name))
        yield from (Path(folder, name) for name in sorted(files) if not is_hidden(name))


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not is_hidden(path)) if folder.is_dir() else []


def _folders(folder: Path) -> list[Path]:
    return [path for path in _below(folder) if path.is_dir()]


LAYOUTS: dict[str, Callable[[Path], Iterator[Found]]] = {
    "celebvhq": _celebvhq,
    "hmdb51": _hmdb51,
    "youtube_faces": _youtube_faces,
    "faceforensics": _faceforensics,
    "ferv39k": _ferv39k,
    "folder": _folder,
}
