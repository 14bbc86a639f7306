"""Every kernel of attention equals the plain one, in all forms of attention that the model uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from favchat_jax.models.kernels import splash
from favchat_jax.models.kernels.attention import attention, attention_to_cache, kernel_for, plain
from favchat_jax.models.kernels.platform import compiling_for


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def seen(batch, keys):
    """Returns a padding mask with a different number of keys for each row."""
    return (jnp.arange(keys) < keys - 40 * jnp.arange(1, batch + 1)[:, None])[:, None, None]


# Forms that the model uses: batch, queries, keys, heads, key heads, channels of a head, and the rest.
WAYS = {
    "joint space-time": (1, 392, 392, 2, 2, 64, {}),
    "cross-attention": (2, 96, 392, 2, 2, 32, {}),
    "cross-attention to masked keys": (2, 96, 300, 2, 2, 32, {"mask": seen(2, 300)}),
    "causal, grouped heads": (2, 200, 200, 4, 2, 64, {"causal": True}),
    "causal, grouped heads, padding": (2, 200, 200, 4, 1, 64, {"causal": True, "mask": seen(2, 200)}),
    "causal, window": (1, 300, 300, 4, 2, 64, {"causal": True, "window": 150}),
}


def arrays(way, dtype=jnp.float32):
    batch, length, keys, heads, key_heads, width, how = WAYS[way]
    query = draw(batch, length, heads, width, dtype=dtype)
    return (query, *(draw(batch, keys, key_heads, width, seed=s, dtype=dtype) for s in (1, 2))), how


def results(run, inputs, how):
    """Returns attended values where they are defined, and the gradients of all inputs."""
    # With a causal mask, a query after the last visible key may have no key to read.
    cotangent = draw(*inputs[0].shape, seed=3, dtype=inputs[0].dtype)
    if how.get("causal") and "mask" in how:
        cotangent *= jnp.swapaxes(how["mask"], 1, 3)[:, :, :1]
    out, pull = jax.vjp(lambda *x: run(*x, **how), *inputs)
    return (out * (cotangent != 0), *pull(cotangent))


@pytest.mark.parametrize("way", WAYS)
def test_the_tpu_kernel_equals_the_plain_one_in_values_and_gradients(way):
    inputs, how = arrays(way)
    ours = jax.jit(lambda *x: results(lambda *y, **h: splash.attention(*y, **h, interpret=True), x, how))(*inputs)
    for one, other in zip(ours, jax.jit(lambda *x: results(plain, x, how))(*inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_cudnn_equals_the_plain_one_in_values_and_gradients(way):
    if jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs an NVIDIA GPU")
    inputs, how = arrays(way, jnp.bfloat16)
    assert kernel_for(*inputs[:2], None, how.get("mask")) == "cudnn"
    ours = jax.jit(lambda *x: results(attention, x, how))(*inputs)
    for one, other in zip(ours, jax.jit(lambda *x: results(plain, x, how))(*inputs), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), atol=3e-2)


@pytest.mark.parametrize("way", WAYS)
def test_each_platform_has_its_kernel_for_long_sequences(way):
    inputs, how = arrays(way, jnp.bfloat16)
    chosen = {}
    for platform in ("cpu", "gpu", "tpu"):
        with compiling_for(platform):
            chosen[platform] = kernel_for(*inputs[:2], None, how.get("mask"))
    assert chosen == {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}


def test_windows_with_a_bias_single_tokens_and_float32_on_a_gpu_stay_with_xla():
    window, token, keys = draw(8, 49, 2, 32), draw(8, 1, 2, 32), draw(8, 128, 2, 32)
    by_query = jnp.ones((1, 1, 128, 128), bool)
    for platform in ("gpu", "tpu"):
        with compiling_for(platform):
            assert kernel_for(window, window, draw(1, 2, 49, 49), None) == "xla"
            assert kernel_for(token, keys, None, None) == "xla"
            assert kernel_for(keys, keys, None, by_query) == "xla"
    with compiling_for("gpu"):
        assert kernel_for(keys, keys, None, None) == "xla"


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_single_token_reads_a_cache_as_the_plain_form_does(key_heads):
    query, (key, value) = draw(3, 1, 4, 8), (draw(3, 20, key_heads, 8, seed=s) for s in (1, 2))
    mask = jnp.arange(20) <= jnp.array([3, 9, 19])[:, None]
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
    read = attention_to_cache(query, key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3), mask)
    np.testing.assert_allclose(read, expected, atol=1e-6)


def test_on_a_mesh_the_tpu_kernel_runs_on_each_devices_own_clips_and_heads():
    """One device can only show that the kernel is traced for an eighth of the work within a mesh of eight devices."""
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    shapes = [jax.ShapeDtypeStruct((4, 128, 4, 64), jnp.bfloat16) for _ in range(3)]
    with compiling_for("tpu"), jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(attention)(*shapes)
    mapped = next(e for e in traced.eqns if e.primitive.name == "shard_map")
    # Besides query, key and value, there are constants of the kernel, which every device holds in full.
    assert list(mapped.params["in_specs"]).count(PartitionSpec(("data", "fsdp"), "tensor")) == 3
    assert [v.aval.shape for v in mapped.params["jaxpr"].invars].count((1, 2, 128, 64)) == 3
