"""Holds the mixture adapters, which combine general and fine-grained visual tokens for the language model.

v1 is a gated mixture of experts (FaVChat v1, Section 4.1): E = MoE(w_1 E_g, w_2 E_{N+1})  (Eq. 3).
v2 (high-level prompt-query learning) has one weight adapter per stream, which reads that stream and the question:
E = W_g E_g + W_f E_f with (W_g, W_f) = softmax(adapter_g(E_g, p), adapter_f(E_f, p)).
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from favchat_jax.models.kernels.linear import Linear


class Adapter(nn.Module):
    """Base class of the adapters, with the layers that they share.

    Attributes:
        hidden: hidden width of every MLP.
        dtype: dtype of the computation; softmaxes are float32.
    """

    hidden: int
    dtype: DTypeLike = jnp.float32

    def normed(self, name: str, tokens: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Applies the layer norm of this name."""
        return nn.LayerNorm(dtype=self.dtype, use_fast_variance=False, name=name)(tokens)

    def linear(self, name: str, width: int, tokens: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Applies the linear layer of this name."""
        return Linear(width, dtype=self.dtype, name=name)(tokens)

    def zero_linear(self, name: str, width: int, tokens: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Applies the linear layer of this name, whose kernel is zero at initialisation."""
        return Linear(width, dtype=self.dtype, name=name, kernel_init=nn.initializers.zeros)(tokens)

    def residual_mlp(
        self, prefix: str, tokens: Float[Array, "... D"], normed: Float[Array, "... D"]
    ) -> Float[Array, "... D"]:
        """Adds a two-layer MLP of the normed tokens to the tokens; the identity at initialisation."""
        inner = nn.gelu(self.linear(f"{prefix}in", self.hidden, normed))
        return tokens + self.zero_linear(f"{prefix}out", tokens.shape[-1], inner)


class GatedMixture(Adapter):
    """Eq. 3: each visual token is a weighted sum of two experts, one per stream.

    The gate reads both streams and computes two weights for each token. Since both Q-Formers read the question, the
    weights depend on it too. An expert is a pre-norm residual MLP.
    """

    @nn.compact
    def __call__(
        self, general: Float[Array, "... N D"], facial: Float[Array, "... N D"]
    ) -> tuple[Float[Array, "... N D"], Float[Array, "... N 2"]]:
        """Returns E, and the weights (w_1 of the general stream E_g, w_2 of the facial one E_{N+1}), which sum to 1."""
        chex.assert_equal_shape([general, facial])
        normed_g, normed_f = self.normed("general_norm", general), self.normed("facial_norm", facial)
        gate = nn.gelu(self.linear("gate_in", self.hidden, jnp.concatenate([normed_g, normed_f], axis=-1)))
        weights = jax.nn.softmax(self.zero_linear("gate_out", 2, gate).astype(jnp.float32), axis=-1)
        w_1, w_2 = weights[..., :1].astype(self.dtype), weights[..., 1:].astype(self.dtype)
        expert_g = self.residual_mlp("general_", general, normed_g)
        expert_f = self.residual_mlp("facial_", facial, normed_f)
        return w_1 * expert_g + w_2 * expert_f, weights


class TokenMLP(Adapter):
    """v2's MLP after a Q-Former's linear layer: pre-norm, two layers, with a residual.

    It is the identity at initialisation (a choice), so that a published Q-Former with its linear layer, both frozen in
    stage 1, keeps its output there.
    """

    @nn.compact
    def __call__(self, tokens: Float[Array, "... N D"]) -> Float[Array, "... N D"]:
        return self.residual_mlp("", tokens, self.normed("norm", tokens))


class WeightAdapter(Adapter):
    """v2: scores one stream for each question, from the stream's visual tokens and the question's words.

    The words' average is added to each token inside the MLP, and the tokens' average is scored.
    """

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B Q N D"], prompt: Float[Array, "B Q P E"], prompt_mask: Bool[Array, "B Q P"]
    ) -> Float[Array, "B Q"]:
        known = prompt_mask[..., None].astype(self.dtype)
        words = jnp.sum(prompt * known, axis=-2, keepdims=True) / jnp.maximum(jnp.sum(known, -2, keepdims=True), 1)
        inner = self.linear("tokens", self.hidden, self.normed("norm", tokens))
        inner += self.linear("words", self.hidden, words)
        return self.zero_linear("score", 1, nn.gelu(inner).mean(axis=-2))[..., 0]


class WeightAdapters(Adapter):
    """v2: sums the streams, weighted by the softmax of their two scores for each question.

    Both weights are one half at initialisation.
    """

    @nn.compact
    def __call__(
        self,
        general: Float[Array, "B Q N D"],
        facial: Float[Array, "B Q N D"],
        prompts: tuple[Float[Array, "B Q P E"], Float[Array, "B Q P E"]],
        prompt_mask: Bool[Array, "B Q P"],
    ) -> tuple[Float[Array, "B Q N D"], Float[Array, "B Q N 2"]]:
        """Returns E, and (W_g, W_f), which sum to 1, repeated for each token.

        Args:
            general, facial: the streams' visual tokens.
            prompts: the embedded words of each question, from the general and from the facial stream's Q-Former.
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
        self, general: Float[Array, "... N D"], facial: Float[Array, "... N D"], *question: object
    ) -> tuple[Float[Array, "... N D"], Float[Array, "... N 2"]]:
        """Returns the mixed tokens and the two scalars, repeated for each token; ignores the question."""
        weights = self.param("weights", nn.initializers.constant(0.5), (2,))
        mixed = weights[0].astype(general.dtype) * general + weights[1].astype(facial.dtype) * facial
        return mixed, jnp.broadcast_to(weights, (*general.shape[:-1], 2))
