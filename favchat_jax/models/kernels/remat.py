"""Rematerialisation by name: what a layer keeps for its backward pass, which computes the rest again."""

from collections.abc import Callable

import flax.linen as nn
import jax

# Name -> what is kept of a layer beside its input; the empty name rematerialises nothing.
POLICIES: dict[str, Callable | None] = {
    "": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    # Results of products with weights, not attention's scores: more memory for a faster backward pass.
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(target: Callable, policy: str, **options) -> Callable:
    """A module class or a lifted function, rematerialised as `policy` (a key of POLICIES) says; else as it is."""
    return nn.remat(target, policy=POLICIES[policy], **options) if policy else target
