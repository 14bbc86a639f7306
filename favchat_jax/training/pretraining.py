"""The embedded preset's pretrained parts: small stand-ins for Mistral-7B, UMT-L and FaceXFormer, made in minutes.

Each is written to the same kind of folder as the published part it stands for and loaded by the same code: the language
model as a Hugging Face folder, the encoders as weights folders. Without them a run of minutes learns no facial detail.

- Language model: reads facts in the places where visual tokens will stand, and answers questions about them.
- General encoder: names what a clip shows and how it moves, from all frames at once.
- Facial encoder: names the attributes of single frames, about eight times cheaper than clips.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, UInt8
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from favchat_jax.convert import mistral as mistral_folder
from favchat_jax.data import rendered_faces
from favchat_jax.data.conversation import Conversation, load_tokenizer
from favchat_jax.data.datasets import Record, open_dataset, prepare
from favchat_jax.data.datasets.rendered_faces import draw_general_clips, draw_stills
from favchat_jax.data.loader import INSTRUCTIONS
from favchat_jax.data.video import decode, frame_indices
from favchat_jax.models import favchat
from favchat_jax.models.facexformer import FaceXFormerEncoder
from favchat_jax.models.favchat import PIXEL_MEAN, PIXEL_STD, VISION_LAYERNORM_EPSILON
from favchat_jax.models.linear import Linear
from favchat_jax.models.mistral import Mistral
from favchat_jax.models.umt import UMT
from favchat_jax.training.stages import make_optimizer
from favchat_jax.training.step import chunked_cross_entropy, compiler_options, next_token_targets
from favchat_jax.weights_folder import save_weights

log = logging.getLogger("favchat_jax")

CLIP_FRAMES = rendered_faces.drawing.FRAMES
DATA = "rendered_faces"
DESCRIBED = 0.2  # share of the language model's texts that ask for a description
QUESTIONS = 6  # in each of the others
NOISE = 0.5  # in a told fact, as a share of its size
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
        config.llm.path: _make_language_model,
        config.init.facexformer: _make_facial_encoder,
        config.init.umt: _make_general_encoder,
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


def _fit(
    loss: Callable[..., Float[Array, ""]], weights: dict, batches: Iterator[tuple], steps: int, rate: float, name: str
) -> dict:
    """Muon over `steps` batches with warm-up and cosine decay; a batch is what `loss` takes after the weights."""
    settings = {"name": "muon", "learning_rate": rate, "warmup": 0.1, "floor": 0.05}
    settings |= {"encoder_rate": 1.0, "b1": 0.9, "b2": 0.999, "weight_decay": 0.02, "clip_norm": 1.0}
    optimizer = make_optimizer(ml_collections.ConfigDict(settings), steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=compiler_options())
    def update(weights, moments, *batch):
        value, gradient = jax.value_and_grad(loss)(weights, *batch)
        updates, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, updates), moments, value

    moments = optimizer.init(weights)
    with tqdm(total=steps, desc=f"pretraining {name}", unit="step", mininterval=1) as bar:
        for step in range(steps):
            weights, moments, value = update(weights, moments, *next(batches))
            if (step + 1) % 10 == 0:
                bar.update(10)
                bar.set_postfix(loss=f"{float(value):.3f}")
    return weights


# Language model


def _make_language_model(config, records: Sequence[Record], frames, folder: Path) -> None:
    del frames
    rng = np.random.default_rng(config.seed)
    _train_tokenizer(records, config.pretrain.llm.vocabulary).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    sizes = config.pretrain.llm
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "vocab_size": sizes.vocabulary,
                "hidden_size": sizes.width,
                "intermediate_size": sizes.mlp,
                "num_hidden_layers": sizes.layers,
                "num_attention_heads": sizes.heads,
                "num_key_value_heads": sizes.kv_heads,
                "head_dim": sizes.width // sizes.heads,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "sliding_window": None,
                "max_position_embeddings": 512,
                "tie_word_embeddings": False,
                "hidden_act": "silu",
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "torch_dtype": "float32",
            },
            indent=1,
        )
    )
    model = Mistral(mistral_folder.read_config(folder))
    visual_tokens = config.model.qformer.queries + config.model.qformer.extra_queries
    texts = _texts(Conversation(tokenizer, visual_tokens), tokenizer, records, config.data.buckets[-1], rng)

    def embed(mdl: Mistral, tokens, slot, seed):
        """Word embeddings, and in the n-th place of the slot the average of its n-th fact's words, with noise: a
        visual token will hold more than one fact's words too."""
        known = (slot >= 0)[..., None]
        facts = jnp.sum(mdl.embed(slot) * known, axis=2) / jnp.sum(known, axis=2)
        noise = jax.random.normal(jax.random.key(seed), facts.shape)
        facts += NOISE * jnp.sqrt(jnp.mean(facts**2, axis=-1, keepdims=True)) * noise
        return favchat.place_visual_tokens(mdl.embed(tokens), tokens, facts)

    def loss(weights, tokens: Int[Array, "B L"], counted, slot: Int[Array, "B N W"], seed):
        params = {"params": weights}
        hidden, _ = model.apply(params, tokens, slot, seed, method=lambda m, *x: m(embed(m, *x)))
        targets, counted = next_token_targets(tokens, counted)
        total, _ = chunked_cross_entropy(
            lambda h: model.apply(params, h, method="logits"), hidden, targets, counted, 4096
        )
        return total / jnp.sum(counted)

    weights = model.init(
        jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32), method=lambda m, t: m.logits(m(m.embed(t))[0])
    )["params"]
    weights = _fit(loss, weights, texts, config.pretrain.llm_steps, config.pretrain.learning_rate, "language model")
    mistral_folder.write_weights(folder, jax.device_get(weights))


