"""Computes log p of given tokens, for the loss, the reinforced policy and the likelihoods of answers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int


def target_log_probabilities(
    head: Callable[[Array], Array],
    hidden: Float[Array, "R L D"],
    targets: Int[Array, "R L"],
    chunk: int,
    temperature: float = 1.0,
) -> tuple[Float[Array, "R L"], Bool[Array, "R L"]]:
    """Returns log p(target) at each position, and whether the target is the likeliest token there.

    Scores over the vocabulary exist for one chunk at a time, in the backward pass too, so that no float32 [R, L, V] is
    ever stored.

    Args:
        head: turns hidden states [R, chunk, D] into scores [R, chunk, V].
        hidden: final hidden states.
        targets: tokens that the positions predict; a target below 0 (a visual token) is scored as token 0.
        chunk: positions whose scores exist at once.
        temperature: divides the scores.
    """

    @jax.checkpoint
    def score(piece):
        hidden, targets = piece
        scores = head(hidden).astype(jnp.float32) / temperature
        return -optax.softmax_cross_entropy_with_integer_labels(scores, targets), jnp.argmax(scores, -1) == targets

    targets, length = jnp.maximum(targets, 0), hidden.shape[1]
    if length <= chunk:
        return score((hidden, targets))
    pad = -length % chunk
    padded = (jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)) for x in (hidden, targets))
    pieces = tuple(rearrange(x, "R (n C) ... -> n R C ...", C=chunk) for x in padded)
    log_p, likeliest = (rearrange(x, "n R C -> R (n C)")[:, :length] for x in jax.lax.map(score, pieces))
    return log_p, likeliest
