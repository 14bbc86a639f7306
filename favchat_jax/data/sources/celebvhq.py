"""Reads CelebV-HQ (Zhu et al., 2022), or one's own clips in its layout, with summaries and question-answer pairs.

The folder holds `celebvhq_info.json` (the data set's annotation file), the clips, and `qa.jsonl` with lines such as
`{"clip": id, "video": path in the folder, "summary": ..., "qa": [{"q": ..., "a": ...}, ...]}`. Several lines of a clip
are joined. A clip without a path is read from `clips/<id>.mp4`, and texts that it lacks are made from its labels.
Without `celebvhq_info.json`, the clips are those of `qa.jsonl`, and its texts are the only ones.
"""

import hashlib
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from favchat_jax.data import vocabulary
from favchat_jax.data.record import Question, Record
from favchat_jax.data.storage import RecordBuilder
from favchat_jax.errors import UserError, listed, one_line
from favchat_jax.files import read_lines

log = logging.getLogger("favchat_jax")

INFO = "celebvhq_info.json"
TEXT = "qa.jsonl"
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v")  # extensions that an id in `qa.jsonl` may have
HELDOUT_SHARE = 0.05  # share of the source videos
NO_LABELS = np.zeros(len(vocabulary.VOCABULARY), np.uint8)


@dataclass
class Texts:
    """The lines of one clip in `qa.jsonl`.

    Attributes:
        line: number of the first of them.
        video: path of the clip in the folder.
        source: the video that the clip was cut from; empty if no line names it.
        summary: description of the clip; may be empty.
        questions: question-answer pairs in the order of the lines; may be empty.
    """

    line: int
    video: str = ""
    source: str = ""
    summary: str = ""
    questions: list[Question] = field(default_factory=list)


class CelebVHQ(RecordBuilder, skip_registration=True):  # type: ignore[call-arg]  # as for RecordBuilder
    """CelebV-HQ clips. All clips of a source video are in train or all are in heldout, by a hash of its name."""

    name = "celebvhq"

    def __init__(self, *, root: str | None, config: str | None = None, **options):
        if not root:
            raise UserError(f"celebvhq needs a folder: set data.root to the folder that holds {INFO} or {TEXT}")
        self._root = Path(root).expanduser()
        info, text = self._root / INFO, self._root / TEXT
        self._labelled = info.exists() or not text.exists()
        if not self._labelled:
            log.warning("%s has no %s: its clips have no labels, only the texts of %s", self._root, INFO, TEXT)
        labels = read_info(info) if self._labelled else ""
        entries = read_annotation(labels, info) if self._labelled else {}
        self._clips = {clip: read_entry(clip, entry, info) for clip, entry in entries.items()}
        self._texts = read_texts(text, self._clips if self._labelled else None) if text.exists() else {}
        # With the line ends of Unix, as in the digests of earlier versions.
        lines = text.read_text(encoding="utf-8-sig") if text.exists() else ""
        self._digest = hashlib.sha256(f"{labels}\0{lines}".encode()).hexdigest()
        for clip, texts in self._texts.items():
            entry = self._clips.setdefault(clip, {"source": clip, "attributes": NO_LABELS})
            entry["source"] = texts.source or entry["source"]
        if not self._clips:
            raise UserError(f"{text} is empty: give each clip a line")
        for clip, entry in self._clips.items():
            _check_characters(info, clip, entry["source"])
        with ThreadPoolExecutor() as pool:  # tens of thousands of files, maybe on a network
            there = list(pool.map(Path.is_file, map(self._video, self._clips)))
        self._files = {clip: self._video(clip) for clip, exists in zip(self._clips, there, strict=True) if exists}
        self._sides = splits({clip: self._clips[clip]["source"] for clip in self._files})
        super().__init__(config=config, **options)

    def digest(self) -> str:
        """Returns a hash of the labels and texts."""
        return self._digest

    def clip_files(self) -> Mapping[str, Path]:
        """Returns the clips that are there, id -> file."""
        return self._files

    def missing(self) -> Sequence[str]:
        """Returns the ids of the other clips."""
        return [clip for clip in self._clips if clip not in self._files]

    def counts(self) -> dict[str, int]:
        """Returns the number of clips of each split.

        Raises:
            UserError: too many clips are missing.
        """
        missing = self.missing()
        if not self._files or len(missing) > self._missing_share * len(self._clips):
            share = math.ceil(100 * len(missing) / len(self._clips)) / 100
            without = f", or set --config.data.missing_share={share:g} to go on without them" if self._files else ""
            raise UserError(
                f"{len(missing)} of {len(self._clips)} clips are missing: {listed(missing)}; "
                f"add them, the first as {self._video(missing[0])}{without}"
            )
        return {side: list(self._sides.values()).count(side) for side in ("train", "heldout")}

    def records(self, split: str) -> Iterator[Record]:
        """Reads the split's clips."""
        for clip in (clip for clip, side in self._sides.items() if side == split):
            yield read_record(self._files[clip], clip, self._clips[clip], self._texts.get(clip), self._labelled)

    def _video(self, clip: str) -> Path:
        texts = self._texts.get(clip)
        return self._root / (texts and texts.video or f"clips/{clip}.mp4")


