"""Reads CelebV-HQ (Zhu et al., 2022) with summaries and question-answer pairs from the user's folder.

The folder holds `celebvhq_info.json` (the data set's annotation file), the clips, and `qa.jsonl` with one line per
clip: `{"clip": id, "video": path in the folder, "summary": ..., "qa": [{"q": ..., "a": ...}, ...]}`. A clip without a
line is read from `clips/<id>.mp4`, and its text is made from its labels.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from favchat_jax.data import vocabulary
from favchat_jax.data.record import Question, Record
from favchat_jax.data.storage import RecordBuilder
from favchat_jax.errors import UserError

INFO = "celebvhq_info.json"
TEXT = "qa.jsonl"
HELDOUT_SHARE = 0.05  # share of the source videos


class CelebVHQ(RecordBuilder, skip_registration=True):  # type: ignore[call-arg]  # as for RecordBuilder
    """CelebV-HQ clips. All clips of a source video are in train or all are in heldout, by a hash of its name."""

    name = "celebvhq"

    def __init__(self, *, root: str | None, config: str | None = None, **options):
        if not root:
            raise UserError(f"celebvhq needs a folder: set data.root to the folder that holds {INFO}")
        self._root = Path(root).expanduser()
        info, text = self._root / INFO, self._root / TEXT
        annotation, lines = _read(info), _read(text) if text.exists() else ""
        self._digest = hashlib.sha256(f"{annotation}\0{lines}".encode()).hexdigest()
        entries = read_annotation(annotation, info)
        self._clips = {clip: read_entry(clip, entry, info) for clip, entry in entries.items()}
        self._lines = read_text(lines, text)
        self._sides = splits({clip: entry["source"] for clip, entry in self._clips.items()})
        super().__init__(config=config, **options)

    def digest(self) -> str:
        """Returns a hash of the two annotation files."""
        return self._digest

    def counts(self) -> dict[str, int]:
        """Returns the number of clips of each split.

        Raises:
            UserError: a clip of the annotation file is missing.
        """
        for clip in self._clips:
            if not self._video(clip).is_file():
                raise UserError(f"{self._video(clip)} does not exist: add the clip, or remove {clip} from {INFO}")
        return {side: list(self._sides.values()).count(side) for side in ("train", "heldout")}

    def records(self, split: str) -> Iterator[Record]:
        """Reads the split's clips."""
        for clip in (clip for clip, side in self._sides.items() if side == split):
            yield read_record(self._video(clip), clip, self._clips[clip], self._lines.get(clip))

    def _video(self, clip: str) -> Path:
        return self._root / (self._lines.get(clip, {}).get("video") or f"clips/{clip}.mp4")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: {reason}; data.root must be the folder that holds {INFO}") from None


