"""Kernels in 8 and 4 bits: their rounding error, and products that equal those with the dequantised kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from favchat_jax.models.kernels.quantized import GROUP, product, quantize, store
from favchat_jax.models.mistral import LoRA, Mistral
from tests.models.tiny_parts import MISTRAL, drawn, mistral_shapes


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dequantized(integers, scale):
    groups = np.repeat(np.asarray(scale), integers.shape[-2] // scale.shape[-2], axis=-2)
    return np.asarray(integers, np.float32) * groups


@pytest.mark.parametrize(("storage", "levels"), [("int8", 127), ("int4", 7)])
def test_the_rounding_error_is_at_most_half_a_step(storage, levels):
    kernel = draw(3, 4 * GROUP, 5)
    integers, scale = quantize(kernel, storage)
    assert integers.dtype == storage and scale.shape == (3, {"int8": 1, "int4": 4}[storage], 5)
    step = np.repeat(np.asarray(scale), kernel.shape[1] // scale.shape[1], axis=1)
    assert (np.abs(dequantized(integers, scale) - kernel) <= 0.5001 * step).all()
    assert int(jnp.abs(integers.astype(jnp.int32)).max()) == levels


def test_zeros_stay_zeros():
    integers, scale = quantize(jnp.zeros((GROUP, 2)), "int8")
    np.testing.assert_array_equal(product(draw(3, GROUP), integers, scale), 0)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_the_product_is_that_with_the_dequantised_kernel(storage):
    kernel, x = draw(2 * GROUP, 7), draw(2, 3, 2 * GROUP, seed=1)
    integers, scale = quantize(kernel, storage)
    np.testing.assert_allclose(jax.jit(product)(x, integers, scale), x @ dequantized(integers, scale), atol=1e-4)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_scanned_language_model_with_adapters_computes_and_learns_on_a_quantised_base(storage):
    model = Mistral(MISTRAL, LoRA(rank=2), remat="block")
    weights = flatten_dict(drawn(mistral_shapes(model), spread=0.3), sep="/")
    weights = {f"llm/{path}": leaf for path, leaf in weights.items()}
    adapters = {path: leaf for path, leaf in weights.items() if "lora" in path}
    frozen = {path: leaf for path, leaf in weights.items() if path not in adapters}
    stored = store(dict(frozen), storage)
    plain = {
        path: jnp.asarray(dequantized(leaf, stored[f"{path}_scale"])) if f"{path}_scale" in stored else leaf
        for path, leaf in stored.items()
        if not path.endswith("_scale")
    }
    embeddings = draw(2, 6, MISTRAL.hidden_size)

    def loss(model, frozen):
        def of(adapters):
            params = {"params": unflatten_dict({**adapters, **frozen}, sep="/")["llm"]}
            return jnp.sum(model.apply(params, embeddings, method=lambda m, x: m.logits(m(x))) ** 2)

        return jax.jit(jax.value_and_grad(of))(adapters)

    ours, expected = loss(model.clone(storage=storage), stored), loss(model, plain)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-4)
    for path, gradient in ours[1].items():
        np.testing.assert_allclose(gradient, expected[1][path], rtol=1e-3, atol=1e-3 * np.abs(gradient).max())


def test_full_storage_changes_nothing_and_other_parts_are_never_quantised():
    weights = {"llm/lm_head/kernel": draw(GROUP, 2), "umt/proj/kernel": draw(GROUP, 2), "llm/norm/scale": draw(2)}
    assert store(weights, "full") == weights
    stored = store(dict(weights), "int8")
    assert stored["llm/lm_head/kernel"].dtype == jnp.int8
    assert all(stored[path] is weights[path] for path in ("umt/proj/kernel", "llm/norm/scale"))
