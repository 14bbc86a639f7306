"""Builds and pretrains small stand-ins for the two published encoders, for the embedded preset.

- The general encoder, in place of UMT-L, learns to name the content and the motion of a clip from all its frames.
- The facial encoder, in place of FaceXFormer, learns to name the attributes of single frames, which are about eight
  times cheaper than clips.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The facial encoder with one linear head per label on the average of its coarsest map."""

    encoder: FaceXFormerEncoder
    classes: dict[str, int]

    @nn.compact
    def __call__(self, frames: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B C"]]:
        """Returns the scores of each label's classes."""
        deepest = nn.LayerNorm(name="norm")(self.encoder(frames)[-1]).mean(axis=(1, 2))
        return {label: Linear(count, name=label)(deepest) for label, count in self.classes.items()}


class ClipClassifier(nn.Module):
    """The general encoder with one linear head per label on the clip's average token."""

    encoder: UMT
    classes: dict[str, int]

    @nn.compact
    def __call__(self, frames: Float[Array, "B T H W 3"]) -> dict[str, Float[Array, "B C"]]:
        """Returns the scores of each label's classes."""
        norm = nn.LayerNorm(VISION_LAYERNORM_EPSILON, use_fast_variance=False, name="vision_layernorm")
        average = norm(self.encoder(frames)[0]).mean(axis=1)
        return {label: Linear(count, name=label)(average) for label, count in self.classes.items()}


Frames = Callable[[], UInt8[np.ndarray, "N T H W 3"]]
Classes = dict[str, Int[np.ndarray, " B"]]  # label -> the class of each item, -1 if unknown


def make_facial_encoder(config: Config, records: Sequence[Record], frames: Frames, folder: Path) -> None:
    """Pretrains the facial encoder on single frames and writes its weights folder.

    Args:
        config: a stage's config; reads `seed`, `model` and `pretrain`.
        records: the training clips.
        frames: decodes the frames of all training clips.
        folder: the folder to write.
    """
    pretrain = Pretrain.of(config)
    labels = (*rendered_faces.APPEARANCE, *rendered_faces.DETAILS, "emotion")
    faces = np.flatnonzero([record.has_face for record in records])
    clips, clip_classes = frames(), _classes(records, labels)
    stills, still_classes = draw_stills(pretrain.stills, config.seed, config.model.image_size)
    rng = np.random.default_rng(config.seed + 1)

    def batches(size: int = 128) -> Iterator[tuple]:
        """Yields one quarter frames of clips, with their compression, and three quarters stills of other people."""
        while True:
            clip, still = rng.choice(faces, size // 4), rng.integers(len(stills), size=size - size // 4)
            pixels = np.concatenate([clips[clip, rng.integers(FRAMES, size=len(clip))], stills[still, 0]])
            classes = {k: np.concatenate([clip_classes[k][clip], still_classes[k][still]]) for k in labels}
            yield mirror_half(pixels, classes, rng)

    model = FrameClassifier(FaceXFormerEncoder(**vars(config.model.facexformer)), _counts(labels))
    # Details cover few pixels, so they need a larger weight to show in a token.
    importance = dict.fromkeys(rendered_faces.DETAILS, 2.5) | {"beard": 1.5}
    weights = fit_classifier(
        model, batches(), pretrain.facial_steps, pretrain.learning_rate, config.seed, "facial encoder", importance
    )
    save_weights(folder, flatten_dict({"facexformer": weights["encoder"]}, sep="/"), {"kind": "facexformer"})


def make_general_encoder(config: Config, records: Sequence[Record], frames: Frames, folder: Path) -> None:
    """Pretrains the general encoder on clips and writes its weights folder; arguments as in `make_facial_encoder`."""
    pretrain = Pretrain.of(config)
    labels = ("motion", *rendered_faces.GENERAL_LABELS, "emotion", "hat")
    faces = np.flatnonzero([record.has_face for record in records])
    clips, clip_classes = frames(), _classes(records, labels)
    general, general_classes = draw_general_clips(pretrain.general_clips, config.seed, config.model.image_size)
    unknown = np.full(len(general), -1, np.int32)
    rng = np.random.default_rng(config.seed + 2)

    def batches(size: int = 32) -> Iterator[tuple]:
        """Yields one half clips of faces and one half drawn general clips, which the data set has few of."""
        while True:
            face, other = rng.choice(faces, size // 2), rng.integers(len(general), size=size // 2)
            times = np.stack([frame_indices(FRAMES, config.model.frames, "rand", rng) for _ in range(size)])
            face_times, other_times = times[: len(face)], times[len(face) :]
            pixels = np.concatenate([clips[face[:, None], face_times], general[other[:, None], other_times]])
            classes = {
                k: np.concatenate([clip_classes[k][face], general_classes.get(k, unknown)[other]]) for k in labels
            }
            yield mirror_half(pixels, classes, rng)

    model = ClipClassifier(UMT(**vars(config.model.umt)), _counts(labels))
    importance = {"motion": 2.0, "direction": 2.0}  # only this stream sees motion, which takes longest to learn
    weights = fit_classifier(
        model, batches(), pretrain.general_steps, pretrain.learning_rate, config.seed, "general encoder", importance
    )
    tree = {"umt": weights["encoder"], "vision_layernorm": weights["vision_layernorm"]}
    save_weights(folder, flatten_dict(tree, sep="/"), {"kind": "umt"})


def mirror_half(
    pixels: UInt8[np.ndarray, "B *T H W 3"], classes: Classes, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "B *T H W 3"], Classes]:
    """Mirrors a random half of a batch, and swaps left and right in its classes."""
    chosen = rng.random(len(pixels)) < 0.5
    pixels = pixels.copy()
    pixels[chosen] = pixels[chosen][..., ::-1, :]
    other = {"left": "right", "right": "left"}
    mirrored = {}
    for label, wanted in classes.items():
        names = rendered_faces.LABELS[label]
        swapped = np.array([*(names.index(other.get(name, name)) for name in names), -1])  # the last maps -1 to itself
        mirrored[label] = np.where(chosen, swapped[wanted], wanted)
    return pixels, mirrored


def fit_classifier(
    model: FrameClassifier | ClipClassifier,
    batches: Iterator[tuple],
    steps: int,
    rate: float,
    seed: int,
    name: str,
    importance: Mapping[str, float],
) -> dict:
    """Trains a classifier's encoder and norm; the linear heads keep their initial weights.

    With frozen heads, the labels have to fill most of each token. Heads that learn would make do with faint traces,
    which a fresh Q-Former takes long to find.

    Args:
        model: the classifier.
        batches: yields (pixels, classes), where a class of -1 is ignored.
        steps: number of batches.
        rate: Muon's peak learning rate.
        seed: seed of the initial weights.
        name: name of the encoder in the progress bar.
        importance: weight of a label's loss; 1 for labels without an entry.

    Returns:
        The weights of the encoder, the norm and the heads.
    """

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


def _classes(records: Sequence[Record], labels: Sequence[str]) -> Classes:
    return {label: np.array([record.labels[label] for record in records], np.int32) for label in labels}


def _counts(labels: Sequence[str]) -> dict[str, int]:
    """Returns the number of classes of each label."""
    return {label: len(rendered_faces.LABELS[label]) for label in labels}
