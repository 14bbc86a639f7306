"""Runs an attention kernel on each device's own shard, since XLA cannot divide a kernel."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from favchat_jax.sharding import CLIPS, divided


def on_own_shard(
    run: Callable[..., Array], batch: int, heads: int, key_heads: int, *, axis: int, masks: int = 1
) -> Callable[..., Array]:
    """Maps `run` over the devices of the mesh in use, if there are several; each has its own clips and heads.

    Args:
        run: takes queries, keys, values and masks; returns values of the queries' shape.
        batch: number of clips. They are whole on every device if the mesh does not divide them.
        heads: of the queries.
        key_heads: of keys and values. All heads are whole if `tensor` does not divide both numbers.
        axis: of the heads in queries, keys and values.
        masks: number of masks, which have clips along their first axis and no heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run
    clips, *cut = divided((batch, heads, key_heads), (CLIPS, ("tensor",), ("tensor",)), mesh)
    whole = [None] * (axis - 1)
    by_head = P(clips, *whole, "tensor" if all(cut) else None)
    in_specs = (by_head, by_head, by_head, *[P(clips)] * masks)
    return jax.shard_map(run, in_specs=in_specs, out_specs=by_head, check_vma=False)
