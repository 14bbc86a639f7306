"""Computes GRPO's loss: advantages within a group, a clipped ratio to the policy that answered, and a KL penalty.

For response j of G to sample i, with rewards r, token t, the trained policy pi, the policy pi_old that answered, and
the policy pi_ref that the run started from:

    A_ij = (r_ij - mean_j r_ij) / (std_j r_ij + eps)
    rho  = pi(t) / pi_old(t)
    k3   = pi_ref(t) / pi(t) - log(pi_ref(t) / pi(t)) - 1          (an estimate of KL(pi || pi_ref), never negative)
    loss = -mean_ij mean_t [ min(rho w_i A_ij, clip(rho, 1 - c, 1 + c) w_i A_ij) - beta k3 ]

`rl/pool.py` gives each sample its weight w_i, which is 1 in plain GRPO.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

STD_FLOOR = 1e-4


def group_advantages(rewards: Float[np.ndarray, "B G"], unbiased: bool = False) -> Float[np.ndarray, "B G"]:
    """Returns rewards in standard deviations from their group's mean; 0 in a group of equal rewards.

    The variance is a mean over the G responses, or a sum divided by G - 1 if `unbiased`.
    """
    deviation = rewards - rewards.mean(axis=1, keepdims=True)
    return deviation / (rewards.std(axis=1, ddof=int(unbiased), keepdims=True) + STD_FLOOR)


def pairwise(values: Float[np.ndarray, "B G"]) -> Float[np.ndarray, "B P"]:
    """Returns |difference| of each of the P = G (G - 1) / 2 pairs of a group."""
    first, second = np.array(list(itertools.combinations(range(values.shape[1]), 2))).T
    return np.abs(values[:, first] - values[:, second])


def k3(policy: Float[Array, "*B"], reference: Float[Array, "*B"], bound: float | None = None) -> Float[Array, "*B"]:
    """Returns Schulman's k3 estimate of KL(policy || reference) from log-probabilities of the policy's tokens.

    The log ratio is cut to +-`bound`.
    """
    ratio = reference - policy
    if bound is not None:
        ratio = jnp.clip(ratio, -bound, bound)
    return jnp.exp(ratio) - ratio - 1


def clipped_gain(
    policy: Float[Array, "*B"], old: Float[Array, "*B"], advantages: Float[Array, "*B"], clip: float
) -> Float[Array, "*B"]:
    """Returns min(rho A, clip(rho) A): a policy gains nothing by moving beyond a ratio of 1 +- `clip`."""
    ratio = jnp.exp(policy - old)
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)


def loss(
    policy: Float[Array, "B G L"],
    old: Float[Array, "B G L"],
    reference: Float[Array, "B G L"],
    advantages: Float[Array, "B G"],
    counted: Bool[Array, "B G L"],
    *,
    beta: float,
    clip: float,
    kl_bound: float | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss and its parts: `kl`, and `clipped`, the share of tokens beyond the clip.

    Args:
        policy, old, reference: log-probabilities of the responses' tokens.
        advantages: w_i A_ij.
        counted: True at a response's tokens, including its end; a response without any adds nothing.
        beta: weight of the KL penalty.
        clip: c.
        kl_bound: largest |log ratio| in k3; None for no bound.
    """

    def average(values):
        tokens = jnp.maximum(jnp.sum(counted, axis=-1), 1)
        return jnp.mean(jnp.sum(jnp.where(counted, values, 0.0), axis=-1) / tokens)

    # Not `values * counted` above: padding may hold -inf.
    policy, old, reference = (jnp.where(counted, x, 0.0) for x in (policy, old, reference))
    gain = average(clipped_gain(policy, jax.lax.stop_gradient(old), advantages[..., None], clip))
    kl = average(k3(policy, reference, kl_bound))
    clipped = average((jnp.abs(jnp.exp(policy - old) - 1) > clip).astype(jnp.float32))
    return beta * kl - gain, {"kl": kl, "clipped": clipped}
