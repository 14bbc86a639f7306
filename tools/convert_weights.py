"""Converts published weights: python -m tools.convert_weights --kind=KIND --src=FILE_OR_FOLDER --out=DIR [--check]

    umt          UMT-L and its norm, from umt_l16_qformer.pth            --config.init.umt=DIR
    qformer      the Q-Former, from the same file                        --config.init.qformer=DIR
    facexformer  FaceXFormer's encoder, from its checkpoint              --config.init.facexformer=DIR
    videochat2   all of a stage-2 or stage-3 checkpoint, LoRA included   --config.init.videochat2=DIR
    mistral      a copy of a Hugging Face folder that loads faster       --config.llm.path=DIR

--check prints the destination of every published key; without --out, nothing is written.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from absl import flags
from tqdm import tqdm

from favchat_jax import command_line
from favchat_jax.checkpoints import mistral_folder
from favchat_jax.checkpoints.table import Account, Shape, Table, account, check, read
from favchat_jax.checkpoints.tensors import Tensor, open_tensors
from favchat_jax.checkpoints.weights_folder import save_weights
from favchat_jax.convert import facexformer, qformer, umt, videochat2
from favchat_jax.convert.mistral import write_copy
from favchat_jax.errors import UserError

log = logging.getLogger("favchat_jax")

SOURCES = {
    "umt": umt,
    "qformer": qformer,
    "facexformer": facexformer,
    "videochat2": videochat2,
    "mistral": mistral_folder,
}


def expected(kind: str, src: Path) -> tuple[Table, dict[str, Shape]]:
    """Returns a kind's table, and the shape of every weight by path; the language model's sizes are in its folder."""
    source = SOURCES[kind]
    return source.TABLE, source.weight_shapes(*([mistral_folder.read_config(src)] if kind == "mistral" else []))


def convert(kind: str, src: Path, tensors: Mapping[str, Tensor], out: Path) -> None:
    """Writes the weights folder for a published file with these tensors."""
    table, shapes = expected(kind, src)
    if kind == "mistral":
        write_copy(src, out, partial(tqdm, unit=" parts"))
    else:
        weights = read(table, tensors.items(), shapes, src, progress=partial(tqdm, unit=" tensors"))
        save_weights(out, weights, {"kind": kind, "source": src.name})


def other_kinds(kind: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the kinds, except `kind`, of which a file has every weight and no unknown one; sizes may differ."""
    fitting = []  # without mistral, whose table needs the sizes in a folder
    for other in SOURCES.keys() - {kind, "mistral"}:
        found = account(SOURCES[other].TABLE, tensors, SOURCES[other].weight_shapes())
        if found.used and not found.unknown and not found.missing:
            fitting.append(other)
    return sorted(fitting)


def report(found: Account) -> str:
    """Returns a table that accounts for every published key; the keys of a stack of layers share a line."""
    lines = [(name, _layers(f"{slot.path}{'[i]' * len(slot.place)}")) for name, slot in found.used.items()]
    lines += [(name, f"ignored: {reason}") for name, reason in found.ignored.items()]
    lines += [(name, f"absent: {reason}") for name, reason in found.absent.items()]
    lines += [(name, "missing") for name in found.missing]
    lines += [(name, "unknown") for name in found.unknown]
    lines += [(name, f"has shape {shape}, expected {wanted}") for name, (wanted, shape) in found.misshapen.items()]
    counted = Counter((_layers(name), outcome) for name, outcome in lines)
    width = max(len(name) for name, _ in counted)
    rows = [f"{count:>4}  {name:<{width}}  {outcome}" for (name, outcome), count in counted.items()]
    keys = len(found.used) + len(found.ignored) + len(found.unknown) + len(found.misshapen)
    total = (
        f"{keys} keys: {len(found.used)} used, {len(found.ignored)} ignored, {len(found.unknown)} unknown, "
        f"{len(found.misshapen)} of another shape; {len(found.absent) + len(found.missing)} weights are absent"
    )
    return "\n".join([*rows, total])


def _layers(name: str) -> str:
    return re.sub(r"(?<=[._])\d+(?=[./])", "*", name)


def main() -> None:
    """Checks and converts the file that the flags name."""
    kind, src, out = _KIND.value, Path(_SRC.value or ""), Path(_OUT.value or "")
    if not (_KIND.value and _SRC.value and (_OUT.value or _CHECK.value)):
        raise UserError(f"needed: --kind={'|'.join(SOURCES)} --src=FILE_OR_FOLDER, and --out=DIR or --check")
    if _OUT.value and out.exists():
        raise UserError(f"--out={out} exists already: name a folder that does not, or remove it")
    (table, shapes), tensors = expected(kind, src), open_tensors(src)
    found = account(table, tensors, shapes)
    if _CHECK.value:
        print(report(found))
    try:
        check(table, found, src)
    except UserError as error:
        others = " and ".join(f"--kind={other}" for other in other_kinds(kind, tensors))
        raise UserError(f"{error} ({others} can read this file)" if others else str(error)) from None
    if _OUT.value:
        convert(kind, src, tensors, out)
        log.info("%s is written", out)


if __name__ == "__main__":
    _KIND = flags.DEFINE_enum("kind", None, [*SOURCES], "Kind of the source")
    _SRC = flags.DEFINE_string("src", None, "Published file, or folder of the language model")
    _OUT = flags.DEFINE_string("out", None, "Weights folder to write")
    _CHECK = flags.DEFINE_bool("check", False, "Print the destination of every published key")
    command_line.start(main)
