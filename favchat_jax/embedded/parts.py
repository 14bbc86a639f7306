"""Makes the embedded preset's pretrained parts: small stand-ins for Mistral-7B, UMT-L and FaceXFormer, in minutes.

Each part is written to the same kind of folder as the published part that it replaces, and loaded by the same code: the
language model is a Hugging Face folder, the encoders are weights folders. Without pretrained parts, a run of minutes
does not learn facial detail.
"""

import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError
from tqdm import tqdm

from favchat_jax.checkpoints.workdir import differing
from favchat_jax.config import Config
from favchat_jax.data.record import Record
from favchat_jax.data.sources import open_dataset, prepare
from favchat_jax.data.video import decode
from favchat_jax.embedded.drawing import FRAMES
from favchat_jax.embedded.encoders import make_facial_encoder, make_general_encoder
from favchat_jax.embedded.language_model import make_language_model
from favchat_jax.embedded.pretrain import Pretrain
from favchat_jax.errors import UserError
from favchat_jax.files import replace_folder

DATA = "rendered_faces"
PARTS = Path("runs/tiny-parts")


def make_missing_parts(config: Config) -> None:
    """Makes the embedded preset's parts that are missing in PARTS.

    A part that the config takes from another folder belongs to the user and is not made.

    Raises:
        UserError: an existing part was made with other settings; it stays, since finished runs may need it.
    """
    settings = config.to_json()
    recipe = Pretrain.of(config).to_json()
    recipe["model"] = {name: settings["model"][name] for name in ("image_size", "frames", "umt", "facexformer")}
    recipe["visual_tokens"] = settings["model"]["qformer"]["queries"] + settings["model"]["qformer"]["extra_queries"]
    makers = {
        "llm.path": (config.llm.path, make_language_model),
        "init.facexformer": (config.init.facexformer, make_facial_encoder),
        "init.umt": (config.init.umt, make_general_encoder),
    }
    missing = {
        folder: make
        for field, (folder, make) in makers.items()
        if Path(folder).parent == PARTS and not _is_made(Path(folder), field, recipe)
    }
    if not missing:
        return
    prepare(DATA, None, config.data.packed)
    source = open_dataset(DATA, config.data.packed, "train")
    records = [source[i] for i in range(len(source))]

    @functools.cache
    def frames() -> UInt8[np.ndarray, "N T H W 3"]:
        return _decode_all(records, config.model.image_size)

    for folder, make in missing.items():
        with replace_folder(folder, SafetensorError) as draft:
            make(config, records, frames, draft)
            (draft / "recipe.json").write_text(json.dumps(recipe, indent=1))


def _is_made(folder: Path, field: str, recipe: dict) -> bool:
    """Returns whether a part exists; raises UserError if it was made with another recipe."""
    if not folder.exists():
        return False
    path = folder / "recipe.json"
    if not path.is_file():
        raise UserError(f"{folder} has no recipe.json, so no run made it: move it elsewhere")
    fields = sorted(differing(json.loads(path.read_text()), recipe))
    if fields:
        raise UserError(
            f"{folder} was made with other settings, and runs may need it: {', '.join(fields)}. Use its values, "
            f"make another part with --config.{field}={PARTS}/NAME, or remove the folder"
        )
    return True


def _decode_all(records: Sequence[Record], size: int) -> UInt8[np.ndarray, "N T H W 3"]:
    """Decodes every frame of every clip at the model's size."""
    with ThreadPoolExecutor(2) as pool:  # decoding runs outside Python's lock
        clips = pool.map(lambda r: decode(r.clip, frames=FRAMES, size=size, name=r.id).frames, records)
        return np.stack(list(tqdm(clips, total=len(records), desc="decoding clips", unit="clip", mininterval=1)))
