"""Reads the clips that `clip` kept, for `annotate` and `review`."""

from dataclasses import dataclass
from pathlib import Path

from favchat_jax.corpus.claims import Labels
from favchat_jax.corpus.manifest import KEPT, read_attributes, read_table
from favchat_jax.data import vocabulary
from favchat_jax.errors import UserError

GROUPS = {"appearance": vocabulary.APPEARANCE, "action": vocabulary.ACTION, "emotion": vocabulary.EMOTION}


@dataclass(frozen=True)
class Kept:
    """Holds a kept clip: its file, and its attributes as stored in the table."""

    id: str
    path: Path
    source: str
    attributes: str
    frames: int

    def labels(self) -> Labels:
        """Returns the labels of each group that are true at some time of the clip.

        Raises:
          UserError: CelebV-HQ does not have a label of this name.
        """
        published = read_attributes(self.attributes, self.id)
        labels = {}
        for group, known in GROUPS.items():
            entries = [entry.get("emotion") if isinstance(entry, dict) else entry for entry in published.get(group, ())]
            unknown = [entry for entry in entries if entry not in known]
            if unknown:
                raise UserError(f"{unknown[0]!r} is not a label of CelebV-HQ's {group}: correct it and run scan again")
            labels[group] = tuple(dict.fromkeys(entries))
        return labels


def read_kept(out: Path) -> list[Kept]:
    """Returns all kept clips, sorted by id.

    Raises:
      UserError: the table is missing or invalid, or a clip is stored outside the folder.
    """
    clips = []
    for row in read_table(out, KEPT):
        path = out / row["path"]
        if not path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out / KEPT}: {row['id']} is stored outside {out}: run clip again")
        clips.append(Kept(row["id"], path, row["source"], row["attributes"], row["frames"] or 0))
    return sorted(clips, key=lambda clip: clip.id)
