"""Mixture adapters: how general and fine-grained visual tokens become one sequence for the language model.

v1 is a gated mixture of experts (FaVChat v1, Section 4.1): E = MoE(w_1 E_g, w_2 E_{N+1})  (Eq. 3).
v2 (high-level prompt-query learning) has one weight adapter a stream, which sees that stream and the question:
E = W_g E_g + W_f E_f with (W_g, W_f) = softmax(adapter_g(E_g, p), adapter_f(E_f, p)).
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
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
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, general: Float[Array, "... N D"], facial: Float[Array, "... N D"]
    ) -> tuple[Float[Array, "... N D"], Float[Array, "... N 2"]]:
        """E, and the weights (w_1 of the general stream E_g, w_2 of the facial one E_{N+1}), which sum to 1."""
        chex.assert_equal_shape([general, facial])

        def norm(name: str, tokens):
            return nn.LayerNorm(dtype=self.dtype, use_fast_variance=False, name=f"{name}_norm")(tokens)

        def linear(name: str, width: int, tokens, **start):
            return Linear(width, dtype=self.dtype, name=name, **start)(tokens)

        def expert(name: str, tokens, normed):
            inner = nn.gelu(linear(f"{name}_in", self.hidden, normed))
            # Zeros at initialisation, so that a fresh expert is the identity.
            return tokens + linear(f"{name}_out", tokens.shape[-1], inner, kernel_init=nn.initializers.zeros)

        normed_g, normed_f = norm("general", general), norm("facial", facial)
        gate = nn.gelu(linear("gate_in", self.hidden, jnp.concatenate([normed_g, normed_f], axis=-1)))
        gate = linear("gate_out", 2, gate, kernel_init=nn.initializers.zeros)
        weights = jax.nn.softmax(gate.astype(jnp.float32), axis=-1)
        w_1, w_2 = weights[..., :1].astype(self.dtype), weights[..., 1:].astype(self.dtype)
        return w_1 * expert("general", general, normed_g) + w_2 * expert("facial", facial, normed_f), weights


class TokenMLP(nn.Module):
    """v2's MLP after a Q-Former's linear layer: pre-norm, two layers, with a residual.

    It is the identity at initialisation (a choice), so that a published Q-Former with its linear layer, both frozen in
    stage 1, keeps its output there.

    Attributes:
        hidden: width between the two layers.
        dtype: dtype of the computation.
    """

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "... N D"]) -> Float[Array, "... N D"]:
        normed = nn.LayerNorm(dtype=self.dtype, use_fast_variance=False, name="norm")(tokens)
        inner = nn.gelu(Linear(self.hidden, dtype=self.dtype, name="in")(normed))
        out = Linear(tokens.shape[-1], dtype=self.dtype, name="out", kernel_init=nn.initializers.zeros)
        return tokens + out(inner)


class WeightAdapter(nn.Module):
    """v2: one score of a stream for each question, from its visual tokens and the question's words.

    The words' average is added to each token inside the MLP, and the tokens' average is scored. Fields as in
    `TokenMLP`.
    """

    hidden: int
    dtype: DTypeLike = jnp.float32

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

    Both weights are one half at initialisation.
    """

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        general: Float[Array, "B Q N D"],
        facial: Float[Array, "B Q N D"],
        prompts: tuple[Float[Array, "B Q P E"], Float[Array, "B Q P E"]],
        prompt_mask: Bool[Array, "B Q P"],
    ) -> tuple[Float[Array, "B Q N D"], Float[Array, "B Q N 2"]]:
        """E, and (W_g, W_f), which sum to 1, repeated for each token.

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
        w_g, w_f = (weights[..., i, None, None].astype(self.dtype) for i in (0, 1))
        return w_g * general + w_f * facial, jnp.broadcast_to(weights[..., None, :], (*general.shape[:-1], 2))


class ScalarMixture(nn.Module):
    """Ablation `no_moe`: a weighted sum of the two streams with two learned scalars, both 0.5 at initialisation."""

    @nn.compact
    def __call__(
        self, general: Float[Array, "... N D"], facial: Float[Array, "... N D"]
    ) -> tuple[Float[Array, "... N D"], Float[Array, "... N 2"]]:
        """The mixed tokens and the two scalars, repeated for each token."""
        weights = self.param("weights", nn.initializers.constant(0.5), (2,))
        mixed = weights[0].astype(general.dtype) * general + weights[1].astype(facial.dtype) * facial
        return mixed, jnp.broadcast_to(weights, (*general.shape[:-1], 2))
