"""Copies Mistral's Hugging Face folder into one Orbax part per layer, which many hosts read faster."""

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from favchat_jax.checkpoints.mistral_folder import (
    TABLE,
    check_tokenizer,
    fingerprint,
    is_copy,
    read_config,
    weight_shapes,
)
from favchat_jax.checkpoints.table import account, check, finite, slots
from favchat_jax.checkpoints.tensors import PARTS, open_tensors
from favchat_jax.checkpoints.weights_folder import save_weights
from favchat_jax.convert.folder import copy_tokenizer, replacing
from favchat_jax.data.conversation import load_tokenizer
from favchat_jax.errors import UserError

WRITERS = 2  # parts that are read, checked and written in parallel


def write_copy(folder: Path, out: Path, progress: Callable[[Iterable], Iterable] = iter) -> None:
    """Writes `out`, a copy that replaces a Hugging Face folder, one or two layers at a time.

    Args:
        folder: the Hugging Face folder.
        out: a new folder; a draft beside it is written first.
        progress: wraps the parts as they are written, for example `tqdm`.

    Raises:
        UserError: as in `read_weights`; or the tokenizer is missing or larger than the embedding, or the disk is full.
    """
    if is_copy(folder):
        raise UserError(f"{folder} is a copy already: name the Hugging Face folder")
    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"{folder} holds no tokenizer.json, which the copy needs: fetch it again")
    config = read_config(folder)
    check_tokenizer(folder, load_tokenizer(folder), config)
    shapes, tensors = weight_shapes(config), open_tensors(folder)
    check(TABLE, account(TABLE, tensors, shapes), folder)
    parts: dict[str, list[str]] = {}
    for name, slot in slots(TABLE, shapes).items():
        part = f"layer_{slot.place[0]:03d}" if slot.place else slot.path.split("/")[0]
        parts.setdefault(part, []).append(name)
    with replacing(out, is_ours=lambda _: False) as draft:

        def write_part(part: str) -> None:
            save_weights(draft / PARTS / part, {name: finite(tensors[name], name, folder) for name in parts[part]}, {})

        with ThreadPoolExecutor(WRITERS) as pool:
            pending = [pool.submit(write_part, part) for part in parts]
            try:
                for written in progress(pending):
                    written.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        copy_tokenizer(folder, draft)
        shutil.copyfile(folder / "config.json", draft / "config.json")
        source = {"fingerprint": fingerprint(folder), "source": str(Path(folder).resolve())}
        (draft / "copy.json").write_text(json.dumps(source))
