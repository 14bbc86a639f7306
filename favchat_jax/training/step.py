"""Compiles the training step: the loss over answer tokens, gradients of the trainable weights, one update.

Frozen weights are a separate argument of the compiled function and join the trainable ones inside the loss. They have
neither gradients nor moments, and no activation of a frozen encoder is kept for the backward pass.
"""

from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import jaxlib.version
import optax
from einops import rearrange
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from favchat_jax.checkpoints.store import TrainState
from favchat_jax.models.favchat import FaVChat, Output
from favchat_jax.models.kernels.platform import computing_on
from favchat_jax.models.likelihood import target_log_probabilities
from favchat_jax.sharding import one_device, partitions, state_partitions

Weights = Mapping[str, Array]


def next_token_targets(
    tokens: Int[Array, "... L"], loss_mask: Bool[Array, "... L"]
) -> tuple[Int[Array, "... L"], Bool[Array, "... L"]]:
    """Returns each position's target, the next token, and whether that token is part of an answer."""
    last = [(0, 0)] * (tokens.ndim - 1) + [(0, 1)]
    return jnp.pad(tokens[..., 1:], last), jnp.pad(loss_mask[..., 1:], last)


def chunked_cross_entropy(
    head: Callable[[Array], Array],
    hidden: Float[Array, "R L D"],
    targets: Int[Array, "R L"],
    counted: Bool[Array, "R L"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums cross-entropy and hits over counted positions; takes the arguments of `target_log_probabilities`.

    Returns:
        (sum of -log p(target), number of targets that are the likeliest token).
    """
    log_p, likeliest = target_log_probabilities(head, hidden, targets, chunk)
    return -jnp.sum(log_p, where=counted), jnp.sum(likeliest & counted).astype(jnp.float32)


def batch_loss(
    model: FaVChat, weights: Weights, batch: Mapping[str, Array], key: Array, chunk: int
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Computes the summed cross-entropy of a batch's answer tokens, with dropout, and the sums for the metrics."""
    params = {"params": unflatten_dict(dict(weights), sep="/")}
    body_key, head_key = jax.random.split(key)
    clips = batch["features"] if "features" in batch else batch["frames"]
    inputs = (clips, batch["tokens"], batch["prompt"], batch["prompt_mask"])
    output = cast(Output, model.apply(params, *inputs, deterministic=False, rngs={"dropout": body_key}))

    def head(hidden: Array) -> Array:
        return cast(Array, model.apply(params, hidden, False, method="logits", rngs={"dropout": head_key}))

    targets, counted = next_token_targets(batch["tokens"], batch["loss_mask"])
    hidden, targets, counted = (rearrange(x, "B Q ... -> (B Q) ...") for x in (output.hidden, targets, counted))
    loss, hits = chunked_cross_entropy(head, hidden, targets, counted, chunk)
    asked = jnp.any(batch["loss_mask"], axis=-1)
    streams = jnp.sum(jnp.mean(output.stream_weights, axis=2) * asked[..., None], axis=(0, 1))
    return loss, {"hits": hits, "streams": streams, "questions": jnp.sum(asked)}


def compiler_options(platform: str | None = None) -> dict[str, bool] | None:
    """Returns XLA's options for training steps: on a CPU its older code generator, whose fusions run a third faster.

    XLA dropped that generator with jaxlib 0.11.1, and the compiler refuses the option since then.

    Args:
        platform: target of the compilation; by default this process's backend.
    """
    known = jaxlib.version.__version_info__ < (0, 11, 1)
    return {"xla_cpu_use_fusion_emitters": False} if known and (platform or jax.default_backend()) == "cpu" else None


def make_step(
    model: FaVChat,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    accumulate: int,
    chunk: int,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Weights, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Compiles one update: (state, frozen, batch) -> (state, metrics). The state is donated.

    Args:
        model: the model to train.
        optimizer: moves the trainable weights.
        rate: learning rate by step, for the metrics.
        accumulate: number of parts into which a batch is cut along its clips. Their gradients are summed, so the result
            is that of the undivided batch.
        chunk: number of positions whose scores exist at once.
        mesh: devices that hold the state, the frozen weights and the batch; by default the first device.
    """
    mesh = mesh or one_device()
    platform = mesh.devices.flat[0].platform

    def place(state: TrainState) -> TrainState:
        return jax.lax.with_sharding_constraint(state, state_partitions(state, mesh))

    def step(state: TrainState, frozen: Weights, batch: Mapping[str, Array]):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        answer_tokens = jnp.maximum(jnp.sum(batch["loss_mask"][..., 1:]), 1)

        def part_loss(trainable, part, key):
            loss, sums = batch_loss(model, {**trainable, **frozen}, part, key, chunk)
            return loss / answer_tokens, sums

        def gradient(trainable, part, key):
            with computing_on(mesh):
                value, grads = jax.value_and_grad(part_loss, has_aux=True)(trainable, part, key)
            # Each device sums only its own shards of the gradient.
            return value, jax.lax.with_sharding_constraint(grads, partitions(grads, mesh))

        if accumulate == 1:
            (loss, sums), grads = gradient(state.trainable, batch, key)
        else:
            # Interleaved, so that every part has clips of every device.
            parts = jax.tree.map(lambda x: rearrange(x, "(B A) ... -> A B ...", A=accumulate), dict(batch))

            def add(total, part_and_key):
                return jax.tree.map(jnp.add, total, gradient(state.trainable, *part_and_key)), None

            keys = jax.random.split(key, accumulate)
            first = gradient(state.trainable, jax.tree.map(lambda x: x[0], parts), keys[0])
            rest = (jax.tree.map(lambda x: x[1:], parts), keys[1:])
            ((loss, sums), grads), _ = jax.lax.scan(add, first, rest)
        updates, moments = optimizer.update(grads, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        streams = sums["streams"] / jnp.maximum(sums["questions"], 1)
        metrics = {
            "loss": loss,
            "token_accuracy": sums["hits"] / answer_tokens,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": rate(state.step),
            "general_weight": streams[0],
            "facial_weight": streams[1],
            "answer_tokens": answer_tokens,
        }
        return place(TrainState(state.step + 1, trainable, moments, state.key)), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(platform))
