"""Mixture adapters: how general and fine-grained visual tokens become one sequence for the language model.

v1 is a gated mixture of experts (FaVChat v1, Section 4.1, Eq. 3): E = MoE(w_1 E_g, w_2 E_{N+1}).
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from favchat_jax.models.linear import Linear


class GatedMixture(nn.Module):
    """Eq. 3: each visual token is a weighted sum of two experts, one a stream.

    The gate sees both streams' tokens and weighs them token by token; since both Q-Formers read the question, the
    weights follow it too. An expert is a pre-norm two-layer MLP around which its stream's tokens pass.

    Attributes:
        hidden: hidden width of the gate and of each expert.
        dtype: dtype of the computation; the softmax over the two streams is float32.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, general: Float[Array, "... N D"], facial: Float[Array, "... N D"]
    ) -> tuple[Float[Array, "... N D"], Float[Array, "... N 2"]]:
        """The mixed tokens, and the weights (w_1 of the general stream, w_2 of the facial one), which sum to 1."""
        chex.assert_equal_shape([general, facial])
        streams = {"general": general, "facial": facial}
        normed = {
            name: nn.LayerNorm(dtype=self.dtype, use_fast_variance=False, name=f"{name}_norm")(tokens)
            for name, tokens in streams.items()
        }
        gate = nn.gelu(Linear(self.hidden, dtype=self.dtype, name="gate_in")(jnp.concatenate([*normed.values()], -1)))
        gate = Linear(2, dtype=self.dtype, name="gate_out", kernel_init=nn.initializers.zeros)(gate)
        weights = jax.nn.softmax(gate.astype(jnp.float32), axis=-1)
        experts = [tokens + self._expert(name, normed[name]) for name, tokens in streams.items()]
        mixed = sum(weights[..., i, None].astype(self.dtype) * expert for i, expert in enumerate(experts))
        return mixed, weights

    def _expert(self, name: str, normed: Float[Array, "... N D"]) -> Float[Array, "... N D"]:
        inner = nn.gelu(Linear(self.hidden, dtype=self.dtype, name=f"{name}_in")(normed))
        # Starts as nothing, so that at first the stream's tokens pass as they are.
        return Linear(normed.shape[-1], dtype=self.dtype, name=f"{name}_out", kernel_init=nn.initializers.zeros)(inner)


class ScalarMixture(nn.Module):
    """Ablation `no_moe`: a plain weighted sum of the two streams with two learned scalars, both 0.5 at the start."""

    @nn.compact
    def __call__(
        self, general: Float[Array, "... N D"], facial: Float[Array, "... N D"]
    ) -> tuple[Float[Array, "... N D"], Float[Array, "... N 2"]]:
        """The mixed tokens and the two scalars, repeated for each token."""
        weights = self.param("weights", nn.initializers.constant(0.5), (2,))
        mixed = weights[0].astype(general.dtype) * general + weights[1].astype(facial.dtype) * facial
        return mixed, jnp.broadcast_to(weights, (*general.shape[:-1], 2))
