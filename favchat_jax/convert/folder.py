"""Writes exported folders: an export replaces only earlier exports, and a copied part has all its files."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from favchat_jax.checkpoints.tensors import INDEX, PARTS, shards
from favchat_jax.errors import UserError
from favchat_jax.files import replace_folder

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
    """Writes a folder with `files.replace_folder`; only an earlier export is replaced.

    Args:
        out: path of the folder.
        is_ours: returns whether an existing folder may be replaced.

    Raises:
        UserError: `out` exists and is not an earlier export, or the folder cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and (is_ours(out) or not any(out.iterdir()))):
        raise UserError(f"--out={out} exists and is not an earlier export: name a new folder")
    with replace_folder(out, SafetensorError) as draft:
        yield draft


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copies the files of a tokenizer into `folder`."""
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def copy_llm(source: str | Path, folder: Path) -> None:
    """Copies a language model's folder: only its configuration, weights and tokenizer."""
    copy_tokenizer(source, folder)
    if (Path(source) / PARTS).is_dir():
        shutil.copytree(Path(source) / PARTS, folder / PARTS)
    files = [Path(source) / name for name in ("config.json", "generation_config.json", "copy.json", INDEX)]
    files = [file for file in files if file.is_file()]
    files += [] if (folder / PARTS).exists() else shards(Path(source))
    for file in tqdm(files, desc="language model", unit="file", mininterval=1):
        shutil.copyfile(file, folder / file.name)
