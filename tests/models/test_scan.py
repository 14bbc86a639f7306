"""Layers as one scan: the values and gradients of a loop, separate random numbers, and fewer equations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.facexformer import SwinBlock, SwinStage
from favchat_jax.models.kernels.scan import scan_layers
from favchat_jax.models.qformer import Layer, QFormer


class Dropped(nn.Module):
    """Layers with one weight and dropout each, whose rates alternate."""

    depth: int
    rates: tuple[float, float] = (0.5, 0.25)

    @nn.compact
    def __call__(self, x):
        layers = [Scale(self.rates[i % 2], name=f"layer_{i}") for i in range(self.depth)]
        return scan_layers(layers, lambda layer, kept: layer(kept), x, period=2)


class Scale(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, ())
        return nn.Dropout(self.rate, deterministic=False)(scale * x)


def _counted(call, *args) -> int:
    return str(jax.make_jaxpr(call)(*args)).count("dot_general")


@pytest.mark.parametrize("depth", [1, 2, 5, 6])
def test_a_swin_stage_is_its_blocks_one_after_another_in_values_and_gradients(depth):
    stage = SwinStage(depth, heads=2, window=4, mlp_ratio=2)
    tokens = jax.random.normal(jax.random.key(0), (2, 8, 8, 8))
    weights = stage.init(jax.random.key(1), tokens)["params"]
    assert set(weights) == {f"blocks_{j}" for j in range(depth)}

    def one_after_another(weights, tokens):
        for j in range(depth):
            tokens = SwinBlock(2, 4, j % 2 == 1, 2).apply({"params": weights[f"blocks_{j}"]}, tokens)
        return tokens

    def as_stage(weights, tokens):
        return stage.apply({"params": weights}, tokens)

    np.testing.assert_allclose(as_stage(weights, tokens), one_after_another(weights, tokens), atol=2e-6, rtol=1e-6)
    ours, expected = (
        jax.grad(lambda weights, tokens, of=of: jnp.mean(jnp.sin(of(weights, tokens))), (0, 1))(weights, tokens)
        for of in (as_stage, one_after_another)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, expected)


@pytest.mark.parametrize(("remat", "text"), [("", True), ("block", True), ("block", False)])
def test_a_deep_qformer_is_its_layers_one_after_another(remat, text):
    fields = {"width": 16, "depth": 6, "heads": 2, "mlp": 32, "queries": 3, "extra_queries": 2, "vocabulary": 11}
    model = QFormer(**fields, positions=8, prompt=text, remat=remat)
    visual = jax.random.normal(jax.random.key(0), (2, 7, 12))
    prompt = jnp.array([[[1, 2, 3, 0], [4, 5, 0, 0]], [[6, 7, 8, 9], [10, 0, 0, 0]]])
    weights = model.init(jax.random.key(1), visual, prompt, prompt > 0)

    def one_after_another(model, visual, prompt, mask):
        tokens = jnp.concatenate([model.query_tokens, model.extra_query_tokens])
        asked = 2 if text else 1
        tokens = model.embeddings_norm(jnp.broadcast_to(tokens, (2, asked, *tokens.shape)))
        words = model.embed_prompt(prompt) if text else None
        seen = jnp.concatenate([jnp.ones((2, asked, 5), bool), mask], axis=2) if text else None
        for i in range(6):
            layer = Layer(2, 32, i % 2 == 0, 0.1, 0.0)
            of = {"params": weights["params"][f"layer_{i}"]}
            tokens, words = layer.apply(of, tokens, words, visual[:, None], seen, None, True)
        return jnp.broadcast_to(tokens, (2, 2, 5, 16))

    expected = model.apply(weights, visual, prompt, prompt > 0, method=one_after_another)
    np.testing.assert_allclose(model.apply(weights, visual, prompt, prompt > 0), expected, atol=2e-6)


def test_layers_of_a_scan_draw_separate_random_numbers():
    model, x = Dropped(6), jnp.ones(20_000)
    weights = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    kept = model.apply(weights, x, rngs={"dropout": jax.random.key(2)})
    # Six masks that are independent leave 0.5^3 * 0.75^3 of the ones; two that recur would leave 0.5 * 0.75.
    assert np.mean(kept > 0) == pytest.approx((0.5 * 0.75) ** 3, abs=0.01)
    assert np.mean(kept) == pytest.approx(1, abs=0.1)
    again = model.apply(weights, x, rngs={"dropout": jax.random.key(3)})
    assert not np.array_equal(kept, again)


def test_depth_does_not_lengthen_what_is_compiled_unless_layers_differ():
    tokens = jnp.zeros((1, 8, 8, 8))

    def products(depth):
        stage = SwinStage(depth, heads=2, window=4, mlp_ratio=2)
        return _counted(stage.apply, stage.init(jax.random.key(0), tokens), tokens)

    assert products(18) == products(4) == products(2) < products(3)

    def layers(drop_path):
        fields = {"width": 16, "depth": 4, "heads": 2, "mlp": 32, "queries": 3, "extra_queries": 0, "vocabulary": 11}
        model, visual = QFormer(**fields, prompt=False, drop_path=drop_path), jnp.zeros((1, 7, 12))
        return _counted(model.apply, model.init(jax.random.key(0), visual), visual)

    assert layers(0.2) == 2 * layers(0.0)  # stochastic depth rises from layer to layer