def _check_characters(path: Path, clip: str, source: str) -> None:
    try:
        f"{clip}{source}".encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: {clip!a} holds half of a surrogate pair in its id or ytb_id: correct it") from None


def read_info(path: Path) -> str:
    """Reads the text of an annotation file; raises UserError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: {reason}; name the folder that holds {INFO} or {TEXT}") from None


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


def read_texts(path: Path, known: Collection[str] | None) -> dict[str, Texts]:
    """Reads and checks `qa.jsonl`: clip id -> its texts, which may be on several lines.

    Args:
        path: the file.
        known: ids of all clips; None if the file itself lists them.

    Raises:
        UserError: a line has another form, names an unknown clip, or contradicts an earlier line.
    """
    clips: dict[str, Texts] = {}
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        name, given, questions = _read_line(line, where)
        if known is None and not given["summary"] and not questions:
            raise UserError(f"{where} has neither a summary nor a question: add one, or remove the line")
        is_known = known is not None and name in known
        clip = name if is_known or not name.lower().endswith(VIDEOS) else name.removesuffix(Path(name).suffix)
        if known is not None and clip not in known:
            raise UserError(f"{where}: clip {name!r} is not in {path.with_name(INFO)}: correct the id, or add the clip")
        if name != clip:
            given["video"] = given["video"] or f"clips/{name}"
        texts = clips.setdefault(clip, Texts(number))
        for key, value in given.items():
            before = getattr(texts, key)
            if value and before and value != before:
                raise UserError(f"{where}: clip {clip!r} has another {key} than in line {texts.line}: keep one of them")
            setattr(texts, key, before or value)
        texts.questions += questions
    return clips


def _read_line(line: str, where: str) -> tuple[str, dict[str, str], list[Question]]:
    """Returns the clip that a line names, its video, source and summary, and its questions."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({one_line(error)}): correct the line") from None
    try:
        for key in row:  # a misspelt key would lose its texts
            if (meant := get_close_matches(key, ("summary", "qa"), 1, 0.8)) and meant[0] not in row:
                raise UserError(f"{where} has the key {key!r}: call it {meant[0]!r}")
        name = row["clip"]
        if not name or not row.keys() & {"summary", "qa"}:
            raise KeyError
        given = {key: "" if row.get(key) is None else row[key] for key in ("video", "source", "summary")}
        pairs = [Question(pair["q"], pair["a"], pair.get("kind", "general")) for pair in row.get("qa") or ()]
        # Raises TypeError unless all of them are texts.
        "".join([name, *given.values(), *(text for pair in pairs for text in vars(pair).values())]).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: a text holds half of a surrogate pair: write the complete character") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where} must have clip, and summary or qa, a list of q and a: fix it") from None
    return name, given, pairs


def read_record(video: Path, clip: str, entry: dict, texts: Texts | None, labelled: bool) -> Record:
    """Reads one clip with its texts; those that it lacks are made from its labels, if it is labelled.

    Raises:
        UserError: the clip cannot be read.
    """
    targets = label_text(entry["attributes"])
    summary, questions = template(targets) if labelled else ("", ())
    if texts:
        summary, questions = texts.summary or summary, tuple(texts.questions) or questions
    try:
        content = video.read_bytes()
    except OSError as error:
        raise UserError(f"{video} cannot be read ({error.strerror}): check its place and permissions") from None
    return Record(
        id=clip,
        clip=content,
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
