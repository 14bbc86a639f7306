"""LoRA: PEFT's formula, targets, gradient and dropout of adapters, and merging them into the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from favchat_jax.models.kernels import low_rank as low_rank_module
from favchat_jax.models.kernels.low_rank import low_rank
from favchat_jax.models.lora import LoRADense, merged
from favchat_jax.models.mistral import LoRA, Mistral
from tests.models.tiny_parts import MISTRAL, drawn, mistral_shapes

DENSE = LoRADense(features=5, rank=2, alpha=3.0)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (2, 3, 4))


@pytest.fixture(scope="module")
def weights(x):
    return drawn(jax.eval_shape(DENSE.init, jax.random.key(0), x), spread=0.5)


def test_an_adapter_adds_alpha_over_r_times_x_a_b(x, weights):
    kernel, a, b = (np.asarray(weights["params"][name], np.float64) for name in ("kernel", "lora_a", "lora_b"))
    expected = x @ kernel + 3 / 2 * (x @ a @ b)
    np.testing.assert_allclose(DENSE.apply(weights, x), expected, atol=1e-5)


def test_a_fresh_adapter_changes_nothing(x):
    fresh = DENSE.init(jax.random.key(0), x)
    assert np.abs(fresh["params"]["lora_a"]).min() > 0
    plain = LoRADense(features=5).apply({"params": {"kernel": fresh["params"]["kernel"]}}, x)
    np.testing.assert_array_equal(DENSE.apply(fresh, x), plain)


def test_a_fresh_adapter_learns(x):
    fresh = DENSE.init(jax.random.key(0), x)
    gradient = jax.grad(lambda weights: (DENSE.apply(weights, x) ** 2).sum())(fresh)["params"]
    assert np.abs(gradient["lora_b"]).min() > 0


def test_with_rank_0_there_are_no_adapter_weights(x):
    shapes = jax.eval_shape(LoRADense(features=5, rank=0).init, jax.random.key(0), x)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == {"params": {"kernel": (4, 5)}}


def test_the_gradient_of_low_rank_is_that_of_plain_autodiff(x, weights):
    a, b = weights["params"]["lora_a"], weights["params"]["lora_b"]

    def loss(product):
        return lambda *inputs: jnp.sum(jnp.sin(product(*inputs)))

    own = jax.grad(loss(low_rank), argnums=(0, 1, 2))(x, a, b)
    plain = jax.grad(loss(low_rank_module.plain), argnums=(0, 1, 2))(x, a, b)
    for mine, expected in zip(own, plain, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_dropout_applies_to_the_adapters_input_and_not_to_the_base_path(x, weights):
    layer = LoRADense(features=4, rank=4, alpha=4.0, dropout=0.25)
    kernel = weights["params"]["kernel"][:, :4]
    params = {"kernel": kernel, "lora_a": jnp.eye(4), "lora_b": jnp.eye(4)}
    many = jnp.tile(x, (1, 50, 1))
    y = layer.apply({"params": params}, many, False, rngs={"dropout": jax.random.key(0)})
    through_adapter = y - many @ kernel
    dropped = np.isclose(through_adapter, 0, atol=1e-5)
    kept = np.isclose(through_adapter, many / 0.75, atol=1e-5)
    assert (dropped ^ kept).all()
    assert 0.15 < dropped.mean() < 0.35
    silent = {"params": {**params, "lora_b": jnp.zeros((4, 4))}}
    with_dropout = layer.apply(silent, many, False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(with_dropout, layer.apply(silent, many))


def test_merging_gives_a_plain_layer_of_the_same_function(x, weights):
    kernel, a, b = (weights["params"][name] for name in ("kernel", "lora_a", "lora_b"))
    plain = {"params": {"kernel": merged(kernel, a, b, alpha=3.0)}}
    np.testing.assert_allclose(LoRADense(features=5).apply(plain, x), DENSE.apply(weights, x), atol=1e-5)


def test_a_merged_kernel_keeps_its_dtype(weights):
    kernel, a, b = (weights["params"][name] for name in ("kernel", "lora_a", "lora_b"))
    assert merged(kernel.astype(jnp.bfloat16), a, b, alpha=3.0).dtype == jnp.bfloat16


def test_only_the_named_targets_have_adapters():
    model = Mistral(MISTRAL, LoRA(rank=2, targets=("v_proj", "lm_head")))
    adapted = {path.rsplit("/", 1)[0] for path in flatten_dict(mistral_shapes(model), sep="/") if "lora" in path}
    assert adapted == {"layers/self_attn/v_proj", "lm_head"}
