"""The encoders' stand-ins, pretrained on what they are to see.

- General encoder: names what a clip shows and how it moves, from all frames at once.
- Facial encoder: names the attributes of single frames, about eight times cheaper than clips.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, UInt8

from favchat_jax.checkpoints.weights_folder import save_weights
from favchat_jax.config import Config
from favchat_jax.data.record import Record
from favchat_jax.data.video import frame_indices
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.embedded.dataset import draw_general_clips, draw_stills
from favchat_jax.embedded.drawing import FRAMES
from favchat_jax.embedded.fitting import fit
from favchat_jax.embedded.pretrain import Pretrain
from favchat_jax.models.facexformer import FaceXFormerEncoder
from favchat_jax.models.favchat import normalise
from favchat_jax.models.kernels.linear import Linear
from favchat_jax.models.umt import UMT, VISION_LAYERNORM_EPSILON


class FrameClassifier(nn.Module):
    """The facial encoder under one linear head a label, over the coarsest map's average."""

    encoder: FaceXFormerEncoder
    classes: dict[str, int]

    @nn.compact
    def __call__(self, frames: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B C"]]:
        """Scores of each label's classes."""
        deepest = nn.LayerNorm(name="norm")(self.encoder(frames)[-1]).mean(axis=(1, 2))
        return {label: Linear(count, name=label)(deepest) for label, count in self.classes.items()}


class ClipClassifier(nn.Module):
    """The general encoder under one linear head a label, over the clip's average token."""

    encoder: UMT
    classes: dict[str, int]

    @nn.compact
    def __call__(self, frames: Float[Array, "B T H W 3"]) -> dict[str, Float[Array, "B C"]]:
        """Scores of each label's classes."""
        tokens = nn.LayerNorm(VISION_LAYERNORM_EPSILON, use_fast_variance=False, name="vision_layernorm")(
            self.encoder(frames)[0]
        )
        average = tokens.mean(axis=1)
        return {label: Linear(count, name=label)(average) for label, count in self.classes.items()}


Frames = Callable[[], UInt8[np.ndarray, "N T H W 3"]]


def make_facial_encoder(config: Config, records: Sequence[Record], frames: Frames, folder: Path) -> None:
    """Writes the weights folder of a facial encoder that names attributes of single frames.

    Args:
        config: a stage's config; `model.facexformer` and `pretrain` count.
        records: the training clips.
        frames: decodes all of them.
        folder: where to write.
    """
    pretrain = Pretrain.of(config)
    labels = (*rendered_faces.APPEARANCE, *rendered_faces.DETAILS, "emotion")
    faces = np.flatnonzero([record.has_face for record in records])
    clips, clip_classes = frames(), _classes(records, labels)
    stills, still_classes = draw_stills(pretrain.stills, config.seed, config.model.image_size)
    rng = np.random.default_rng(config.seed + 1)

    def batches(size: int = 128):
        """A quarter from clips, as they look after compression; the rest stills, each of another person."""
        while True:
            clip, still = rng.choice(faces, size // 4), rng.integers(len(stills), size=size - size // 4)
            pixels = np.concatenate([clips[clip, rng.integers(FRAMES, size=len(clip))], stills[still, 0]])
            classes = {k: np.concatenate([clip_classes[k][clip], still_classes[k][still]]) for k in labels}
            yield mirror_half(pixels, classes, rng)

    model = FrameClassifier(FaceXFormerEncoder(**vars(config.model.facexformer)), _counts(labels))
    # Small things, which a token has to say loudly.
    importance = dict.fromkeys(rendered_faces.DETAILS, 2.5) | {"beard": 1.5}
    how = {"rate": pretrain.learning_rate, "seed": config.seed, "importance": importance}
    weights = fit_classifier(model, batches(), pretrain.facial_steps, name="facial encoder", **how)
    save_weights(folder, flatten_dict({"facexformer": weights["encoder"]}, sep="/"), {"kind": "facexformer"})


def make_general_encoder(config: Config, records: Sequence[Record], frames: Frames, folder: Path) -> None:
    """Writes the weights folder of a general encoder that names content and motion of clips; arguments as above."""
    pretrain = Pretrain.of(config)
    labels = ("motion", *rendered_faces.GENERAL_LABELS, "emotion", "hat")
    faces = np.flatnonzero([record.has_face for record in records])
    clips, clip_classes = frames(), _classes(records, labels)
    general, general_classes = draw_general_clips(pretrain.general_clips, config.seed, config.model.image_size)
    unknown = np.full(len(general), -1, np.int32)
    rng = np.random.default_rng(config.seed + 2)

    def batches(size: int = 32):
        """One half faces, the other drawn general clips, of which a data set has few."""
        while True:
            face, other = rng.choice(faces, size // 2), rng.integers(len(general), size=size // 2)
            times = np.stack([frame_indices(FRAMES, config.model.frames, "rand", rng) for _ in range(size)])
            pixels = np.concatenate(
                [clips[face[:, None], times[: len(face)]], general[other[:, None], times[len(face) :]]]
            )
            classes = {
                k: np.concatenate([clip_classes[k][face], general_classes.get(k, unknown)[other]]) for k in labels
            }
            yield mirror_half(pixels, classes, rng)

    model = ClipClassifier(UMT(**vars(config.model.umt)), _counts(labels))
    # What moves and whither is what only this stream can see, and what takes longest to learn.
    importance = {"motion": 2.0, "direction": 2.0}
    how = {"rate": pretrain.learning_rate, "seed": config.seed, "importance": importance}
    weights = fit_classifier(model, batches(), pretrain.general_steps, name="general encoder", **how)
    tree = {"umt": weights["encoder"], "vision_layernorm": weights["vision_layernorm"]}
    save_weights(folder, flatten_dict(tree, sep="/"), {"kind": "umt"})


def mirror_half(
    pixels: UInt8[np.ndarray, "B *T H W 3"], classes: dict[str, Int[np.ndarray, " B"]], rng: np.random.Generator
) -> tuple:
    """Mirrors one half of a batch, its lefts and rights with it."""
    chosen = rng.random(len(pixels)) < 0.5
    pixels = pixels.copy()
    pixels[chosen] = pixels[chosen][..., ::-1, :]
    other = {"left": "right", "right": "left"}
    mirrored = {}
    for label, wanted in classes.items():
        names = rendered_faces.LABELS[label]
        swapped = np.array([*(names.index(other.get(name, name)) for name in names), -1])  # -1, unknown, stays so
        mirrored[label] = np.where(chosen, swapped[wanted], wanted)
    return pixels, mirrored


def fit_classifier(
    model, batches, steps: int, *, rate: float, seed: int, name: str, importance: dict[str, float]
) -> dict:
    """Trains the encoder under heads that stay as they were drawn, so that what the labels need must become most of
    what a token holds; heads that learn would make do with faint traces, which a fresh Q-Former takes long to find."""

    def loss(weights, pixels, classes):
        scores = model.apply({"params": {**weights, **heads}}, normalise(pixels))
        total = 0.0
        for label, wanted in classes.items():
            known = wanted >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(scores[label], jnp.where(known, wanted, 0))
            total += importance.get(label, 1.0) * jnp.sum(losses * known) / jnp.maximum(jnp.sum(known), 1)
        return total / len(classes)

    example = next(batches)[0][:1].astype(np.float32)
    drawn = jax.jit(model.init)(jax.random.key(seed), example)["params"]
    heads = {label: drawn.pop(label) for label in model.classes}
    return fit(loss, drawn, batches, steps, rate, name) | heads


def _classes(records: Sequence[Record], labels: Sequence[str]) -> dict[str, Int[np.ndarray, " N"]]:
    """Class of each clip for each label, -1 where a clip has none."""
    return {label: np.array([record.labels[label] for record in records], np.int32) for label in labels}


def _counts(labels: Sequence[str]) -> dict[str, int]:
    return {label: len(rendered_faces.LABELS[label]) for label in labels}
