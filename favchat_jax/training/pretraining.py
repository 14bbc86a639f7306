"""The embedded preset's pretrained parts: small stand-ins for Mistral-7B, UMT-L and FaceXFormer, made in minutes.

Each is written to the same kind of folder as the published part it stands for and loaded by the same code: the language
model as a Hugging Face folder, the encoders as weights folders. Without them a run of minutes learns no facial detail.

- Language model: reads captions in the place where visual tokens will stand, and answers questions about them.
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
from einops import rearrange
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, UInt8
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from favchat_jax.convert import mistral as mistral_folder
from favchat_jax.data import rendered_faces
from favchat_jax.data.conversation import Conversation, load_tokenizer
from favchat_jax.data.datasets import Record, open_dataset, prepare
from favchat_jax.data.loader import INSTRUCTIONS
from favchat_jax.data.video import decode, frame_indices
from favchat_jax.models.facexformer import FaceXFormerEncoder
from favchat_jax.models.favchat import PIXEL_MEAN, PIXEL_STD, VISION_LAYERNORM_EPSILON
from favchat_jax.models.linear import Linear
from favchat_jax.models.mistral import Mistral
from favchat_jax.models.umt import UMT
from favchat_jax.training.checkpoint import save_weights
from favchat_jax.training.stages import decays
from favchat_jax.training.step import chunked_cross_entropy, next_token_targets

log = logging.getLogger("favchat_jax")

CLIP_FRAMES = rendered_faces.drawing.FRAMES
DATA = "rendered_faces"
REPEAT = "Repeat all that was said of the video."
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
    """AdamW over `steps` batches with warm-up and cosine decay; a batch is what `loss` takes after the weights."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), max(2, steps), rate * 0.05)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: decays(str(path[-1].key)), weights)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.02, mask=mask))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
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
    texts = _caption_texts(tokenizer, records, config.data.buckets[-1], rng)

    def loss(weights, tokens: Int[Array, "B L"], counted):
        params = {"params": weights}
        hidden, _ = model.apply(params, model.apply(params, tokens, method="embed"))
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


def _caption_texts(
    tokenizer, records: Sequence[Record], length: int, rng: np.random.Generator, batch: int = 16
) -> Iterator[tuple]:
    """Endless batches (tokens, counted): a caption between <Video> and </Video>, then questions about it or a request
    to describe it; answers are counted. A caption lists facts of a clip in random order, so that any place of the slot
    may hold any fact. Several questions a text, since reading the slot is what is to be learned."""
    pool = [text for record in records for text in _texts_about(record, tokenizer, rng)]
    pool = [text for text in pool if len(text[0]) <= length]
    while True:
        tokens = np.zeros((batch, length), np.int32)
        counted = np.zeros((batch, length), bool)
        for row, i in enumerate(rng.integers(len(pool), size=batch)):
            tokens[row, : len(pool[i][0])], counted[row, : len(pool[i][1])] = pool[i]
        yield tokens, counted


def _texts_about(record: Record, tokenizer, rng: np.random.Generator, count: int = 6) -> Iterator[tuple]:
    """(tokens, counted) of `count` texts about one clip. To repeat all facts in another order is a dozen look-ups in
    one text, which is what makes a small model learn to look up at all."""
    labels = {name: rendered_faces.LABELS[name][value] for name, value in record.labels.items() if value >= 0}
    facts = {name: f"{name.replace('_', ' ')} {rendered_faces.answer(name, value)}" for name, value in labels.items()}
    askable = [name for name in labels if name in rendered_faces.QUESTIONS]

    def listed(names) -> str:
        return ", ".join(facts[name] for name in rng.permutation(names))

    for kind in rng.choice(("repeat", "describe", "ask"), size=count, p=(0.4, 0.2, 0.4)):
        told = list(labels)
        if kind == "repeat":
            turns = [(REPEAT, listed(told))]
        elif kind == "describe":
            turns = [(str(rng.choice(INSTRUCTIONS)), record.summary)]
        else:
            asked = rng.permutation(askable)[:4]
            turns = [
                (str(rng.choice(rendered_faces.QUESTIONS[name])), rendered_faces.answer(name, labels[name]))
                for name in asked
            ]
        caption = tokenizer.encode(listed(told), add_special_tokens=False)
        text = Conversation(tokenizer, len(caption)).encode(turns, CLIP_FRAMES, 10_000)
        tokens = text.tokens.copy()
        tokens[tokens < 0] = caption
        yield tokens, text.loss_mask


