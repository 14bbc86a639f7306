"""What models say about many devices: which arrays have clips, or parts of clips, along their first axis.

Without such hints the compiler may follow a weight's partition instead and cut activations along their channels. The
models know no mesh of their own: whoever traces them for many devices sets one, with the axes CLIPS.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

CLIPS = ("data", "fsdp")  # axes of the mesh that share the clips of a batch


def by_clip(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """`x` with its first axis cut as clips are and its other axes whole; unchanged where no mesh of many is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(CLIPS))
