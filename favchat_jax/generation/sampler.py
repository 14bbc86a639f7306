"""Answers in words: conversations become prompts of one length, tokens become texts.

Every shape is static: prompts are padded to a bucket, the cache has room for the bucket and the answer, so nothing
compiles twice. What is compiled is `generation/decoding.py`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from transformers import PreTrainedTokenizerBase

from favchat_jax.checkpoints.mistral_folder import read_config
from favchat_jax.config import Config
from favchat_jax.data.conversation import Conversation, PromptEncoder
from favchat_jax.generation.decoding import Decoder
from favchat_jax.models.favchat import ClipFeatures

Turn = tuple[str, str | None]
SHORTEST_STEP = 16  # tokens between two buckets of prompts, at least


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: an answer ends here at the latest.
        temperature: 0 takes the likeliest token; above, scores are divided by it.
        top_p: draw among the likeliest tokens whose probabilities add up to this.
        seed: of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Sampler:
    """Answers questions about clips with one model.

    Args:
        config: the run's config.
        weights: all weights of the model, flat.
        tokenizer: the language model's.
        prompt_tokenizer: the Q-Formers'.
    """

    def __init__(
        self,
        config: Config,
        weights: dict[str, Array],
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokenizer: PreTrainedTokenizerBase,
    ):
        self.frames, self.image_size = config.model.frames, config.model.image_size
        self.tokenizer = tokenizer
        qformer = config.model.qformer
        self.conversation = Conversation(tokenizer, qformer.queries + qformer.extra_queries)
        self.prompt = PromptEncoder(prompt_tokenizer, config.data.prompt_length)
        self._longest = max(config.data.buckets)
        self._decoder = Decoder(config, read_config(config.llm.path), self.conversation.eos)
        self.load(weights)

    @classmethod
    def of(cls, run: Any) -> "Sampler":
        """The sampler of a loaded run (`checkpoints.run.load_run`)."""
        return cls(run.config, run.weights, run.tokenizer, run.prompt_tokenizer)

    def load(self, weights: dict[str, Array]) -> None:
        """Answers with other weights of the same model from now on; nothing compiles again."""
        self._params = None  # not two merged language models at once
        self._params = self._decoder.lay_out(weights)

    def encode(self, frames: UInt8[np.ndarray, "B T H W 3"]) -> ClipFeatures:
        """Runs the encoders once; the result serves any number of questions about these clips."""
        return self._decoder.encode(self._params, frames)

    def stream_weights(self, features: ClipFeatures, questions: Sequence[Sequence[str]]) -> Float[np.ndarray, "B Q 2"]:
        """Average weights of the general and the facial stream in the visual tokens of Q questions about each clip."""
        prompts = [[self.prompt.encode(question) for question in asked] for asked in questions]
        ids, masks = (np.array([[prompt[part] for prompt in asked] for asked in prompts]) for part in (0, 1))
        return np.asarray(self._decoder.weigh(self._params, features, ids, masks))

    def answer(
        self, features: ClipFeatures, conversations: Sequence[Sequence[Sequence[Turn]]], sampling: Sampling
    ) -> list[list[str]]:
        """Answers Q conversations about each of B clips at once.

        Args:
            features: of the B clips, from `encode`.
            conversations: for each clip, Q lists of turns whose last answer is None; shorter lists are filled up.
            sampling: how tokens are drawn.

        Raises:
            UserError: an empty question, or a conversation longer than the largest bucket.
        """
        tokens = np.concatenate(
            list(self.blocks(features, conversations, sampling, sampling.max_new_tokens - 1)), axis=1
        )
        texts = [self.text(row) for row in tokens]
        questions = max(len(asked) for asked in conversations)
        return [texts[i * questions : i * questions + len(asked)] for i, asked in enumerate(conversations)]

    def log_likelihoods(
        self, features: ClipFeatures, conversations: Sequence[Sequence[Turn]], answers: Sequence[str]
    ) -> Float[np.ndarray, "B K"]:
        """Log-probability of each of K answers, its end included, to one conversation about each of B clips.

        Raises:
            UserError: an empty question or answer, or a conversation longer than the largest bucket.
        """
        asked = [self._encoded(turns) for turns in conversations]
        told = [[self._encoded([*turns[:-1], (turns[-1][0], a)]) for a in answers] for turns in conversations]
        longest = max(len(tokens) for row in told for tokens in row)
        bucket = self._padded(longest)
        most = max(len(whole) - len(start) for start, row in zip(asked, told, strict=True) for whole in row)
        tokens = np.full((len(told), len(answers), bucket), self.conversation.pad, np.int32)
        places = np.ones((len(told), len(answers), most), np.int32)
        scored = np.zeros(places.shape, bool)
        for i, (start, row) in enumerate(zip(asked, told, strict=True)):
            for j, whole in enumerate(row):
                tokens[i, j, : len(whole)] = whole
                places[i, j, : len(whole) - len(start)] = np.arange(len(start), len(whole))
                scored[i, j, : len(whole) - len(start)] = True
        prompts = [self.prompt.encode(turns[-1][0]) for turns in conversations]
        ids, masks = (np.array([[prompt[part]] for prompt in prompts]) for part in (0, 1))
        return np.asarray(self._decoder.compare(self._params, features, tokens, ids, masks, places, scored))

    def responses(
        self, features: ClipFeatures, questions: Sequence[str], group: int, sampling: Sampling
    ) -> Int[np.ndarray, "B G n"]:
        """G responses to one question about each of B clips, as token ids; after its end, a response repeats it.

        Each prompt is read once, and all tokens are drawn in one compiled loop. n is `sampling.max_new_tokens`.
        """
        conversations = [[[(question, None)]] for question in questions]
        count = sampling.max_new_tokens - 1
        blocks = list(self.blocks(features, conversations, sampling, count, copies=group))
        tokens = np.concatenate(blocks, axis=1).reshape(len(questions), group, -1)
        ended = sampling.max_new_tokens - tokens.shape[-1]
        return np.pad(tokens, [(0, 0), (0, 0), (0, ended)], constant_values=self.conversation.eos)

    def stream(self, features: ClipFeatures, turns: Sequence[Turn], sampling: Sampling) -> Iterator[str]:
        """The answer to one conversation about one clip, piece by piece as it is written."""
        written: list[int] = []
        shown = ""
        for block in self.blocks(features, [[turns]], sampling, 1):
            written.extend(block[0])
            text = self.text(np.array(written))
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                yield text[len(shown) :]
                shown = text
        yield self.text(np.array(written))[len(shown) :]

    def blocks(
        self,
        features: ClipFeatures,
        conversations: Sequence[Sequence[Sequence[Turn]]],
        sampling: Sampling,
        count: int,
        copies: int = 1,
    ) -> Iterator[Int[np.ndarray, "B n"]]:
        """Token ids as they are drawn: the first of each sequence, then `count` at a time until all have ended.

        Args as of `answer`; each conversation is answered `copies` times.
        """
        arrays = self._arrays(conversations)
        draw_how = (jnp.float32(sampling.temperature), jnp.float32(sampling.top_p))
        key = jax.random.key_data(jax.random.key(sampling.seed))
        room = sampling.max_new_tokens
        state = self._decoder.begin(self._params, features, arrays, key, *draw_how, room=room, copies=copies)
        yield np.asarray(state.token)[:, None]
        left = sampling.max_new_tokens - 1
        while left > 0 and not bool(jnp.all(state.done)):
            state, tokens = self._decoder.advance(self._params, state, *draw_how, count=count)
            yield np.asarray(tokens)[:, :left]
            left -= count

    def _encoded(self, turns: Sequence[Turn]) -> Int[np.ndarray, " L"]:
        return self.conversation.encode(turns, self.frames, self._longest).tokens

    def _padded(self, length: int) -> int:
        """The bucket of a prompt: four sizes an octave, so that few are compiled and little padding is computed."""
        step = max(SHORTEST_STEP, 2 ** ((length - 1).bit_length() - 3))
        return min(-(-length // step) * step, self._longest)

    def _arrays(self, conversations) -> dict[str, np.ndarray]:
        clips, questions = len(conversations), max(len(asked) for asked in conversations)
        rows = [list(asked) + [asked[0]] * (questions - len(asked)) for asked in conversations]
        encoded = [[self._encoded(turns) for turns in asked] for asked in rows]
        lengths = np.array([[len(tokens) for tokens in asked] for asked in encoded], np.int32)
        bucket = self._padded(int(lengths.max()))
        arrays = {
            "tokens": np.full((clips, questions, bucket), self.conversation.pad, np.int32),
            "last": lengths.reshape(-1) - 1,
            "prompt": np.zeros((clips, questions, self.prompt.length), np.int32),
            "prompt_mask": np.zeros((clips, questions, self.prompt.length), bool),
        }
        for i, asked in enumerate(encoded):
            for j, tokens in enumerate(asked):
                arrays["tokens"][i, j, : len(tokens)] = tokens
                arrays["prompt"][i, j], arrays["prompt_mask"][i, j] = self.prompt.encode(rows[i][j][-1][0])
        return arrays

    def text(self, tokens: Int[np.ndarray, " n"]) -> str:
        """What token ids say up to the first end among them."""
        ended = np.flatnonzero(tokens == self.conversation.eos)
        kept = tokens[: ended[0]] if len(ended) else tokens
        return self.tokenizer.decode(kept.tolist(), skip_special_tokens=True).strip()
