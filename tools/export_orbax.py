"""Exports a run into one self-contained folder: python -m tools.export_orbax --checkpoint=DIR --out=DIR

    OUT/weights/, leaves.json    all weights except the language model's base (Orbax)
    OUT/config.json              the run's config; its paths are relative to OUT
    OUT/llm/, llm.json           the language model's Hugging Face folder with its tokenizer, and its fingerprint
    OUT/prompt_tokenizer/        the Q-Formers' tokenizer, if it differs

Every `--checkpoint=` accepts the folder, which can be moved; loading it needs nothing else.
"""

import shutil
from pathlib import Path

from absl import flags

from favchat_jax import command_line
from favchat_jax.checkpoints.run import load_trained, open_run
from favchat_jax.checkpoints.weights_folder import is_weights_folder, save_weights
from favchat_jax.convert.folder import copy_llm, copy_tokenizer, replacing
from favchat_jax.errors import UserError


def export(checkpoint: str | Path, out: str | Path) -> None:
    """Writes a run's newest weights, language model, config and tokenizers into one folder.

    Args:
        checkpoint: workdir of a stage.
        out: the folder to write; an earlier export there is replaced.
    """
    with replacing(out, lambda folder: is_weights_folder(folder) and (folder / "llm").is_dir()) as draft:
        parts = open_run(checkpoint)
        config = parts.config
        inside = {"llm.path": "llm", "prompt_tokenizer": config.prompt_tokenizer and "prompt_tokenizer"}
        save_weights(draft, load_trained(checkpoint, parts.shapes), config.updated(inside).to_json())
        copy_llm(config.llm.path, draft / "llm")
        if config.prompt_tokenizer:
            copy_tokenizer(config.prompt_tokenizer, draft / "prompt_tokenizer")
        shutil.copyfile(Path(checkpoint) / "llm.json", draft / "llm.json")  # last: load_run refuses a folder without it


def main() -> None:
    """Exports the run that the flags name."""
    if not _CHECKPOINT.value or not _OUT.value:
        raise UserError("needed: --checkpoint=WORKDIR --out=FOLDER")
    export(_CHECKPOINT.value, _OUT.value)
    size = sum(file.stat().st_size for file in Path(_OUT.value).rglob("*") if file.is_file())
    print(f"{_OUT.value}: {size / 1e6:.1f} MB; every --checkpoint= accepts it")


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _OUT = flags.DEFINE_string("out", None, "Folder to write")
    command_line.start(main)
