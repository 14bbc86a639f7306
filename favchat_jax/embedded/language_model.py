"""Builds and pretrains a small stand-in for Mistral-7B, for the embedded preset.

It is a Hugging Face folder with a small Mistral and a tokenizer trained on the data's texts. The model learns to answer
questions about facts: in place of each visual token, it reads the word embeddings of one fact.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
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
QUESTIONS = 6  # questions in each of the other texts
NOISE = 0.5  # standard deviation of a fact's noise, as a share of the fact's root mean square


def make_language_model(config: Config, records: Sequence[Record], frames: Callable | None, folder: Path) -> None:
    """Pretrains a small Mistral on questions about facts and writes its Hugging Face folder.

    Args:
        config: a stage's config; reads `seed`, `pretrain`, `data.buckets` and the number of visual tokens.
        records: the training clips, of which only the texts are read.
        frames: unused; the encoders' makers take the same arguments.
        folder: the folder to write.
    """
    del frames
    pretrain, rng = Pretrain.of(config), np.random.default_rng(config.seed)
    corpus = [
        text
        for r in records
        for text in (r.summary, *r.targets.values(), *(f"{q.question} {q.answer}" for q in r.questions))
    ]
    write_sizes(folder, pretrain.llm, corpus)
    tokenizer = load_tokenizer(folder)
    model = Mistral(mistral_folder.read_config(folder))
    visual_tokens = config.model.qformer.queries + config.model.qformer.extra_queries
    batches = _batches(Conversation(tokenizer, visual_tokens), tokenizer, records, config.data.buckets[-1], rng)

    def loss(weights, tokens: Int[Array, "B L"], counted: Bool[Array, "B L"], *facts: Array):
        params = {"params": weights}
        hidden = model.apply(params, tokens, *facts, method=lambda m, *x: m(_embed(m, *x)))
        targets, counted = next_token_targets(tokens, counted)
        total, _ = chunked_cross_entropy(
            lambda h: model.apply(params, h, method="logits"), hidden, targets, counted, 4096
        )
        return total / jnp.sum(counted)

    weights = model.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32), method="read")["params"]
    weights = fit(loss, weights, batches, pretrain.llm_steps, pretrain.learning_rate, "language model")
    mistral_folder.write_weights(folder, jax.device_get(weights))


def _embed(
    model: Mistral, tokens: Int[Array, "B L"], words: Int[Array, "B N W"], is_name: Bool[Array, "B N W"], seed: Array
) -> Float[Array, "B L D"]:
    """Embeds texts with their facts: visual token n is the mean word embedding of fact n, with noise.

    Attribute names are down-weighted by a random factor. A fresh visual token shows a value before it shows the value's
    attribute. If only both together gave the answer, neither would get a gradient before the other is learned. The
    noise imitates the other facts that a visual token will also hold.

    Args:
        model: the bound language model.
        tokens: texts with placeholders for visual tokens.
        words: token ids of each of N facts, padded with -1.
        is_name: whether a word belongs to a fact's attribute name.
        seed: seed of the factors and of the noise.
    """
    for_names, for_noise = jax.random.split(jax.random.key(seed))
    share = jax.random.uniform(for_names, (*words.shape[:2], 1))
    weight = (words >= 0) * jnp.where(is_name, share, 1.0)
    facts = jnp.einsum("bnw,bnwd->bnd", weight, model.embed(words)) / jnp.sum(words >= 0, axis=2, keepdims=True)
    size = jnp.sqrt(jnp.mean(facts**2, axis=-1, keepdims=True))
    facts += NOISE * size * jax.random.normal(for_noise, facts.shape)
    return favchat.place_visual_tokens(model.embed(tokens), tokens, facts)


def write_sizes(folder: Path, sizes: LanguageModelSizes, texts: Sequence[str]) -> None:
    """Writes the files of a Hugging Face folder except its weights: config.json and a trained tokenizer.

    Args:
        folder: the folder to write.
        sizes: sizes of the model, for config.json.
        texts: the texts that the tokenizer is trained on.
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
    """Trains byte-pair encoding on the texts, with Mistral's special tokens."""
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


def _batches(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Record],
    length: int,
    rng: np.random.Generator,
    batch: int = 16,
) -> Iterator[tuple]:
    """Yields endless batches of random texts: (tokens, counted, words, is_name, seed), see `_embed`.

    `counted` marks the answers, whose tokens the loss counts. Texts of more than `length` tokens are left out.
    """
    pool = [text for record in records for text in texts_about(record, conversation, tokenizer, rng)]
    pool = [text for text in pool if len(text[0]) <= length]
    length = max(len(text[0]) for text in pool)
    widest = max(len(name) + len(value) for *_, facts in pool for name, value in facts)
    while True:
        tokens = np.zeros((batch, length), np.int32)
        counted = np.zeros((batch, length), bool)
        words = np.full((batch, conversation.visual_tokens, widest), -1, np.int32)
        is_name = np.zeros(words.shape, bool)
        for row, i in enumerate(rng.integers(len(pool), size=batch)):
            text, answers, facts = pool[i]
            tokens[row, : len(text)] = text
            counted[row, : len(answers)] = answers
            for n, (name, value) in enumerate(facts):
                words[row, n, : len(name) + len(value)] = [*name, *value]
                is_name[row, n, : len(name)] = True
        yield tokens, counted, words, is_name, rng.integers(2**31)


def texts_about(
    record: Record,
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    count: int = 6,
) -> Iterator[tuple]:
    """Yields `count` texts about one clip, each with a fact for every visual token.

    A text is (tokens, loss mask, facts), and a fact is (token ids of the attribute's name, token ids of its value). The
    facts come in random order, so that any visual token may hold any fact. A detail has its name within its value,
    since the name is never down-weighted: nothing else tells a mole's "left cheek" from a scar's.
    """
    labels = {name: rendered_faces.LABELS[name][value] for name, value in record.labels.items() if value >= 0}
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    facts = []
    for label, value in labels.items():
        name_ids = encode(f" {label.replace('_', ' ')}")
        value_ids = encode(f" {rendered_faces.answer(label, value)}")
        facts.append(([], name_ids + value_ids) if label in rendered_faces.DETAILS else (name_ids, value_ids))
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
        # Every fact appears at least once; some appear again if there are more visual tokens than facts.
        order = rng.permutation(np.resize(rng.permutation(len(facts)), conversation.visual_tokens))
        yield text.tokens, text.loss_mask, [facts[i] for i in order]
