"""The policy that is reinforced: log-probabilities of its responses, and one update by `rl/objective.py`, compiled."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from favchat_jax.config import RLConfig
from favchat_jax.models.favchat import ClipFeatures, FaVChat
from favchat_jax.models.likelihood import target_log_probabilities
from favchat_jax.rl import objective
from favchat_jax.training.step import TrainState, Weights, compiler_options, next_token_targets


def token_log_probabilities(
    model: FaVChat, weights: Weights, features: ClipFeatures, batch: Mapping[str, Array], temperature: float, chunk: int
) -> Float[Array, "B G L"]:
    """log p of each response's tokens at the temperature that drew them, at the positions that predict them.

    Args:
        model: in its training form.
        weights: all of its weights.
        features: of the B clips.
        batch: tokens [B, G, L], prompt and prompt_mask [B, 1, P].
        temperature: of the draws.
        chunk: positions whose scores over the vocabulary exist at once.
    """
    params, tokens = {"params": unflatten_dict(dict(weights), sep="/")}, batch["tokens"]
    hidden = model.apply(params, features, tokens, batch["prompt"], batch["prompt_mask"]).hidden
    targets, _ = next_token_targets(tokens, jnp.zeros(tokens.shape, bool))
    log_p, _ = target_log_probabilities(
        lambda hidden: model.apply(params, hidden, method="logits"),
        *(rearrange(x, "B G ... -> (B G) ...") for x in (hidden, targets)),
        chunk,
        temperature,
    )
    return log_p.reshape(tokens.shape)


def response_mask(responses: Int[np.ndarray, "... n"], end: int) -> Bool[np.ndarray, "... n"]:
    """True up to each response's first end, which it holds too."""
    ends = np.cumsum(responses == end, axis=-1)
    return (ends == 0) | ((ends == 1) & (responses == end))


def make_score(model: FaVChat, settings: RLConfig, chunk: int) -> Callable[..., Array]:
    """Compiles `token_log_probabilities`: (trainable, frozen, features, batch) -> [B, G, L]."""
    return jax.jit(
        lambda trainable, frozen, features, batch: token_log_probabilities(
            model, {**trainable, **frozen}, features, batch, settings.temperature, chunk
        )
    )


def make_update(
    model: FaVChat, optimizer: optax.GradientTransformation, settings: RLConfig, chunk: int
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compiles one update of the policy: (state, frozen, features, batch) -> (state, metrics); the step stays."""

    def update(state: TrainState, frozen: Weights, features: ClipFeatures, batch: Mapping[str, Array]):
        def loss(trainable):
            weights = {**trainable, **frozen}
            policy = token_log_probabilities(model, weights, features, batch, settings.temperature, chunk)
            terms = (batch[name] for name in ("old", "reference", "advantages", "counted"))
            return objective.loss(policy, *terms, beta=settings.beta, clip=settings.clip)

        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        moves, moments = optimizer.update(gradient, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, moves)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradient), **parts}
        return state.replace(trainable=trainable, moments=moments), metrics

    return jax.jit(update, donate_argnums=0, compiler_options=compiler_options())