def _train_tokenizer(records: Sequence[Record], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding over the corpus' text, with Mistral's special tokens."""
    texts = [
        text
        for r in records
        for text in (r.summary, *r.targets.values(), *(f"{q.question} {q.answer}" for q in r.questions))
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<Video>", "</Video>", "<Image>", "</Image>"]
    tokenizer.train_from_iterator(
        (*texts, *INSTRUCTIONS),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=512,
    )


def _texts(
    conversation: Conversation,
    tokenizer,
    records: Sequence[Record],
    length: int,
    rng: np.random.Generator,
    batch: int = 16,
) -> Iterator[tuple]:
    """Endless batches (tokens, counted, slot, seed of the noise) of conversations about clips that are told in words.

    Questions, or a request to describe; answers are counted. A place of the slot holds the words of one fact, ids
    padded with -1, as a visual token stands for one thing seen; facts come in random order, so that any place may hold
    any of them.
    """
    pool = [text for record in records for text in _texts_about(record, conversation, tokenizer, rng)]
    pool = [text for text in pool if len(text[0]) <= length]
    length = max(len(text[0]) for text in pool)
    widest = max(len(words) for *_, slot in pool for words in slot)
    while True:
        tokens = np.zeros((batch, length), np.int32)
        counted = np.zeros((batch, length), bool)
        slots = np.full((batch, conversation.visual_tokens, widest), -1, np.int32)
        for row, i in enumerate(rng.integers(len(pool), size=batch)):
            tokens[row, : len(pool[i][0])], counted[row, : len(pool[i][1])], slot = pool[i]
            for place, words in zip(slots[row], slot, strict=True):
                place[: len(words)] = words
        yield tokens, counted, slots, rng.integers(2**31)


def _texts_about(
    record: Record, conversation: Conversation, tokenizer, rng: np.random.Generator, count: int = 6
) -> Iterator[tuple]:
    """(tokens, counted, slot) of `count` texts about one clip."""
    labels = {name: rendered_faces.LABELS[name][value] for name, value in record.labels.items() if value >= 0}
    facts = [
        tokenizer.encode(f" {name.replace('_', ' ')} {rendered_faces.answer(name, value)}", add_special_tokens=False)
        for name, value in labels.items()
    ]
    askable = [name for name in labels if name in rendered_faces.QUESTIONS]
    for describe in rng.random(count) < DESCRIBED:
        if describe:
            turns = [(str(rng.choice(INSTRUCTIONS)), record.summary)]
        else:
            turns = [
                (str(rng.choice(rendered_faces.QUESTIONS[name])), rendered_faces.answer(name, labels[name]))
                for name in rng.permutation(askable)[:QUESTIONS]
            ]
        text = conversation.encode(turns, CLIP_FRAMES, 10_000)
        # Every fact at least once, some again where there are more places.
        order = rng.permutation(np.resize(rng.permutation(len(facts)), conversation.visual_tokens))
        yield text.tokens, text.loss_mask, [facts[i] for i in order]


# Encoders


class FrameClassifier(nn.Module):
    """The facial encoder under one linear head a label, each over the whole coarsest map."""

    encoder: FaceXFormerEncoder
    classes: dict[str, int]

    @nn.compact
    def __call__(self, frames: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B C"]]:
        """Scores of each label's classes."""
        deepest = nn.LayerNorm(name="norm")(self.encoder(frames)[-1]).mean(axis=(1, 2))
        return {label: Linear(count, name=label)(deepest) for label, count in self.classes.items()}


class ClipClassifier(nn.Module):
    """The general encoder under one linear head a label, over each frame's average token."""

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


def _make_facial_encoder(config, records: Sequence[Record], frames, folder: Path) -> None:
    labels = (*rendered_faces.APPEARANCE, *rendered_faces.DETAILS, "emotion")
    faces = np.flatnonzero([record.has_face for record in records])
    clips, clip_classes = frames(), _classes(records, labels)
    stills, still_classes = draw_stills(config.pretrain.stills, config.seed, config.model.image_size)
    rng = np.random.default_rng(config.seed + 1)

    def batches(size: int = 128):
        """A quarter from clips, as they look after compression; the rest stills, each of another person."""
        while True:
            clip, still = rng.choice(faces, size // 4), rng.integers(len(stills), size=size - size // 4)
            pixels = np.concatenate([clips[clip, rng.integers(CLIP_FRAMES, size=len(clip))], stills[still, 0]])
            classes = {k: np.concatenate([clip_classes[k][clip], still_classes[k][still]]) for k in labels}
            yield _mirror_half(pixels, classes, rng)

    model = FrameClassifier(FaceXFormerEncoder(**config.model.facexformer), _counts(labels))
    weights = _fit_classifier(
        model,
        batches(),
        config.pretrain.facial_steps,
        config,
        "facial encoder",
        dict.fromkeys(rendered_faces.DETAILS, 2.0),
    )
    save_weights(folder, _flat({"facexformer": weights["encoder"]}), {"kind": "facexformer"})


def _make_general_encoder(config, records: Sequence[Record], frames, folder: Path) -> None:
    labels = ("motion", *rendered_faces.GENERAL_LABELS, "emotion", "hat")
    faces = np.flatnonzero([record.has_face for record in records])
    clips, clip_classes = frames(), _classes(records, labels)
    general, general_classes = draw_general_clips(config.pretrain.general_clips, config.seed, config.model.image_size)
    unknown = np.full(len(general), -1, np.int32)
    rng = np.random.default_rng(config.seed + 2)

    def batches(size: int = 16):
        """Two thirds faces, which alone show motion; the rest drawn general clips, of which a data set has few."""
        while True:
            face, other = rng.choice(faces, size - size // 3), rng.integers(len(general), size=size // 3)
            times = np.stack([frame_indices(CLIP_FRAMES, config.model.frames, "rand", rng) for _ in range(size)])
            pixels = np.concatenate(
                [clips[face[:, None], times[: len(face)]], general[other[:, None], times[len(face) :]]]
            )
            classes = {
                k: np.concatenate([clip_classes[k][face], general_classes.get(k, unknown)[other]]) for k in labels
            }
            yield _mirror_half(pixels, classes, rng)

    model = ClipClassifier(UMT(**config.model.umt), _counts(labels))
    # Motion is what only this stream can see, and what takes longest to learn.
    weights = _fit_classifier(
        model, batches(), config.pretrain.general_steps, config, "general encoder", {"motion": 2.0}
    )
    tree = {"umt": weights["encoder"], "vision_layernorm": weights["vision_layernorm"]}
    save_weights(folder, _flat(tree), {"kind": "umt"})


def _mirror_half(
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


def _fit_classifier(model, batches, steps: int, config, name: str, importance: dict[str, float]) -> dict:
    """Trains the encoder under heads that stay as they were drawn, so that what the labels need must become most of
    what a token holds; heads that learn would make do with faint traces, which a fresh Q-Former takes long to find."""

    def loss(weights, pixels, classes):
        x = (pixels.astype(jnp.float32) / 255 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
        scores = model.apply({"params": {**weights, **heads}}, x)
        total = 0.0
        for label, wanted in classes.items():
            known = wanted >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(scores[label], jnp.where(known, wanted, 0))
            total += importance.get(label, 1.0) * jnp.sum(losses * known) / jnp.maximum(jnp.sum(known), 1)
        return total / len(classes)

    example = next(batches)[0][:1].astype(np.float32)
    drawn = jax.jit(model.init)(jax.random.key(config.seed), example)["params"]
    heads = {label: drawn.pop(label) for label in model.classes}
    return _fit(loss, drawn, batches, steps, config.pretrain.learning_rate, name) | heads


def _classes(records: Sequence[Record], labels: Sequence[str]) -> dict[str, Int[np.ndarray, " N"]]:
    """Class of each clip for each label, -1 where a clip has none."""
    return {label: np.array([record.labels[label] for record in records], np.int32) for label in labels}


def _counts(labels: Sequence[str]) -> dict[str, int]:
    return {label: len(rendered_faces.LABELS[label]) for label in labels}


def _decode_all(records: Sequence[Record], size: int) -> UInt8[np.ndarray, "N T H W 3"]:
    """Every frame of every clip, at the model's size."""
    with ThreadPoolExecutor(2) as pool:  # decoding runs outside Python's lock
        clips = pool.map(lambda r: decode(r.clip, frames=CLIP_FRAMES, size=size, name=r.id).frames, records)
        return np.stack(list(tqdm(clips, total=len(records), desc="decoding clips", unit="clip", mininterval=1)))


def _flat(tree: dict) -> dict[str, jax.Array]:
    return flatten_dict(tree, sep="/")
