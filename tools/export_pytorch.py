"""Exports weights to PyTorch: python -m tools.export_pytorch --checkpoint=DIR --out=DIR [--dtype=float32|bfloat16]

The folder loads with `transformers.AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`. Its README.md
describes its files.
"""

from pathlib import Path

from absl import flags

from favchat_jax import command_line
from favchat_jax.checkpoints.run import load_trained, open_run
from favchat_jax.convert import exported
from favchat_jax.convert.folder import replacing
from favchat_jax.errors import UserError


def export(checkpoint: str | Path, out: str | Path, dtype: str | None = None) -> None:
    """Writes the newest weights of a run for PyTorch.

    Args:
        checkpoint: workdir of a stage, or a folder that tools.export_orbax wrote.
        out: the folder to write; an earlier export there is replaced.
        dtype: type of all weights, by default the one that the run computes in.
    """
    with replacing(out, exported.is_exported) as draft:
        parts = open_run(checkpoint)
        weights, dtype = load_trained(checkpoint, parts.shapes), dtype or parts.config.model.dtype
        exported.write_folder(draft, parts.config, weights, parts.tokenizer, dtype)


def main() -> None:
    """Exports the run that the flags name."""
    if not _CHECKPOINT.value or not _OUT.value:
        raise UserError("needed: --checkpoint=WORKDIR --out=FOLDER")
    export(_CHECKPOINT.value, _OUT.value, _DTYPE.value)
    for part in sorted(Path(_OUT.value).iterdir()):
        size = sum(file.stat().st_size for file in (part, *part.rglob("*")) if file.is_file())
        print(f"{part.name + '/' * part.is_dir():<30}{size / 1e6:>12.3f} MB")


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a stage")
    _OUT = flags.DEFINE_string("out", None, "Folder to write")
    _DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Type of all weights; by default the run's own")
    command_line.start(main)
