"""The embedded preset's pretrained parts: small stand-ins for Mistral-7B, UMT-L and FaceXFormer, made in minutes.

Each is written to the same kind of folder as the published part it stands for and loaded by the same code: the language
model as a Hugging Face folder, the encoders as weights folders. Without them a run of minutes learns no facial detail.
"""

import functools
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_collections
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from favchat_jax.data.datasets import Record, open_dataset, prepare
from favchat_jax.data.rendered_drawing import FRAMES
from favchat_jax.data.video import decode
from favchat_jax.training.pretraining.encoders import make_facial_encoder, make_general_encoder
from favchat_jax.training.pretraining.language_model import make_language_model

DATA = "rendered_faces"
PARTS = Path("runs/tiny-parts")


def make_missing_parts(config: ml_collections.ConfigDict) -> None:
    """Makes whichever of the embedded preset's parts are not in PARTS, or were made with other settings.

    A part that the config takes from anywhere else is a person's own: it is neither made nor replaced.
    """
    settings = json.loads(config.to_json())
    recipe = {name: settings["pretrain"][name] for name in settings["pretrain"]}
    recipe["model"] = {name: settings["model"][name] for name in ("image_size", "frames", "umt", "facexformer")}
    recipe["visual_tokens"] = settings["model"]["qformer"]["queries"] + settings["model"]["qformer"]["extra_queries"]
    makers = {
        config.llm.path: make_language_model,
        config.init.facexformer: make_facial_encoder,
        config.init.umt: make_general_encoder,
    }
    missing = {
        folder: make
        for folder, make in makers.items()
        if Path(folder).parent == PARTS and not _made_with(Path(folder), recipe)
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
        draft = Path(folder + ".draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        make(config, records, frames, draft)
        (draft / "recipe.json").write_text(json.dumps(recipe, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)


def _made_with(folder: Path, recipe: dict) -> bool:
    path = folder / "recipe.json"
    return path.exists() and json.loads(path.read_text()) == recipe


def _decode_all(records: Sequence[Record], size: int) -> UInt8[np.ndarray, "N T H W 3"]:
    """Every frame of every clip, at the model's size."""
    with ThreadPoolExecutor(2) as pool:  # decoding runs outside Python's lock
        clips = pool.map(lambda r: decode(r.clip, frames=FRAMES, size=size, name=r.id).frames, records)
        return np.stack(list(tqdm(clips, total=len(records), desc="decoding clips", unit="clip", mininterval=1)))
