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


def test_the_rounding_error_of_int8_is_at_most_half_a_step():
    kernel = draw(3, 4 * GROUP, 5)
    integers, scale = quantize(kernel, "int8")
    assert integers.dtype == "int8" and scale.shape == (3, 1, 5)
    assert (np.abs(dequantized(integers, scale) - kernel) <= 0.5001 * scale).all()
    assert int(jnp.abs(integers).max()) == 127


def test_each_group_of_int4_has_the_scale_with_the_smallest_error_among_three():
    kernel = np.asarray(draw(4 * GROUP, 5))
    integers, scale = quantize(kernel, "int4")
    assert integers.dtype == "int4" and scale.shape == (4, 5)
    of_groups = kernel.reshape(4, GROUP, 5)
    tried = np.stack([share * np.abs(of_groups).max(1) / 7 for share in (1.0, 0.9, 0.8)])[:, :, None]
    errors = np.square(np.clip(np.round(of_groups / tried), -7, 7) * tried - of_groups).sum(2)
    np.testing.assert_allclose(scale, np.take_along_axis(tried[:, :, 0], errors.argmin(0)[None], 0)[0], rtol=1e-6)
    squares = np.square(dequantized(integers, scale) - kernel).reshape(4, GROUP, 5).sum(1)
    np.testing.assert_allclose(squares, errors.min(0), rtol=1e-4)
    assert len(np.unique(errors.argmin(0))) > 1, "one share is not the best of all groups"


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_transposed_kernel_is_narrowed_to_the_same_integers(storage):
    kernel = draw(2 * GROUP, 5)
    integers, scale = quantize(kernel, storage)
    transposed, its_scale = quantize(kernel.T, storage, axis=-1)
    np.testing.assert_array_equal(transposed.T, integers)
    np.testing.assert_array_equal(its_scale.T, scale)


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
