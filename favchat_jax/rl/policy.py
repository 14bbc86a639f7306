"""Compiles the policy's functions: log-probabilities of responses, and an update with the loss of `objective.py`."""

from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float

from favchat_jax.checkpoints.store import TrainState
from favchat_jax.config import RLConfig
from favchat_jax.models.favchat import ClipFeatures, FaVChat, Output
from favchat_jax.models.kernels.platform import computing_on
from favchat_jax.models.likelihood import target_log_probabilities
from favchat_jax.rl import objective
from favchat_jax.rl.published import KL_BOUND
from favchat_jax.sharding import partitions, state_partitions
from favchat_jax.training.step import Weights, compiler_options, next_token_targets


def token_log_probabilities(
    model: FaVChat, weights: Weights, features: ClipFeatures, batch: Mapping[str, Array], temperature: float, chunk: int
) -> Float[Array, "B G L"]:
    """Returns log p of the token after each position, at the temperature that drew the responses.

    Args:
        model: in its training form.
        weights: all of its weights.
        features: of the B clips.
        batch: tokens [B, G, L], prompt and prompt_mask [B, 1, P].
        temperature: of the draws.
        chunk: number of positions whose scores over the vocabulary exist at once.
    """
    params, tokens = {"params": unflatten_dict(dict(weights), sep="/")}, batch["tokens"]
    output = cast(Output, model.apply(params, features, tokens, batch["prompt"], batch["prompt_mask"]))

    def head(hidden: Array) -> Array:
        return cast(Array, model.apply(params, hidden, method="logits"))

    targets, _ = next_token_targets(tokens, jnp.zeros(tokens.shape, bool))
    hidden, targets = (rearrange(x, "B G ... -> (B G) ...") for x in (output.hidden, targets))
    log_p, _ = target_log_probabilities(head, hidden, targets, chunk, temperature)
    return log_p.reshape(tokens.shape)


def make_score(model: FaVChat, settings: RLConfig, chunk: int, mesh: Mesh) -> Callable[..., Array]:
    """Compiles `token_log_probabilities` on a mesh: (trainable, frozen, features, batch) -> [B, G, L]."""

    def score(trainable: Weights, frozen: Weights, features: ClipFeatures, batch: Mapping[str, Array]) -> Array:
        weights = {**trainable, **frozen}
        with computing_on(mesh):
            return token_log_probabilities(model, weights, features, batch, settings.temperature, chunk)

    return jax.jit(score)


def make_update(
    model: FaVChat, optimizer: optax.GradientTransformation, settings: RLConfig, chunk: int, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compiles one update on a mesh: (state, frozen, features, batch) -> (state, metrics).

    It leaves the step's number as before.

    The state is donated. Besides the arrays of `token_log_probabilities`, the batch has the arguments of the loss:
    old, reference and counted [B, G, L], advantages [B, G].
    """
    bound = KL_BOUND if settings.published else None

    def update(state: TrainState, frozen: Weights, features: ClipFeatures, batch: Mapping[str, Array]):
        def loss(trainable):
            weights = {**trainable, **frozen}
            policy = token_log_probabilities(model, weights, features, batch, settings.temperature, chunk)
            terms = (batch[name] for name in ("old", "reference", "advantages", "counted"))
            return objective.loss(policy, *terms, beta=settings.beta, clip=settings.clip, kl_bound=bound)

        with computing_on(mesh):
            (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        # Each device sums only its own shards of the gradient.
        gradient = jax.lax.with_sharding_constraint(gradient, partitions(gradient, mesh))
        moves, moments = optimizer.update(gradient, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, moves)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradient), **parts}
        new = TrainState(state.step, trainable, moments, state.key)
        return jax.lax.with_sharding_constraint(new, state_partitions(new, mesh)), metrics

    options = compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(update, donate_argnums=0, compiler_options=options)
