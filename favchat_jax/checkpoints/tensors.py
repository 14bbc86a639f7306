"""Reads files of tensors: safetensors in one file or in shards, PyTorch's pickled files, Orbax copies.

Only names and shapes are read at first. Each tensor is read on demand, so a file may be larger than memory.
Names lose what a training library puts around a model: DistributedDataParallel, DeepSpeed, Lightning, torch.compile.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from favchat_jax.checkpoints.weights_folder import load_weights, weight_shapes
from favchat_jax.errors import UserError

INDEX = "model.safetensors.index.json"
PARTS = "parts"  # subfolder of an Orbax copy, with one weights folder for each layer
PICKLED = (".pth", ".pt", ".bin", ".ckpt")
# Keys of the state dict in checkpoints that have an optimiser and the like besides: FaceXFormer's, VideoChat2's,
# Lightning's, DeepSpeed's.
STATE_DICTS = ("state_dict_backbone", "model", "state_dict", "module", "model_state_dict")
LEADING = r"((module|model)\.)*"  # attributes of wrappers around the whole model, with which every name begins
WITHIN = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # those of torch around any part


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. Its values are read by `np.asarray`."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.read().astype(dtype, copy=False) if dtype is not None else self.read()


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """Returns name -> tensor of a `.safetensors` file, a folder of them, a pickled file, or an Orbax copy.

    Raises:
        UserError: the path is missing, damaged, of another kind, or a pickle that would run code.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".safetensors":
            return _unwrapped(_safetensors(path), path)
        if path.suffix in PICKLED:
            return _unwrapped(_pickled(path), path)
        kinds = ", ".join(PICKLED)
        raise UserError(f"{path} is not a file of weights: name a folder or a file that ends in .safetensors, {kinds}")
    if not path.is_dir():
        raise UserError(f"{path} is missing: name a file or a folder of weights")
    if not (path / PARTS).is_dir():
        return {name: tensor for shard in shards(path) for name, tensor in _safetensors(shard).items()}
    return _parts(path / PARTS)


def shards(folder: Path) -> list[Path]:
    """Lists the files of a folder's weights; raises UserError if one is missing or the index is damaged."""
    found = [folder / "model.safetensors"]
    index = folder / INDEX
    if index.exists():
        try:
            found = sorted({folder / name for name in read_json(index)["weight_map"].values()})
        except (KeyError, AttributeError, TypeError):
            raise UserError(f"{index} does not map weights to files: fetch the folder again") from None
    for shard in found:
        if not shard.is_file() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} holds its weights as .bin files: fetch its .safetensors files, which are read")
        if not shard.is_file():
            raise UserError(f"{shard} is missing: name a complete folder, or fetch it again")
    return found


def save_tensors(tensors: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Writes a safetensors file that PyTorch reads too. Whoever may read a new file of this user may read it."""
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)  # the library's files are the writer's alone


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises UserError for everything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: name a complete folder, or fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check that it is a file of a folder") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): fetch the folder again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: fetch the folder again")
    return value


def _safetensors(path: Path) -> dict[str, Tensor]:
    def read(name: str) -> np.ndarray:
        # Opened each time, because pages of a mapped file stay in memory while it is open.
        with _report_damage(path), safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    with _report_damage(path), safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return {name: Tensor(shape, functools.partial(read, name)) for name, shape in shapes.items()}


def _parts(folder: Path) -> dict[str, Tensor]:
    load = functools.lru_cache(maxsize=1)(load_weights)  # tensors are read part by part

    def read(part: Path, path: str) -> np.ndarray:
        return np.asarray(load(part)[path])

    return {
        path: Tensor(shape, functools.partial(read, part, path))
        for part in sorted(folder.iterdir())
        for path, shape in weight_shapes(part).items()
    }


@contextlib.contextmanager
def _report_damage(path: Path):
    """Turns what safetensors raises into one line that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again") from None


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch to be read: pip install 'favchat_jax[convert]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning about a pickle's protocol precedes its refusal
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # The unpickler raises many types for a damaged file.
        if re.search("unsupported global|allowed global", str(error), re.IGNORECASE):
            refused = "would run code when read, which is refused"
        elif _is_plain_pickle(path):
            refused = "is a plain pickle, which can run code when read and is refused"
        else:
            raise UserError(f"{path} is damaged or not a PyTorch file{_reason(error)}: fetch it again") from None
        raise UserError(f"{path} {refused}: if you trust it, save only its tensors with torch.save") from None
    tensors = {}
    for name, value in _state_dict(content).items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, not a tensor: save only the state dict")
        tensors[str(name)] = Tensor(tuple(value.shape), functools.partial(_as_numpy, value))
    if not tensors:
        raise UserError(f"{path} holds no state dict: name a checkpoint of weights")
    return tensors


def _state_dict(content: Any) -> dict[Any, Any]:
    """Returns the state dict in a checkpoint; a library may wrap another's checkpoint."""
    while isinstance(content, dict):
        inner = next((content[key] for key in STATE_DICTS if isinstance(content.get(key), dict)), None)
        if inner is None:
            return content
        content = inner
    return {}


def _unwrapped(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Returns the tensors under the names that they have in the model itself."""
    found = {re.sub(WITHIN, "", name): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise UserError(f"{path} holds weights of a compiled model under two names: save the original model's")
    common = os.path.commonprefix(list(found))
    wrapped = len(common) - len(re.sub(LEADING, "", common, count=1))
    return {name[wrapped:]: tensor for name, tensor in found.items()}


def _as_numpy(tensor) -> np.ndarray:
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:  # torch cannot convert it to NumPy
        return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def _is_plain_pickle(path: Path) -> bool:
    """Returns whether a file is exactly one pickle, as `pickle.dump` writes it; torch.save writes several."""
    try:
        with path.open("rb") as file:
            for _ in pickletools.genops(file):  # names each operation, runs none
                pass
            return not file.read(1)
    except Exception:  # not a pickle: pickletools raises many types
        return False


def _reason(error: Exception) -> str:
    """Returns the first sentence of an error in brackets; empty if it is no sentence or torch's advice to run code."""
    if isinstance(error, OSError):  # EINVAL comes from a truncated file and says nothing about it
        return "" if error.errno in (None, errno.EINVAL) else f" ({error.strerror})"
    sentence = str(error).strip().splitlines()[0].split(". ")[0] if str(error).strip() else ""
    tells = " " in sentence and len(sentence) <= 160 and not sentence.startswith("Weights only load failed")
    return f" ({sentence.rstrip('.')})" if tells else ""