def place(source: str) -> float:
    """Hashes a source video's name to a number from 0 to 1; numbers below `HELDOUT_SHARE` are held out."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64


def splits(sources: dict[str, str]) -> dict[str, str]:
    """Returns clip id -> split, equal for all clips of a source video; train is only empty if there are no clips."""
    kept = max(sources.values(), key=place, default="")  # this source always stays in train
    return {
        clip: "heldout" if source != kept and place(source) < HELDOUT_SHARE else "train"
        for clip, source in sources.items()
    }


def read_annotation(text: str, path: Path) -> dict[str, dict]:
    """Reads an annotation file: clip id -> its published entry, which `read_entry` checks.

    Raises:
        UserError: the file is not CelebV-HQ's annotation file.
    """
    try:
        published = json.loads(text)
        clips, mappings = dict(published["clips"].items()), dict((published.get("meta_info") or {}).items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is not CelebV-HQ's annotation file (JSON with 'clips'): download it again") from None
    if not clips:
        raise UserError(f"{path}: 'clips' is empty: download it again")
    for name, ours in (("appearance_mapping", vocabulary.APPEARANCE), ("action_mapping", vocabulary.ACTION)):
        theirs = mappings.get(name, ours)
        if not isinstance(theirs, list | tuple) or tuple(str(label).lower() for label in theirs) != ours:
            raise UserError(f"{path}: {name} is not CelebV-HQ's: put its labels in the published order")
    return clips


def read_entry(clip: str, entry: dict, path: Path) -> dict:
    """Reads a clip's entry: {"source": video id, "attributes": uint8 [83]}.

    Raises:
        UserError: its labels do not fit the vocabulary.
    """
    try:
        labels = entry["attributes"]
        parts = [np.asarray(labels[name]) for name in ("appearance", "action")]
        emotion = labels["emotion"]
        source = str(entry.get("ytb_id") or clip)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: clip {clip} has no attributes appearance, action and emotion; complete it") from None
    for name, part, known in zip(
        ("appearance", "action"), parts, (vocabulary.APPEARANCE, vocabulary.ACTION), strict=True
    ):
        if part.shape != (len(known),) or not np.isin(part, (0, 1)).all():
            raise UserError(f"{path}: clip {clip}: {name} must be {len(known)} labels 0 or 1: fix or remove the clip")
    try:
        shown = emotions(emotion)
    except TypeError:  # neither text nor a list
        raise UserError(f"{path}: clip {clip}: emotion must be a name or a list of names, not {emotion!r}") from None
    if not shown <= set(vocabulary.EMOTION):
        unknown = ", ".join(sorted(shown - set(vocabulary.EMOTION)))
        raise UserError(f"{path}: clip {clip}: emotion '{unknown}' is not one of {', '.join(vocabulary.EMOTION)}")
    feelings = [name in shown for name in vocabulary.EMOTION]
    return {"source": source, "attributes": np.concatenate([*parts, feelings]).astype(np.uint8)}


def emotions(published: dict | str | list) -> set[str]:
    """Returns all emotions of a clip: one for the entire clip, or a list of `{"emotion", "start_sec", "end_sec"}`."""
    if isinstance(published, dict):
        published = published.get("labels", published.get("emotion", []))
    if isinstance(published, str):
        published = [published]
    return {str(item.get("emotion", "?") if isinstance(item, dict) else item).lower() for item in published}


def read_text(text: str, path: Path) -> dict[str, dict]:
    """Reads and checks `qa.jsonl`: clip id -> its line.

    Raises:
        UserError: a line is not JSON or lacks a field.
    """
    lines = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            # Raises TypeError unless all of them are texts.
            "".join([row["summary"], row.get("video", ""), *(pair[key] for pair in row["qa"] for key in ("q", "a"))])
            lines[row["clip"]] = row
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, line {number} must have clip, summary and qa, a list of q and a: fix it"
            ) from None
    return lines


def read_record(video: Path, clip: str, entry: dict, line: dict | None) -> Record:
    """Reads one clip with its text, which is made from the labels if `qa.jsonl` has no line for it."""
    targets = label_text(entry["attributes"])
    if line and line["qa"]:
        summary = line["summary"]
        questions = tuple(Question(pair["q"], pair["a"], pair.get("kind", "general")) for pair in line["qa"])
    else:
        summary, questions = template(targets)
    return Record(
        id=clip,
        clip=video.read_bytes(),
        attributes=entry["attributes"],
        summary=summary,
        questions=questions,
        targets=targets,
        source=entry["source"],
        has_face=True,
    )


def label_text(attributes: UInt8[np.ndarray, " 83"]) -> dict[str, str]:
    """Converts labels to words, one string per group, which are the target strings of the facial reward."""
    bounds = np.cumsum([0, len(vocabulary.APPEARANCE), len(vocabulary.ACTION), len(vocabulary.EMOTION)])
    groups = zip(("attributes", "action", "emotion"), bounds[:-1], bounds[1:], strict=True)
    return {
        group: ", ".join(vocabulary.VOCABULARY[i].replace("_", " ") for i in range(start, end) if attributes[i])
        for group, start, end in groups
    }


def template(targets: dict[str, str]) -> tuple[str, tuple[Question, ...]]:
    """Makes a plain summary and questions for a clip without texts."""
    wording = (
        ("attributes", "What does the person look like?", "appearance"),
        ("action", "What does the person do?", "motion"),
        ("emotion", "What emotion does the person show?", "emotion"),
    )
    summary = " ".join(f"{group.capitalize()}: {targets[group] or 'none'}." for group, _, _ in wording)
    return summary, tuple(Question(question, targets[group] or "none", kind) for group, question, kind in wording)
