"""Folders that are handed on: filled beside their place, so that one that is there is whole; copied with all parts."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from favchat_jax.checkpoints.tensors import INDEX, PARTS, shards
from favchat_jax.checkpoints.weights_folder import draft_of, place_mend
from favchat_jax.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@contextlib.contextmanager
def replacing(out: str | Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty folder that takes the place of `out` once it is filled; after a failure nothing of it is left.

    Args:
        out: where the folder will be.
        is_ours: whether a folder that is already there may be replaced.

    Raises:
        UserError: something else is there, or the folder cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and (is_ours(out) or not any(out.iterdir()))):
        raise UserError(f"--out={out} exists and is not an earlier export: name a new folder")
    draft = draft_of(out)
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
        draft.mkdir(parents=True)
        yield draft
        shutil.rmtree(out, ignore_errors=True)
        draft.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        mend = place_mend(error) or "free disk space or name another --out"
        raise UserError(f"could not write {out} ({reason}): {mend}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copies the files of a tokenizer into `folder`."""
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def copy_llm(source: str | Path, folder: Path) -> None:
    """Copies a language model's folder: configuration, weights and tokenizer, and nothing else that lies in it."""
    copy_tokenizer(source, folder)
    if (Path(source) / PARTS).is_dir():
        shutil.copytree(Path(source) / PARTS, folder / PARTS)
    files = [Path(source) / name for name in ("config.json", "generation_config.json", "copy.json", INDEX)]
    files = [file for file in files if file.is_file()]
    files += [] if (folder / PARTS).exists() else shards(Path(source))
    for file in tqdm(files, desc="language model", unit="file", mininterval=1):
        shutil.copyfile(file, folder / file.name)
