"""Compiles the parts of an answer: a prompt is read once into a key/value cache, then tokens are drawn one by one."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from favchat_jax.config import Config
from favchat_jax.models import favchat
from favchat_jax.models.cache import Cache, LayerCache, by_row_and_head, repeated
from favchat_jax.models.favchat import ClipFeatures
from favchat_jax.models.kernels.platform import computing_on
from favchat_jax.models.likelihood import target_log_probabilities
from favchat_jax.models.mistral import MistralConfig
from favchat_jax.programs import Traces, kept
from favchat_jax.sharding import one_device


class Drawing(NamedTuple):
    """How tokens are drawn, as arrays, so that other values do not compile again; see `Sampling`."""

    temperature: Float[Array | np.ndarray, ""]
    top_k: Int[Array | np.ndarray, ""]
    top_p: Float[Array | np.ndarray, ""]
    repetition_penalty: Float[Array | np.ndarray, ""]


class Decoding(NamedTuple):
    """The state of R sequences that are being written.

    Attributes:
        token: the last token that was drawn.
        position: its position.
        done: whether the sequence has ended.
        written: the tokens of the vocabulary that the answer has so far.
        key: data of the random key of the next draws.
        cache: keys and values of earlier tokens.
    """

    token: Int[Array, " R"]
    position: Int[Array, " R"]
    done: Bool[Array, " R"]
    written: Bool[Array, "R V"]
    key: Array
    cache: Cache


for named_tuple in (ClipFeatures, LayerCache, Drawing, Decoding):
    jax.export.register_namedtuple_serialization(named_tuple, serialized_name=f"favchat_jax.{named_tuple.__name__}")


def draw(logits: Float[Array, "R V"], written: Bool[Array, "R V"], key: Array, how: Drawing) -> Int[Array, " R"]:
    """Draws one token per row: the likeliest at temperature 0, else at random.

    In the order of transformers: the penalty of tokens that the answer has already, the temperature, top-k, top-p.
    """

    def penalised() -> Float[Array, "R V"]:
        lower = jnp.where(logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty)
        return jnp.where(written, lower, logits).astype(logits.dtype)

    def likeliest(scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        ordered, rank = jnp.sort(scores, axis=-1)[:, ::-1], jnp.arange(scores.shape[-1])
        ordered = jnp.where((rank < how.top_k) | (how.top_k == 0), ordered, -jnp.inf)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        kept = ((before < how.top_p) & (ordered > -jnp.inf)) | (rank == 0)  # the first always, even at top_p = 0
        floor = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scores >= floor, scores, -jnp.inf)

    def random_token() -> Int[Array, " R"]:
        divided = scores.astype(jnp.float32) / how.temperature
        # Sorting the vocabulary takes longer than several layers, and most draws do not need it.
        narrowed = jax.lax.cond((how.top_p < 1) | (how.top_k > 0), likeliest, lambda same: same, divided)
        return jax.random.categorical(key, narrowed).astype(jnp.int32)

    scores = jax.lax.cond(how.repetition_penalty != 1, penalised, lambda: logits)
    return jax.lax.cond(how.temperature > 0, random_token, lambda: jnp.argmax(scores, axis=-1).astype(jnp.int32))


class Decoder:
    """The model that answers with its compiled functions, each of which takes the weights first.

    `encode` computes features of clips, `weigh` the streams' average weights, `compare` log-likelihoods of answers.
    `begin` reads prompts and draws the first token of each sequence; `advance` draws up to `count` more.

    Args:
        config: the run's config.
        llm: sizes of the language model.
        eos: the token that ends an answer.
        storage: width of the language model's kernels.
        trained: whether the weights are in the training form, which is slower; by default, in the decoding form.
        mesh: devices that hold the weights; by default the first one.
        traces: where traces of these functions are kept for later processes, if anywhere.
    """

    def __init__(
        self,
        config: Config,
        llm: MistralConfig,
        eos: int,
        *,
        storage: str = "full",
        trained: bool = False,
        mesh: Mesh | None = None,
        traces: Traces | None = None,
    ):
        self.model = favchat.build(
            config.model,
            llm,
            variant=config.variant,
            ablation=config.ablation,
            lora_rank=config.lora_rank,
            storage=storage,
            decoding=not trained,
        )
        self._eos, self._form = eos, f"{storage} {'training' if trained else 'decoding'} form"
        self._apply: Callable[..., Any] = self.model.apply
        self._mesh = mesh or one_device()
        self._traces = traces if self._mesh.size == 1 else None  # whose format names no shards
        self.encode = self._compiled(self._encode)
        self.weigh = self._compiled(self._weigh)
        self.compare = self._compiled(self._compare)
        self.begin = self._compiled(self._begin, static_argnames=("room", "copies"))
        self.advance = self._compiled(self._advance, static_argnames=("count",), donate_argnums=(1,))

    def _compiled(self, function: Callable[..., Any], donate_argnums: tuple[int, ...] = (), **static: Any) -> Any:
        @functools.wraps(function)
        def on_mesh(*arguments, **options):
            with computing_on(self._mesh):
                return function(*arguments, **options)

        compiled = jax.jit(on_mesh, donate_argnums=donate_argnums, **static)
        return kept(compiled, f"{function.__name__} {self._form}", self._traces, donate_argnums)

    def _encode(self, params, frames: UInt8[Array, "B T H W C"]) -> ClipFeatures:
        return self._apply(params, frames, method="encode")

    def _weigh(self, params, features: ClipFeatures, prompt: Int[Array, "B Q P"], prompt_mask: Bool[Array, "B Q P"]):
        return self._apply(params, features, prompt, prompt_mask, method="visual_tokens")[1].mean(axis=2)

    def _compare(
        self,
        params,
        features: ClipFeatures,
        tokens: Int[Array, "B Q L"],
        prompt: Int[Array, " B #Q P"],
        prompt_mask: Bool[Array, " B #Q P"],
        places: Int[Array, "B Q S"],
        scored: Bool[Array, "B Q S"],
    ) -> Float[Array, "B Q"]:
        """Returns the log-probability of a continuation in each of Q sequences about each of B clips.

        Sequences that continue one conversation share one prompt. `places` are the positions of each continuation's
        tokens in its sequence; `scored` is False at their padding.
        """
        hidden = self._apply(params, features, tokens, prompt, prompt_mask).hidden
        hidden = jnp.take_along_axis(hidden, places[..., None] - 1, axis=2)
        targets = jnp.take_along_axis(tokens, places, axis=2)
        hidden, targets = (rearrange(x, "B Q S ... -> (B Q) S ...") for x in (hidden, targets))
        head = partial(self._apply, params, method="logits")
        log_p, _ = target_log_probabilities(head, hidden, targets, chunk=places.shape[-1])
        return jnp.where(scored, log_p.reshape(scored.shape), 0.0).sum(-1)

    def _begin(self, params, features, arrays, key, how: Drawing, *, room: int, copies: int) -> Decoding:
        """Reads each conversation once and begins `copies` answers to it."""
        clips, questions, length = arrays["tokens"].shape
        cache = by_row_and_head(self.model.llm.empty_cache(clips * questions, length + room))
        inputs = (arrays[name] for name in ("tokens", "prompt", "prompt_mask"))
        output = self._apply(params, features, *inputs, cache=cache)
        last = jnp.asarray(arrays["last"])
        final = jnp.take_along_axis(output.hidden.reshape(len(last), length, -1), last[:, None, None], axis=1)[:, 0]
        logits = self._apply(params, final, method="logits")
        logits, last = (jnp.repeat(leaf, copies, axis=0) for leaf in (logits, last))
        draw_key, key = jax.random.split(jax.random.wrap_key_data(key))
        written = jnp.zeros_like(logits, bool)
        token = draw(logits, written, draw_key, how)
        cache = repeated(output.cache, copies)
        written = _with(written, token)
        return Decoding(token, last + 1, token == self._eos, written, jax.random.key_data(key), cache)

    def _advance(self, params, state: Decoding, how: Drawing, *, count: int):
        """Draws up to `count` more tokens per sequence, until all are done; those that are done repeat their end."""

        def unfinished(carry):
            n, state, _ = carry
            return (n < count) & ~jnp.all(state.done)

        def one(carry):
            n, state, tokens = carry
            logits, cache = self._apply(params, state.token, state.position, state.cache, method="decode")
            draw_key, key = jax.random.split(jax.random.wrap_key_data(state.key))
            token = jnp.where(state.done, self._eos, draw(logits, state.written, draw_key, how))
            done, written = state.done | (token == self._eos), _with(state.written, token)
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, n, axis=1)
            state = Decoding(token, state.position + 1, done, written, jax.random.key_data(key), cache)
            return n + 1, state, tokens

        tokens = jnp.full((state.token.shape[0], count), self._eos, jnp.int32)
        _, state, tokens = jax.lax.while_loop(unfinished, one, (0, state, tokens))
        return state, tokens


def _with(written: Bool[Array, "R V"], token: Int[Array, " R"]) -> Bool[Array, "R V"]:
    """Adds the token of each row to those that its answer has."""
    return written.at[jnp.arange(len(token)), token].set(True)
