"""Products with transposed kernels, in full width and narrow, and what XLA makes of them on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.kernels.linear import BITS, BLOCK, FEW, for_reading, transposed_product
from favchat_jax.models.kernels.platform import compiling_for
from favchat_jax.models.kernels.quantized import GROUP, quantize


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("rows", [(1,), (3, 8), (64,), (5, 13)])
def test_a_transposed_kernel_gives_the_same_product(rows):
    x, kernel = normal(*rows, 7), normal(7, 5, seed=1)
    np.testing.assert_allclose(transposed_product(x, kernel.T), x @ kernel, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 8, FEW])
def test_a_transposed_kernel_is_not_transposed_again_for_a_few_rows(rows):
    x, kernel = jnp.ones((rows, 256)), jnp.ones((512, 256))
    program = jax.jit(transposed_product).lower(x, kernel).compile().as_text()
    assert "f32[512,256]" in program and "f32[256,512]" not in program
    assert f"f32[512,{rows}]" in program, "the kernel is the product's first operand"


@pytest.mark.parametrize("features", [2 * BLOCK, BLOCK + 1], ids=["in blocks", "at once"])
@pytest.mark.parametrize("rows", [1, FEW + 1])
@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
def test_a_narrow_kernel_gives_the_product_of_its_wide_form(storage, rows, features):
    x, kernel = normal(rows, 2 * GROUP), normal(features, 2 * GROUP, seed=1)
    if storage == "bfloat16":
        narrow, scale = kernel.astype(storage), None
        wide = narrow.astype(jnp.float32)
    else:
        narrow, scale = quantize(kernel, storage, axis=-1)
        wide = narrow.astype(jnp.float32) * jnp.repeat(scale, kernel.shape[1] // scale.shape[1], axis=1)
    with compiling_for("cpu"):
        read = for_reading(narrow) if storage == "bfloat16" else narrow
        y = jax.jit(transposed_product)(x, read, scale)
    np.testing.assert_allclose(y, x @ wide.T, atol=1e-4)
    with compiling_for("gpu"):
        y = jax.jit(lambda *of: transposed_product(*of))(x, narrow, scale)
    np.testing.assert_allclose(y, x @ wide.T, atol=1e-4)


def test_only_a_cpu_reads_bfloat16_as_its_bits():
    kernel = normal(BLOCK, 4).astype(jnp.bfloat16)
    for platform, dtype in (("cpu", BITS), ("gpu", jnp.bfloat16), ("tpu", jnp.bfloat16)):
        with compiling_for(platform):
            assert for_reading(kernel).dtype == dtype
            assert for_reading(kernel.astype(jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_no_program_on_a_cpu_holds_a_wide_copy_of_a_narrow_kernel(storage):
    kernel = normal(8 * BLOCK, 512)
    narrow, scale = (
        (for_reading(kernel.astype(storage)), None) if storage == "bfloat16" else quantize(kernel, storage, -1)
    )

    def several(x, kernel, scale):  # as tokens are drawn
        return jax.lax.fori_loop(0, 3, lambda _, x: transposed_product(x, kernel, scale)[:, :512], x)

    compiled = jax.jit(several).lower(jnp.ones((1, 512)), narrow, scale).compile()
    block = 4 * BLOCK * 512
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * block < 4 * kernel.size / 2
