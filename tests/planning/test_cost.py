import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.kernels.attention import attention
from favchat_jax.planning import cost

A, B = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
PRODUCT = 2 * 3 * 5 * 7


def flops(program, *shapes):
    return cost.total_flops(cost.products(jax.make_jaxpr(program)(*shapes)))


def test_a_product_counts_one_multiplication_and_one_addition_per_pair():
    assert flops(lambda a, b: a @ b, A, B) == PRODUCT


def test_a_loop_counts_every_iteration_also_in_nested_loops():
    def looped(a, b):
        def inner(carry, _):
            return carry + jnp.sum(a @ b), None

        def outer(carry, _):
            return jax.lax.scan(inner, carry, length=4)[0], None

        return jax.lax.scan(outer, 0.0, length=3)[0]

    assert flops(looped, A, B) == 12 * PRODUCT


def test_only_the_costliest_branch_counts():
    def either(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: (a @ b) @ (b.T @ b))

    assert flops(either, A, B) == PRODUCT + 2 * 7 * 5 * 7 + 2 * 3 * 7 * 7


def test_rematerialisation_adds_one_forward_pass():
    def loss(policy):
        layer = jax.checkpoint(lambda a, b: jnp.tanh(a @ b)) if policy else lambda a, b: jnp.tanh(a @ b)
        return lambda a, b: jnp.sum(layer(a, b))

    kept, again = (flops(jax.grad(loss(policy), argnums=(0, 1)), A, B) for policy in (False, True))
    assert (kept, again) == (3 * PRODUCT, 4 * PRODUCT)


def test_large_matrix_products_are_bound_by_arithmetic_and_vector_products_by_memory():
    square, column = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((64, 1), jnp.float32)

    def program(a, b):
        return cost.products(jax.make_jaxpr(lambda a, b: a @ b)(a, b))

    seconds = cost.roofline_seconds(program(square, square), 1, flops=1e3, bandwidth=1e3)
    np.testing.assert_allclose(seconds, 2 * 64**3 / 1e3)
    seconds = cost.roofline_seconds(program(square, column), 2, flops=1e3, bandwidth=1e3)
    np.testing.assert_allclose(seconds, 4 * (64 * 64 + 2 * 64) / 1e3 / 2)


def test_attention_scores_cost_no_memory_traffic_in_loops_and_backward_passes():
    query = jax.ShapeDtypeStruct((2, 128, 4, 8), jnp.float32)

    def loss(query):
        return jax.lax.scan(lambda x, _: (attention(x, x, x), None), query, length=3)[0].sum()

    program = list(cost.products(jax.make_jaxpr(jax.grad(loss))(query)))
    scores = 2 * 2 * 4 * 128 * 128 * 8
    assert cost.total_flops(program) == 3 * (2 + 4) * scores
    assert {product.bytes for product in program} == {0}


def test_activations_are_the_saved_results_that_are_not_arguments():
    def forward(a, b):
        value, backward = jax.vjp(lambda b: jnp.sum(jnp.sin(jnp.exp(a @ b))), b)
        return value, [leaf for leaf in jax.tree.leaves(backward) if isinstance(leaf, jax.Array)]

    kept = cost.saved_bytes(jax.make_jaxpr(forward)(A, B), weights={(5, 7)})
    assert kept == 4 + 2 * 3 * 7 * 4  # the loss, cos(exp(a b)) and exp(a b)


def test_slices_of_stacked_weights_in_a_loop_are_not_activations():
    def forward(first, second):
        return jnp.stack([first, second]), jnp.zeros((3, 7))

    kept = cost.saved_bytes(jax.make_jaxpr(forward)(B, B), weights={B.shape})
    assert kept == 3 * 7 * 4


def test_a_loop_of_unknown_length_with_a_product_is_an_error():
    def until(a, b):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x + x @ (b @ b.T), a)

    with pytest.raises(ValueError, match="cannot be counted"):
        flops(until, A, B)


@pytest.mark.parametrize(("dtype", "width"), [(jnp.float32, 4), (jnp.bfloat16, 2), (jnp.int8, 1), (jnp.int4, 0.5)])
def test_a_kernel_that_is_widened_for_its_product_moves_in_its_stored_width(dtype, width):
    kernel = jax.ShapeDtypeStruct((5, 7), dtype)

    @jax.jit
    def product(x, kernel):
        return x.astype(jnp.float32) @ (kernel.astype(jnp.float32) * jnp.ones((5, 7))).reshape(5, 7)

    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (product(x, kernel) @ jnp.ones((7, 5)), None), x, kernels)[0]

    (one,) = cost.products(jax.make_jaxpr(product)(A, kernel))
    assert one.bytes == 4 * 3 * 5 + width * 5 * 7 + 4 * 3 * 7
    stacked = jax.ShapeDtypeStruct((4, 5, 7), dtype)
    inner, _ = cost.products(jax.make_jaxpr(layers)(A, stacked))
    assert (inner.bytes, inner.times) == (one.bytes, 4)
