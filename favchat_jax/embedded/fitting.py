"""Pretrains the embedded preset's stand-ins for published parts, by Muon over a stream of batches."""

import functools
from collections.abc import Callable, Iterator

import jax
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from favchat_jax.config import OptimizerConfig
from favchat_jax.training.optimizer import make_optimizer
from favchat_jax.training.step import compiler_options


def fit(
    loss: Callable[..., Float[Array, ""]], weights: dict, batches: Iterator[tuple], steps: int, rate: float, name: str
) -> dict:
    """Trains weights with Muon, a warm-up and a cosine decay, and returns them.

    Args:
        loss: returns the loss of the weights on a batch: loss(weights, *batch).
        weights: the initial weights; their memory is reused.
        batches: yields at least `steps` batches.
        steps: number of updates.
        rate: peak learning rate.
        name: name of the part in the progress bar.
    """
    adam = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.02}
    settings = OptimizerConfig(
        name="muon", learning_rate=rate, encoder_rate=1.0, clip_norm=1.0, warmup=0.1, floor=0.05, **adam
    )
    optimizer = make_optimizer(settings, steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=compiler_options())
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
