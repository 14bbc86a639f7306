"""Mixture adapters: how general and fine-grained visual tokens become one sequence for the language model.

v1 is a gated mixture of experts (FaVChat v1, Section 4.1, Eq. 3): E = MoE(w_1 E_g, w_2 E_{N+1}).
v2 (high-level prompt-query learning) has one weight adapter a stream, which sees that stream and the question:
E = W_g E_g + W_f E_f with (W_g, W_f) = softmax(adapter_g(E_g, p), adapter_f(E_f, p)).
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from favchat_jax.models.kernels.linear import Linear


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


class TokenMLP(nn.Module):
    """v2's MLP after a Q-Former's linear layer: pre-norm, two layers, with the tokens passed around it.

    It starts as nothing (a choice), so that a published Q-Former with its linear layer, both frozen in stage 1, says
    there what it says without the MLP.

    Attributes:
        hidden: width between the two layers.
        dtype: dtype of the computation.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "... N D"]) -> Float[Array, "... N D"]:
        normed = nn.LayerNorm(dtype=self.dtype, use_fast_variance=False, name="norm")(tokens)
        inner = nn.gelu(Linear(self.hidden, dtype=self.dtype, name="in")(normed))
        out = Linear(tokens.shape[-1], dtype=self.dtype, name="out", kernel_init=nn.initializers.zeros)
        return tokens + out(inner)


class WeightAdapter(nn.Module):
    """v2: one score of a stream for each question, from its visual tokens and the question's words.

    The words' average is added to each token inside the MLP, and the tokens' average scored. Fields as in `TokenMLP`.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B Q N D"], prompt: Float[Array, "B Q P E"], prompt_mask: Bool[Array, "B Q P"]
    ) -> Float[Array, "B Q"]:
        known = prompt_mask[..., None].astype(self.dtype)
        words = jnp.sum(prompt * known, axis=-2, keepdims=True) / jnp.maximum(jnp.sum(known, -2, keepdims=True), 1)
        normed = nn.LayerNorm(dtype=self.dtype, use_fast_variance=False, name="norm")(tokens)
        inner = Linear(self.hidden, dtype=self.dtype, name="tokens")(normed)
        inner += Linear(self.hidden, dtype=self.dtype, name="words")(words)
        score = Linear(1, dtype=self.dtype, name="score", kernel_init=nn.initializers.zeros)
        return score(nn.gelu(inner).mean(axis=-2))[..., 0]


class WeightAdapters(nn.Module):
    """v2: the streams' sum, weighted by the softmax of two scores a question; fields as in `WeightAdapter`.

    Both weights are one half at the start.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        general: Float[Array, "B Q N D"],
        facial: Float[Array, "B Q N D"],
        prompts: tuple[Float[Array, "B Q P E"], Float[Array, "B Q P E"]],
        prompt_mask: Bool[Array, "B Q P"],
    ) -> tuple[Float[Array, "B Q N D"], Float[Array, "B Q N 2"]]:
        """The mixed tokens, and (W_g, W_f), which sum to 1, repeated for each token.

        Args:
            general, facial: the streams' visual tokens.
            prompts: the embedded words of each question, as the general and as the facial stream's Q-Former has them.
            prompt_mask: True at words, False at padding.
        """
        chex.assert_equal_shape([general, facial])
        streams = zip(("general", "facial"), (general, facial), prompts, strict=True)
        scores = [
            WeightAdapter(self.hidden, self.dtype, name=name)(tokens, prompt, prompt_mask)
            for name, tokens, prompt in streams
        ]
        weights = jax.nn.softmax(jnp.stack(scores, axis=-1).astype(jnp.float32), axis=-1)
        share = weights[..., None, None].astype(self.dtype)
        mixed = share[..., 0, :, :] * general + share[..., 1, :, :] * facial
        return mixed, jnp.broadcast_to(weights[..., None, :], (*general.shape[:-1], 2))


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
