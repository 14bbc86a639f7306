"""The tool that says what narrow storage costs: wider is nearer to float32, and bytes are those of packed kernels."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from favchat_jax.checkpoints import mistral_folder
from favchat_jax.models.mistral import Mistral
from tools.quantization_error import errors, widened


def test_the_wider_the_storage_the_smaller_the_error_and_the_larger_the_kernels(small_world):
    rows = errors(small_world.llm)
    assert [row["storage"] for row in rows] == ["float32", "bfloat16", "int8", "int4"]
    assert rows[0]["error"] == 0 and rows[0]["same_token"] == 1
    assert 0 < rows[1]["error"] < 0.01 < rows[3]["error"] < 0.5
    assert rows[1]["error"] < rows[2]["error"] < rows[3]["error"]
    sizes = [row["bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[1] * 2 == sizes[0]


def test_a_widened_model_computes_the_same_with_weights_that_differ(small_world):
    config = mistral_folder.read_config(small_world.llm)
    weights = flatten_dict(mistral_folder.read_weights(small_world.llm), sep="/")
    wide, wider = widened(config, weights, 4 * config.hidden_size)
    shapes = mistral_folder.weight_shapes(wide)
    assert {path: leaf.shape for path, leaf in wider.items()} == shapes
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))

    def scores(config, weights):
        return jax.jit(lambda params: Mistral(config).apply(params, tokens, method="read"))(
            {"params": unflatten_dict(weights, sep="/")}
        )

    np.testing.assert_allclose(scores(wide, wider), scores(config, weights), atol=1e-3)
    kernel = wider["layers/mlp/up_proj/kernel"]
    assert len(np.unique(kernel)) > 0.9 * kernel.size
    original = weights["layers/mlp/up_proj/kernel"].std()
    np.testing.assert_allclose(kernel.std(), original / 2, rtol=0.2)
