"""Eq. 2: the printed formula, what the residual adds, and that frames and places enter by `add_positions` alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.granularity import GranularityFusion, add_positions
from favchat_jax.models.umt import sinusoid_table
from tests.models.tiny_parts import drawn

FORMS = {"printed": GranularityFusion(width=6, heads=3, residual=False), "residual": GranularityFusion(6, heads=3)}

fuse = {form: jax.jit(model.apply) for form, model in FORMS.items()}


@pytest.fixture(scope="module")
def inputs():
    """Two clips of three frames: e_g of 4 tokens, e_1 of 5 tokens, e_2 of 2."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((4, 6), (5, 3), (2, 7))
    general, *facial = (jax.random.normal(key, (2, 3, *size)) for key, size in zip(keys, sizes, strict=True))
    return general, tuple(facial)


@pytest.fixture(scope="module")
def weights(inputs):
    shapes = {form: jax.eval_shape(model.init, jax.random.key(0), *inputs) for form, model in FORMS.items()}
    return {form: drawn(shape, spread=0.7) for form, shape in shapes.items()}


def layer_norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def linear(x, params):
    return x @ params["kernel"] + params["bias"]


def naive_step(params, facial, fused, heads):
    """One line of Eq. 2 for one frame in float64, each head on its own columns; a residual where it has weights."""
    values = fused
    if "skip" in params:
        facial, values = layer_norm(facial, params["query_norm"]), layer_norm(fused, params["value_norm"])
    query, key, value = linear(facial, params["query"]), linear(values, params["key"]), linear(values, params["value"])
    attended = []
    for columns in np.split(np.arange(query.shape[-1]), heads):
        scores = np.exp(query[:, columns] @ key[:, columns].T / np.sqrt(len(columns)))
        attended.append(scores / scores.sum(-1, keepdims=True) @ value[:, columns])
    attended = np.concatenate(attended, axis=-1)
    if "skip" not in params:
        return attended
    return linear(facial, params["skip"]) + linear(attended, params["out"])


@pytest.mark.parametrize("form", FORMS)
def test_the_fusion_is_equation_2_over_two_granularities(inputs, weights, form):
    general, facial = (jax.tree.map(lambda x: np.asarray(x, np.float64), part) for part in inputs)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), weights[form])["params"]
    result = fuse[form](weights[form], *inputs)
    assert result.shape == (2, 3, 2, 6)
    for clip, frame in np.ndindex(2, 3):
        first = naive_step(params["step_1"], facial[0][clip, frame], general[clip, frame], heads=3)
        expected = naive_step(params["step_2"], facial[1][clip, frame], first, heads=3)
        np.testing.assert_allclose(result[clip, frame], expected, atol=1e-4)


def test_with_one_head_the_scores_are_divided_by_the_root_of_the_whole_width(inputs, weights):
    model = GranularityFusion(width=6, heads=1, residual=False)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), weights["printed"])["params"]
    general, facial = inputs
    result = jax.jit(model.apply)(weights["printed"], general, facial[:1])
    expected = naive_step(params["step_1"], np.float64(facial[0][0, 0]), np.float64(general[0, 0]), heads=1)
    np.testing.assert_allclose(result[0, 0], expected, atol=1e-4)


def test_the_printed_form_has_no_weights_but_the_three_projections(weights):
    assert set(weights["printed"]["params"]["step_1"]) == {"query", "key", "value"}


def test_only_with_the_residual_does_the_face_pass_where_the_general_tokens_are_all_alike(inputs, weights):
    general, facial = inputs
    alike = jnp.broadcast_to(general[:, :, :1], general.shape)
    other = tuple(-x for x in facial)
    change = {
        form: np.abs(run(weights[form], alike, facial) - run(weights[form], alike, other)).max()
        for form, run in fuse.items()
    }
    assert change["printed"] < 1e-5
    assert change["residual"] > 0.1


@pytest.mark.parametrize("changed", ["general", "e_1", "e_2"])
def test_a_frame_reads_its_own_frame_and_every_granularity_of_it(inputs, weights, changed):
    general, facial = inputs
    parts = {"general": general, "e_1": facial[0], "e_2": facial[1]}
    parts[changed] = parts[changed].at[1, 1, 0].multiply(-2)
    before = fuse["residual"](weights["residual"], *inputs)
    after = fuse["residual"](weights["residual"], parts["general"], (parts["e_1"], parts["e_2"]))
    moved = np.abs(before - after).max((2, 3))
    assert moved[1, 1] > 1e-3
    moved[1, 1] = 0
    np.testing.assert_allclose(moved, 0, atol=1e-6)


def test_add_positions_tells_equal_frames_and_places_apart_and_lays_frames_one_after_another():
    tokens = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (2, 1, 1, 6)), (2, 3, 4, 6))
    laid = add_positions(tokens).reshape(2, 3, 4, 6)
    for frame in range(3):
        for place in range(4):
            added = np.concatenate([sinusoid_table(3, 3)[frame], sinusoid_table(4, 3)[place]])
            np.testing.assert_allclose(laid[:, frame, place], tokens[:, frame, place] + added, atol=1e-6)
    distances = np.abs(laid[0].reshape(12, 1, 6) - laid[0].reshape(1, 12, 6)).max(-1)
    assert distances[~np.eye(12, dtype=bool)].min() > 0.1
