"""Draws the common start of both sides from one seed: a config, a language model's folder, weights and inputs."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import av
import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from configs import stage2
from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints import run as assembly
from favchat_jax.checkpoints.initial import initial_weights
from favchat_jax.checkpoints.weights_folder import load_weights, save_weights
from favchat_jax.config import Config
from favchat_jax.data.conversation import VISUAL_PLACEHOLDER
from favchat_jax.data.loader import INSTRUCTIONS
from favchat_jax.data.record import Record
from favchat_jax.data.sources import open_dataset, prepare
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.embedded.language_model import write_sizes
from favchat_jax.embedded.pretrain import LanguageModelSizes
from favchat_jax.stages import group_of

QUESTION = "What can be seen of the face in this video, and which emotion does it show?"
CLIPS = 4  # clips in a training step
DATA = "rendered_faces/smoke"
SMALL, LARGE = 128, 512  # pixels a side: the rendered clips', and CelebV-HQ's


def settings(folder: str, preset: str) -> Config:
    """Returns stage 2's config on the material in `folder`, without dropout, so that both sides compute the same."""
    config = Config.from_ml_collections(stage2.get_config(f"preset={preset}"))
    return config.updated(
        {
            "llm.path": str(Path(folder) / "llm"),
            "init": {},
            "model.lora.dropout": 0.0,
            "model.qformer.dropout": 0.0,
            "model.dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16",
            "batch": CLIPS,
        }
    )


def make(folder: str, preset: str) -> None:
    """Draws the language model and all other weights into `folder`."""
    llm = Path(folder) / "llm"
    llm.mkdir()
    config = settings(folder, preset)
    write_sizes(llm, LanguageModelSizes.read(config.pretrain["llm"]), INSTRUCTIONS)
    rng = np.random.default_rng(0)
    shapes = mistral.weight_shapes(mistral.read_config(llm))
    mistral.write_weights(llm, unflatten_dict({path: _drawn(rng, path, shapes[path]) for path in shapes}, sep="/"))
    parts = assembly.assemble(config)
    weights = initial_weights(parts)
    # Fresh adapters are zero, which would exclude them from the comparison.
    fresh = {path: _drawn(rng, path, leaf.shape) for path, leaf in weights.items() if path.endswith("lora_b")}
    weights |= {path: jnp.asarray(leaf) for path, leaf in fresh.items()}
    # The end-of-text token never wins, so every answer has all its tokens.
    head = weights["llm/lm_head/lora_b"]
    weights["llm/lm_head/lora_b"] = head.at[:, parts.tokenizer.eos_token_id].set(0)
    save_weights(Path(folder) / "weights", {p: w for p, w in weights.items() if group_of(p) != "llm"}, {})


def _drawn(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    if path.endswith("scale"):
        return np.ones(shape, np.float32)
    drawn = rng.standard_normal(shape, np.float32) * (shape[-1] if "embed" in path else shape[-2]) ** -0.5
    if path == "lm_head/kernel":
        drawn[:, 2] = 0  # the end of text
    return drawn


def weights(folder: str) -> dict[str, Any]:
    """Returns every weight by path."""
    return {**dict(mistral.each_weight(Path(folder) / "llm", prefix="llm/")), **load_weights(Path(folder) / "weights")}


def batch(config: Config) -> dict[str, np.ndarray]:
    """Returns a training step's batch: random frames, and one question per clip whose answer fills half of the text."""
    rng = np.random.default_rng(0)
    llm, qformer = mistral.read_config(config.llm.path), config.model.qformer
    visual, length = qformer.queries + qformer.extra_queries, config.data.buckets[1]
    tokens = rng.integers(0, llm.vocab_size, (CLIPS, 1, length)).astype(np.int32)
    tokens[:, :, 2 : 2 + visual] = VISUAL_PLACEHOLDER
    prompt = (CLIPS, 1, config.data.prompt_length)
    return {
        "frames": frames(config, CLIPS),
        "tokens": tokens,
        "loss_mask": np.broadcast_to(np.arange(length) >= (length + visual) // 2, tokens.shape),
        "prompt": rng.integers(0, min(qformer.vocabulary, llm.vocab_size), prompt).astype(np.int32),
        "prompt_mask": np.ones(prompt, bool),
    }


def frames(config: Config, clips: int) -> np.ndarray:
    """Returns random clips."""
    return np.random.default_rng(1).integers(0, 256, (clips, *config.frames_shape), np.uint8)


@dataclasses.dataclass(frozen=True)
class Footage:
    """A few records, repeated to CelebV-HQ's number, since Grain permutes a few records more slowly than many."""

    records: tuple[Record, ...]

    def __len__(self) -> int:
        return 35_000

    def __getitem__(self, index: int) -> Record:
        return self.records[index % len(self.records)]


def make_footage(folder: str) -> None:
    """Writes rendered clips to `folder`: in their own size, and some enlarged to CelebV-HQ's size and length."""
    large, packed = Path(folder) / "large", str(Path(folder) / "data")
    large.mkdir()
    prepare(DATA, None, packed)
    source = open_dataset(DATA, packed, "train")
    people = [record for record in map(source.__getitem__, range(len(source))) if record.has_face]
    for record in people[::3]:  # a face in each, as in CelebV-HQ
        with av.open(io.BytesIO(record.clip)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        enlarged = [cv2.resize(frame, (LARGE, LARGE), interpolation=cv2.INTER_CUBIC) for frame in frames]
        (large / record.id).write_bytes(rendered_faces.encode(np.stack(enlarged * 6)))  # 96 frames


@dataclasses.dataclass(frozen=True)
class Packed:
    """The same records as if they were a packed split."""

    records: tuple[Record, ...]
    folder: Path
    split: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def packed(folder: str, side: int) -> Packed:
    """Returns the records of `footage`, each once."""
    return Packed(footage(folder, side).records, Path(folder), str(side))


def footage(folder: str, side: int) -> Footage:
    """Returns the clips of `make_footage` that are `side` pixels wide."""
    source = open_dataset(DATA, str(Path(folder) / "data"), "train")
    records = [source[index] for index in range(len(source))]
    if side == LARGE:
        files = {path.name: path for path in (Path(folder) / "large").iterdir()}
        records = [
            dataclasses.replace(record, clip=files[record.id].read_bytes()) for record in records if record.id in files
        ]
    return Footage(tuple(records))


def loader_setting(workers: int, side: int) -> str:
    """Returns the name of a setting in the loader's rows."""
    return f"{workers} workers, {side} pixels"