# Encoders


class FrameClassifier(nn.Module):
    """The facial encoder under one linear head a label, each over the whole coarsest map."""

    encoder: FaceXFormerEncoder
    classes: dict[str, int]

    @nn.compact
    def __call__(self, frames: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B C"]]:
        """Scores of each label's classes."""
        deepest = rearrange(self.encoder(frames)[-1], "B H W D -> B (H W D)")
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
        per_frame = rearrange(tokens, "B (T L) D -> B T L D", T=frames.shape[1]).mean(axis=2)
        flat = rearrange(per_frame, "B T D -> B (T D)")
        return {label: Linear(count, name=label)(flat) for label, count in self.classes.items()}


def _make_facial_encoder(config, records: Sequence[Record], frames, folder: Path) -> None:
    labels = (*rendered_faces.APPEARANCE, *rendered_faces.DETAILS, "emotion")
    faces = np.array([record.has_face for record in records])
    pixels, classes = frames()[faces], _classes([r for r in records if r.has_face], labels)
    rng = np.random.default_rng(config.seed + 1)

    def batches(size: int = 128):
        while True:
            clip = rng.integers(len(pixels), size=size)
            yield pixels[clip, rng.integers(CLIP_FRAMES, size=size)], {k: v[clip] for k, v in classes.items()}

    model = FrameClassifier(FaceXFormerEncoder(**config.model.facexformer), _counts(labels))
    weights = _fit_classifier(model, batches(), config.pretrain.facial_steps, config, "facial encoder", {})
    save_weights(folder, _flat({"facexformer": weights["encoder"]}), {"kind": "facexformer"})


def _make_general_encoder(config, records: Sequence[Record], frames, folder: Path) -> None:
    labels = ("motion", "emotion", *rendered_faces.GENERAL_LABELS, "hair", "hair_length", "hat", "skin")
    pixels, classes = frames(), _classes(records, labels)
    rng = np.random.default_rng(config.seed + 2)

    def batches(size: int = 16):
        while True:
            clip = rng.integers(len(pixels), size=size)
            times = np.stack([frame_indices(CLIP_FRAMES, config.model.frames, "rand", rng) for _ in clip])
            yield pixels[clip[:, None], times], {k: v[clip] for k, v in classes.items()}

    model = ClipClassifier(UMT(**config.model.umt), _counts(labels))
    # Motion is what only this stream can see, and what takes longest to learn.
    weights = _fit_classifier(
        model, batches(), config.pretrain.general_steps, config, "general encoder", {"motion": 4.0}
    )
    tree = {"umt": weights["encoder"], "vision_layernorm": weights["vision_layernorm"]}
    save_weights(folder, _flat(tree), {"kind": "umt"})


def _fit_classifier(model, batches, steps: int, config, name: str, importance: dict[str, float]) -> dict:
    def loss(weights, pixels, classes):
        x = (pixels.astype(jnp.float32) / 255 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
        scores = model.apply({"params": weights}, x)
        total = 0.0
        for label, wanted in classes.items():
            known = wanted >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(scores[label], jnp.where(known, wanted, 0))
            total += importance.get(label, 1.0) * jnp.sum(losses * known) / jnp.maximum(jnp.sum(known), 1)
        return total / len(classes)

    example = next(batches)[0][:1].astype(np.float32)
    weights = jax.jit(model.init)(jax.random.key(config.seed), example)["params"]
    return _fit(loss, weights, batches, steps, config.pretrain.learning_rate, name)


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
