"""Rematerialisation by name: what a layer keeps for its backward pass, which computes the rest again.

It saves memory and costs time: a third more in a step of the base preset on two cores (docs/results.md).
"""

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


def remat(function: Callable, policy: str, transform: Callable = nn.remat, **options) -> Callable:
    """The function, rematerialised by a policy (a key of POLICIES); unchanged by the empty one.

    Args:
        function: takes a bound module first, or, with `transform=jax.checkpoint`, arrays alone.
        policy: a key of POLICIES.
        transform: Flax's or JAX's rematerialisation.
        options: of the transform.
    """
    return transform(function, policy=POLICIES[policy], **options) if policy else function
