"""The language model's stand-in: reads facts in the places where visual tokens will stand, and answers questions.

A tokenizer trained on the corpus and a small Mistral, in a Hugging Face folder.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from favchat_jax.checkpoints import mistral_folder
from favchat_jax.config import Config
from favchat_jax.data.conversation import Conversation, load_tokenizer
from favchat_jax.data.loader import INSTRUCTIONS
from favchat_jax.data.record import Record
from favchat_jax.embedded import faces as rendered_faces
from favchat_jax.embedded.drawing import FRAMES
from favchat_jax.embedded.fitting import fit
from favchat_jax.embedded.pretrain import LanguageModelSizes, Pretrain
from favchat_jax.models import favchat
from favchat_jax.models.mistral import Mistral
from favchat_jax.training.step import chunked_cross_entropy, next_token_targets

DESCRIBED = 0.2  # share of the texts that ask for a description
QUESTIONS = 6  # in each of the others
NOISE = 0.5  # in a told fact, as a share of its size


def make_language_model(config: Config, records: Sequence[Record], frames: Callable, folder: Path) -> None:
    """Writes a Hugging Face folder of a small Mistral that answers questions about facts told in words.

    Args:
        config: a stage's config; `pretrain` counts, and how many visual tokens there will be.
        records: the training clips; their text alone is read.
        frames: of no use here; the encoders need it.
        folder: where to write.
    """
    del frames
    pretrain, rng = Pretrain.of(config), np.random.default_rng(config.seed)
    told = [text for r in records for text in (r.summary, *r.targets.values(), *_spoken(r))]
    write_sizes(folder, pretrain.llm, told)
    tokenizer = load_tokenizer(folder)
    model = Mistral(mistral_folder.read_config(folder))
    visual_tokens = config.model.qformer.queries + config.model.qformer.extra_queries
    texts = _texts(Conversation(tokenizer, visual_tokens), tokenizer, records, config.data.buckets[-1], rng)

    def embed(mdl: Mistral, tokens, slot, fading, seed):
        """Word embeddings, and in the n-th place of the slot the average of its n-th fact's words.

        Names that may are fainter by a random share: a fresh visual token shows something before it says what that is,
        and where both only together tell an answer, neither gets a gradient before the other is there. And there is
        noise: a visual token will hold more than one fact's words too.
        """
        named, noise = jax.random.split(jax.random.key(seed))
        share = jax.random.uniform(named, (*slot.shape[:2], 1))
        weight = (slot >= 0) * jnp.where(fading, share, 1.0)
        facts = jnp.einsum("bnw,bnwd->bnd", weight, mdl.embed(slot)) / jnp.sum(slot >= 0, axis=2, keepdims=True)
        size = jnp.sqrt(jnp.mean(facts**2, axis=-1, keepdims=True))
        facts += NOISE * size * jax.random.normal(noise, facts.shape)
        return favchat.place_visual_tokens(mdl.embed(tokens), tokens, facts)

    def loss(weights, tokens: Int[Array, "B L"], counted, slot: Int[Array, "B N W"], fading, seed):
        params = {"params": weights}
        hidden = model.apply(params, tokens, slot, fading, seed, method=lambda m, *x: m(embed(m, *x)))
        targets, counted = next_token_targets(tokens, counted)
        total, _ = chunked_cross_entropy(
            lambda h: model.apply(params, h, method="logits"), hidden, targets, counted, 4096
        )
        return total / jnp.sum(counted)

    weights = model.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32), method="read")["params"]
    weights = fit(loss, weights, texts, pretrain.llm_steps, pretrain.learning_rate, "language model")
    mistral_folder.write_weights(folder, jax.device_get(weights))


def _spoken(record: Record) -> Iterator[str]:
    return (f"{q.question} {q.answer}" for q in record.questions)


def write_sizes(folder: Path, sizes: LanguageModelSizes, texts: Sequence[str]) -> None:
    """Writes what a Hugging Face folder holds beside its weights: config.json of these sizes, and a tokenizer.

    Args:
        folder: where to write.
        sizes: of the model.
        texts: what the tokenizer learns its pieces from.
    """
    _train_tokenizer(texts, sizes.vocabulary).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
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


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding over the corpus' text, with Mistral's special tokens."""
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
    """Endless batches (tokens, counted, slot, fading, seed) of conversations about clips that are told in words.

    Questions, or a request to describe; answers are counted. A place of the slot holds the words of one fact, ids
    padded with -1, as a visual token stands for one thing seen; facts come in random order, so that any place may hold
    any of them. `fading` marks words that may be fainter; the seed is of all else that is drawn for the batch.
    """
    pool = [text for record in records for text in texts_about(record, conversation, tokenizer, rng)]
    pool = [text for text in pool if len(text[0]) <= length]
    length = max(len(text[0]) for text in pool)
    widest = max(len(faint) + len(clear) for *_, slot in pool for faint, clear in slot)
    while True:
        tokens = np.zeros((batch, length), np.int32)
        counted = np.zeros((batch, length), bool)
        slots = np.full((batch, conversation.visual_tokens, widest), -1, np.int32)
        fading = np.zeros(slots.shape, bool)
        for row, i in enumerate(rng.integers(len(pool), size=batch)):
            tokens[row, : len(pool[i][0])], counted[row, : len(pool[i][1])], slot = pool[i]
            for n, (faint, clear) in enumerate(slot):
                slots[row, n, : len(faint) + len(clear)] = [*faint, *clear]
                fading[row, n, : len(faint)] = True
        yield tokens, counted, slots, fading, rng.integers(2**31)


def texts_about(
    record: Record, conversation: Conversation, tokenizer, rng: np.random.Generator, count: int = 6
) -> Iterator[tuple]:
    """(tokens, counted, slot) of `count` texts about one clip; a place has words that may be fainter, and the others.

    Names may, but those of details: whether a "left cheek" is a mole's or a scar's is told by nothing else.
    """
    labels = {name: rendered_faces.LABELS[name][value] for name, value in record.labels.items() if value >= 0}
    words = functools.partial(tokenizer.encode, add_special_tokens=False)
    facts = []
    for label, value in labels.items():
        name, told = words(f" {label.replace('_', ' ')}"), words(f" {rendered_faces.answer(label, value)}")
        facts.append(([], name + told) if label in rendered_faces.DETAILS else (name, told))
    askable = [name for name in labels if name in rendered_faces.QUESTIONS]
    for describe in rng.random(count) < DESCRIBED:
        if describe:
            turns = [(str(rng.choice(INSTRUCTIONS)), record.summary)]
        else:
            turns = [
                (str(rng.choice(rendered_faces.QUESTIONS[name])), rendered_faces.answer(name, labels[name]))
                for name in rng.permutation(askable)[:QUESTIONS]
            ]
        text = conversation.encode(turns, FRAMES, 10_000)
        # Every fact at least once, some again where there are more places.
        order = rng.permutation(np.resize(rng.permutation(len(facts)), conversation.visual_tokens))
        yield text.tokens, text.loss_mask, [facts[i] for i in order]
