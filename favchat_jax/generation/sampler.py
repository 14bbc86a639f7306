"""Answers in words: turns conversations into padded prompts, and drawn tokens into text.

Every shape is static: prompts are padded to a bucket, and the cache has room for the bucket and the answer, so that
nothing compiles twice. `generation/decoding.py` holds the compiled functions.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from favchat_jax.checkpoints.run import Assembly
from favchat_jax.generation.decoding import Decoder, Drawing
from favchat_jax.models.favchat import ClipFeatures
from favchat_jax.section import Allowed, CountOrZero, NotNegative, Positive, Section, Share
from favchat_jax.sharding import one_device, place_rows, to_host

Turn = tuple[str, str | None]
LONGEST = 4096  # most tokens of an answer, and of a conversation whose answer is weighed
SHORTEST_STEP = 16  # fewest tokens between two buckets of prompts

log = logging.getLogger("favchat_jax")


@dataclasses.dataclass(frozen=True)
class Sampling(Section):
    """How tokens are drawn.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token; above, scores are divided by it.
        top_p: draw from the likeliest tokens whose probabilities add up to this.
        seed: of the draws.
        top_k: draw from so many of the likeliest tokens; 0 for all.
        repetition_penalty: divides the scores of tokens that the answer has already; below 1, it favours them.
        stop: texts before which an answer ends.
    """

    max_new_tokens: Annotated[int, Allowed(lambda n: 1 <= n <= LONGEST, f": give 1 to {LONGEST} tokens")] = 64
    temperature: NotNegative = 0.0
    top_p: Share = 1.0
    seed: Annotated[int, Allowed(lambda seed: -(2**63) <= seed < 2**63, ": give a number of 64 bits")] = 0
    top_k: CountOrZero = 0
    repetition_penalty: Positive = 1.0
    stop: Annotated[tuple[str, ...], Allowed(all, ": an empty text stops nothing; leave it out")] = ()

    def drawing(self) -> Drawing:
        """Returns the part that the compiled functions read."""
        floats = (self.temperature, self.top_p, self.repetition_penalty)
        temperature, top_p, penalty = (np.array(value, np.float32) for value in floats)
        return Drawing(temperature, np.array(self.top_k, np.int32), top_p, penalty)

    def cut(self, text: str) -> str:
        """Returns an answer up to the first stop text in it."""
        return text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]

    def settled(self, text: str) -> str:
        """Returns the beginning of an unfinished answer that no stop text can take back."""
        ends = [len(text) - n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return text[: min(ends, default=len(text))]


class Sampler:
    """Answers questions about clips with one model.

    Args:
        parts: the model and the encoders of its text inputs.
        weights: all weights of the model, flat, in the decoding form (`generation/weights.py`).
        storage: width of the language model's kernels in them.
        mesh: devices that hold them; by default the first one.
        trained: whether the weights are in the training form instead, with adapters beside the kernels.
    """

    def __init__(
        self,
        parts: Assembly,
        weights: Mapping[str, Array],
        storage: str = "full",
        mesh: Mesh | None = None,
        *,
        trained: bool = False,
    ):
        sizes = parts.config.model
        self.frames, self.image_size = sizes.frames, sizes.image_size
        self.tokenizer, self.conversation, self.prompt = parts.tokenizer, parts.conversation, parts.prompt
        self._reads_questions = sizes.qformer.prompt
        self._longest = max(parts.config.data.buckets)
        self._mesh = mesh or one_device()
        how: dict[str, Any] = {"storage": storage, "trained": trained, "mesh": self._mesh, "traces": parts.traces}
        self._decoder = Decoder(parts.config, parts.llm, self.conversation.eos, **how)
        self.load(weights)

    def load(self, weights: Mapping[str, Array]) -> None:
        """Replaces the weights by others of the same model; nothing compiles again."""
        self._params: dict[str, Any] | None = {"params": unflatten_dict(dict(weights), sep="/")}

    def unload(self) -> None:
        """Frees the weights, before others of the same model are made."""
        self._params = None

    def encode(self, frames: UInt8[np.ndarray, "B T H W C"]) -> ClipFeatures:
        """Runs the encoders once; the result serves any number of questions about these clips."""
        return self._decoder.encode(self._params, place_rows(frames, self._mesh))

    def check(self, turns: Sequence[Turn]) -> None:
        """Raises UserError if a question is empty or the conversation is longer than the largest bucket."""
        self._encoded(turns)

    def stream_weights(self, features: ClipFeatures, questions: Sequence[Sequence[str]]) -> Float[np.ndarray, "B Q 2"]:
        """Returns the average weights of the general and the facial stream in the visual tokens of each question.

        Args:
            features: of B clips, from `encode`.
            questions: Q for each clip.
        """
        prompts = place_rows(self._prompts(questions), self._mesh)
        return to_host(self._decoder.weigh(self._params, features, *prompts))

    def answer(
        self, features: ClipFeatures, conversations: Sequence[Sequence[Sequence[Turn]]], sampling: Sampling
    ) -> list[list[str]]:
        """Answers Q conversations about each of B clips at once.

        Args:
            features: of the B clips, from `encode`.
            conversations: for each clip, Q lists of turns whose last answer is None; a clip may have fewer than Q.
            sampling: how tokens are drawn.

        Raises:
            UserError: an empty question, or a conversation longer than the largest bucket.
        """
        blocks = self.blocks(features, conversations, sampling, sampling.max_new_tokens - 1)
        texts = [sampling.cut(self.text(row)).strip() for row in np.concatenate(list(blocks), axis=1)]
        questions = max(len(asked) for asked in conversations)
        return [texts[i * questions : i * questions + len(asked)] for i, asked in enumerate(conversations)]

    def log_likelihoods(
        self, features: ClipFeatures, conversations: Sequence[Sequence[Turn]], answers: Sequence[str]
    ) -> Float[np.ndarray, "B K"]:
        """Returns the log-probability of K answers, their ends included, to one conversation about each of B clips.

        Raises:
            UserError: an empty question or answer, or a conversation longer than the largest bucket.
        """
        answered = [[_answered(turns, answer) for answer in answers] for turns in conversations]
        prompts = self._prompts([[turns[-1][0]] for turns in conversations])
        return self._answer_log_p(features, answered, prompts, self._longest)[0]

    def losses(
        self, features: ClipFeatures, conversations: Sequence[Sequence[Sequence[Turn]]]
    ) -> list[Float[np.ndarray, " _Q"]]:
        """Returns -log p of each conversation's last answer, its end included, averaged over its tokens, in nats.

        Args:
            features: of B clips, from `encode`.
            conversations: for each clip, Q lists of turns with all answers; a clip may have fewer than Q. They may be
                longer than the largest bucket, since references are of any length.

        Raises:
            UserError: an empty question or answer, or a conversation longer than 4096 tokens.
        """
        rows = _filled(conversations)
        prompts = self._prompts([[turns[-1][0] for turns in asked] for asked in rows])
        log_p, lengths = self._answer_log_p(features, rows, prompts, LONGEST)
        losses = -log_p / lengths
        return [row[: len(asked)] for row, asked in zip(losses, conversations, strict=True)]

    def _answer_log_p(
        self, features: ClipFeatures, conversations: Sequence[Sequence[Sequence[Turn]]], prompts: tuple, longest: int
    ) -> tuple[Float[np.ndarray, "B Q"], Int[np.ndarray, "B Q"]]:
        """Returns the log-probabilities of the conversations' last answers, and their numbers of tokens."""
        encoded = [[self._encoded(turns, longest) for turns in asked] for asked in conversations]
        open_ended = [[_answered(turns, None) for turns in asked] for asked in conversations]
        starts = np.array([[len(self._encoded(turns, longest)) for turns in asked] for asked in open_ended])
        lengths = np.array([[len(tokens) for tokens in row] for row in encoded]) - starts
        offsets = np.arange(lengths.max())
        scored = offsets < lengths[..., None]
        places = np.where(scored, starts[..., None] + offsets, 1).astype(np.int32)
        arrays = place_rows((self._batch(encoded, longest), *prompts, places, scored), self._mesh)
        return to_host(self._decoder.compare(self._params, features, *arrays)), lengths

    def responses(
        self, features: ClipFeatures, questions: Sequence[str], group: int, sampling: Sampling
    ) -> Int[np.ndarray, "B G n"]:
        """Draws G responses to one question about each of B clips, as token ids; each repeats its end to length n.

        Each prompt is read once, and all tokens are drawn in one compiled loop. n is `sampling.max_new_tokens`.
        """
        conversations = [[[(question, None)]] for question in questions]
        count = sampling.max_new_tokens - 1
        blocks = list(self.blocks(features, conversations, sampling, count, copies=group))
        tokens = np.concatenate(blocks, axis=1).reshape(len(questions), group, -1)
        missing = sampling.max_new_tokens - tokens.shape[-1]
        return np.pad(tokens, [(0, 0), (0, 0), (0, missing)], constant_values=self.conversation.eos)

    def stream(self, features: ClipFeatures, turns: Sequence[Turn], sampling: Sampling) -> Iterator[str]:
        """Yields the answer to one conversation about one clip, piece by piece while it is generated."""
        written: list[int] = []
        shown = ""
        for block in self.blocks(features, [[turns]], sampling, 1):
            written.extend(block[0])
            text = self.text(np.array(written))
            if sampling.cut(text) != text:
                break
            if text.endswith("\ufffd"):  # the last character lacks some of its bytes
                continue
            if len(settled := sampling.settled(text)) > len(shown):
                yield settled[len(shown) :]
                shown = settled
        if rest := sampling.cut(self.text(np.array(written)))[len(shown) :].rstrip():
            yield rest

    def blocks(
        self,
        features: ClipFeatures,
        conversations: Sequence[Sequence[Sequence[Turn]]],
        sampling: Sampling,
        count: int,
        copies: int = 1,
    ) -> Iterator[Int[np.ndarray, "B n"]]:
        """Yields token ids as they are drawn: the first of each sequence, then `count` at a time until all have ended.

        Takes the arguments of `answer`; each conversation is answered `copies` times.
        """
        arrays = place_rows(self._arrays(conversations), self._mesh)
        how = sampling.drawing()
        key = np.asarray(jax.random.key_data(jax.random.key(sampling.seed)))
        room = sampling.max_new_tokens
        state = self._decoder.begin(self._params, features, arrays, key, how, room=room, copies=copies)
        yield to_host(state.token)[:, None]
        left = sampling.max_new_tokens - 1
        while left > 0 and not bool(jnp.all(state.done)):
            state, tokens = self._decoder.advance(self._params, state, how, count=count)
            yield to_host(tokens)[:, :left]
            left -= count

    def text(self, tokens: Int[np.ndarray, " n"]) -> str:
        """Decodes token ids up to the first end among them."""
        ended = np.flatnonzero(tokens == self.conversation.eos)
        kept = tokens[: ended[0]] if len(ended) else tokens
        text = self.tokenizer.decode(kept.tolist(), skip_special_tokens=True)
        assert isinstance(text, str), "a single sequence decodes to a single text"
        return text.strip()

    def _arrays(self, conversations: Sequence[Sequence[Sequence[Turn]]]) -> dict[str, np.ndarray]:
        """Encodes conversations; a clip with fewer than the others repeats its first one."""
        rows = _filled(conversations)
        encoded = [[self._encoded(turns) for turns in asked] for asked in rows]
        lengths = np.array([len(tokens) for asked in encoded for tokens in asked], np.int32)
        prompt, prompt_mask = self._prompts([[turns[-1][0] for turns in asked] for asked in rows])
        return {
            "tokens": self._batch(encoded, self._longest),
            "last": lengths - 1,
            "prompt": prompt,
            "prompt_mask": prompt_mask,
        }

    def _encoded(self, turns: Sequence[Turn], longest: int | None = None) -> Int[np.ndarray, " L"]:
        return self.conversation.encode(turns, self.frames, longest or self._longest).tokens

    def _prompts(
        self, questions: Sequence[Sequence[str]]
    ) -> tuple[Int[np.ndarray, "B Q P"], Bool[np.ndarray, "B Q P"]]:
        """Encodes questions for the Q-Formers: ids, and True at those that are not padding."""
        encoded = [[self.prompt.encode(question) for question in asked] for asked in questions]
        for question in (question for asked in questions for question in asked if self._reads_questions):
            if cut := self.prompt.cut(question):
                _warn_of_cut(question, cut)
        ids, masks = (np.array([[prompt[part] for prompt in asked] for asked in encoded]) for part in (0, 1))
        return ids, masks

    def _batch(self, sequences: list[list[Int[np.ndarray, " _L"]]], most: int) -> Int[np.ndarray, "B Q L"]:
        """Pads sequences to a bucket: four lengths per octave, so that few are compiled and padding stays short."""
        longest = max(len(tokens) for row in sequences for tokens in row)
        step = max(SHORTEST_STEP, 2 ** ((longest - 1).bit_length() - 3))
        bucket = min(-(-longest // step) * step, most)
        tokens = np.full((len(sequences), len(sequences[0]), bucket), self.conversation.pad, np.int32)
        for i, j in np.ndindex(tokens.shape[:2]):
            tokens[i, j, : len(sequences[i][j])] = sequences[i][j]
        return tokens


def _filled(conversations: Sequence[Sequence[Sequence[Turn]]]) -> list[list[Sequence[Turn]]]:
    """Gives every clip as many conversations as the clip with most; the first of a clip is repeated."""
    most = max(len(asked) for asked in conversations)
    return [[*asked, *[asked[0]] * (most - len(asked))] for asked in conversations]


def _answered(turns: Sequence[Turn], answer: str | None) -> list[Turn]:
    """Replaces the last answer of a conversation."""
    return [*turns[:-1], (turns[-1][0], answer)]


@functools.lru_cache(maxsize=1000)  # one warning for a question, however often it is asked
def _warn_of_cut(question: str, cut: int) -> None:
    log.warning("the Q-Formers miss the first %d tokens of this question, ask a shorter one: %s", cut, question)
