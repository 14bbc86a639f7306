"""Weights for answering: those of a run stream into the form and the storage in which the model answers."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from favchat_jax.checkpoints import mistral_folder
from favchat_jax.checkpoints.run import load_run
from favchat_jax.checkpoints.tensors import open_tensors, save_tensors
from favchat_jax.errors import UserError
from favchat_jax.generation.weights import from_run, from_training
from favchat_jax.models.kernels.linear import BITS
from favchat_jax.models.kernels.quantized import quantize
from favchat_jax.models.mistral import LoRA
from favchat_jax.models.mistral_decoding import DecodingMistral
from tests.conftest import same_weights


def with_config(run, **changes):
    """A run as if it had been trained with another config."""
    config = run.config.updated({name.replace("__", "."): value for name, value in changes.items()})
    return dataclasses.replace(run, parts=dataclasses.replace(run.parts, config=config))


def in_training_form(run):
    """All weights of a run, read in another way."""
    return {**run.weights, **dict(mistral_folder.each_weight(run.config.llm.path, prefix="llm/"))}


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_weights_of_a_run_are_those_of_its_training_form_with_merged_adapters(stage, trained):
    run = load_run(trained.folder / stage)
    expected = from_training(in_training_form(run), run.config, run.parts.llm)
    found = from_run(run)
    assert found.keys() == expected.keys() and not run.weights, "a run does not hold its weights a second time"
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype == jnp.float32
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-6, err_msg=path)


def test_matrices_are_in_the_dtype_of_the_computation(trained):
    half = from_run(with_config(load_run(trained.folder / "stage3"), model__dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in half.values() if leaf.ndim > 1} == {"bfloat16", jnp.dtype(BITS).name}
    assert {leaf.dtype.name for leaf in half.values() if leaf.ndim == 1} == {"float32"}


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_narrow_kernels_with_adapters_beside_them_give_the_scores_of_their_dequantised_form(storage, trained):
    run = load_run(trained.folder / "stage3")
    config, llm = run.config, run.parts.llm
    dequantised = {}
    for path, leaf in in_training_form(run).items():
        if path.startswith("llm/") and path.endswith("/kernel"):
            leaf = rounded(leaf, storage)
        dequantised[path] = leaf
    full = unflatten_dict(from_training(dequantised, config, llm), sep="/")["llm"]
    narrow = unflatten_dict(from_run(run, storage=storage), sep="/")["llm"]
    lora = LoRA(config.lora_rank, config.model.lora.alpha, targets=config.model.lora.targets)
    words = jax.random.normal(jax.random.key(0), (2, 5, llm.hidden_size))

    def scores(model, weights):
        return model.apply({"params": weights}, words, method=lambda model, x: model.logits(model(x)))

    expected = scores(DecodingMistral(llm), full)
    np.testing.assert_allclose(scores(DecodingMistral(llm, storage=storage, lora=lora), narrow), expected, atol=2e-4)
    kernels = {leaf.dtype.name for leaf in jax.tree.leaves(narrow) if leaf.dtype in (jnp.int8, jnp.int4)}
    assert kernels == {storage} and same_weights(narrow["embed_tokens"], full["embed_tokens"])


def rounded(kernel, storage):
    """A kernel [..., in, out] after it was narrowed and widened again."""
    integers, scale = quantize(kernel, storage)
    return np.asarray(integers, np.float32) * np.repeat(scale, kernel.shape[-2] // scale.shape[-2], axis=-2)


def test_a_weight_that_is_not_finite_is_named(trained, tmp_path):
    run = load_run(trained.folder / "stage3")
    folder = shutil.copytree(run.config.llm.path, tmp_path / "mistral")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {key: np.array(tensor) for key, tensor in open_tensors(folder).items()}
    tensors[name][3, 2] = np.nan
    save_tensors(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
        from_run(with_config(run, llm__path=str(folder)))
