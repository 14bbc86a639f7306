"""UMT: the published sizes and position tables, and blocks that compute their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from favchat_jax.models.umt import UMT, bicubic_weights, linear_weights, position_table, sinusoid_table
from tests.models.tiny_parts import drawn_for

TINY = UMT(width=16, depth=4, layers_run=3, heads=2, mlp_ratio=2, patch=4, checkpoint_frames=4, checkpoint_size=12)
GRID = {"checkpoint_frames": 4, "checkpoint_grid": 3}


@pytest.fixture(scope="module")
def frames():
    return jax.random.normal(jax.random.key(2), (2, 4, 12, 12, 3))


@pytest.fixture(scope="module")
def weights(frames):
    return drawn_for(TINY, frames)


def test_the_part_of_umt_l_that_runs_has_the_published_number_of_weights():
    width, hidden = 1024, 4096
    attention = 3 * width * width + 2 * width + width * width + width
    mlp = width * hidden + hidden + hidden * width + width
    expected = 23 * (attention + mlp + 2 * 2 * width) + 16 * 16 * 3 * width + width
    shapes = jax.eval_shape(UMT().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 224, 224, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected == 290_477_056


def test_the_sinusoid_table_is_its_formula_at_every_position_and_channel():
    table = sinusoid_table(7, 6)
    for position in range(7):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[position, channel] == pytest.approx(expected, abs=1e-12)


def test_a_clip_of_the_checkpoints_length_has_the_sinusoid_over_all_its_positions():
    table = position_table(4, 3, 3, 8, **GRID)
    np.testing.assert_allclose(table.reshape(-1, 8), sinusoid_table(36, 8), atol=1e-7)


def test_longer_clips_interpolate_the_table_linearly_between_frame_centres():
    base, table = position_table(4, 3, 3, 8, **GRID), position_table(8, 3, 3, 8, **GRID)
    np.testing.assert_allclose(table[0], base[0], atol=1e-6)
    np.testing.assert_allclose(table[1], 0.75 * base[0] + 0.25 * base[1], atol=1e-6)
    np.testing.assert_allclose(table[4], 0.25 * base[1] + 0.75 * base[2], atol=1e-6)
    np.testing.assert_allclose(table[7], base[3], atol=1e-6)


def test_shorter_clips_interpolate_the_table_too():
    np.testing.assert_allclose(linear_weights(2, 4), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])


def test_a_single_frame_has_the_table_of_an_image():
    table = position_table(1, 3, 3, 8, **GRID)
    np.testing.assert_allclose(table.reshape(-1, 8), sinusoid_table(9, 8), atol=1e-7)


def test_other_resolutions_resample_the_table_with_the_cubic_kernel_of_a_minus_three_quarters():
    # The kernel at distances 1.25, 0.25, 0.75 and 1.75, worked out by hand.
    kernel = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]
    np.testing.assert_allclose(bicubic_weights(10, 5)[5, 1:5], kernel, atol=1e-12)
    np.testing.assert_allclose(bicubic_weights(7, 5).sum(1), 1)
    # At the border, samples outside are the outermost one.
    np.testing.assert_allclose(bicubic_weights(10, 5)[0, :2], [1 - kernel[0], kernel[0]], atol=1e-12)

    base, table = position_table(4, 3, 3, 8, **GRID), position_table(8, 6, 3, 8, **GRID)
    expected = np.einsum("nt,hr,trcd->nhcd", linear_weights(8, 4), bicubic_weights(6, 3), base)
    np.testing.assert_allclose(table, expected, atol=1e-6)


def layer_norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def naive_umt(weights, frames, blocks):
    """Computes the encoder in float64, one block and head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)["params"]
    erf = np.vectorize(math.erf)
    batch, time, height, width, _ = frames.shape
    tokens = [
        clip[t, y : y + 4, x : x + 4].ravel() @ params["patch_embed"]["proj"]["kernel"]
        for clip in np.asarray(frames, np.float64)
        for t in range(time)
        for y in range(0, height, 4)
        for x in range(0, width, 4)
    ]
    tokens = np.stack(tokens).reshape(batch, -1, TINY.width) + params["patch_embed"]["proj"]["bias"]
    tokens = tokens + sinusoid_table(tokens.shape[1], TINY.width)
    for i in range(blocks):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        qkv = layer_norm(tokens, block["norm1"]) @ block["attn"]["qkv"]["kernel"]
        query, key, value = np.split(qkv, 3, axis=-1)
        query, value = query + block["attn"]["q_bias"], value + block["attn"]["v_bias"]
        heads = []
        for head in np.split(np.arange(TINY.width), TINY.heads):
            scores = np.exp(query[..., head] @ key[..., head].swapaxes(1, 2) / math.sqrt(len(head)))
            heads.append(scores / scores.sum(-1, keepdims=True) @ value[..., head])
        tokens = tokens + np.concatenate(heads, -1) @ block["attn"]["proj"]["kernel"] + block["attn"]["proj"]["bias"]
        hidden = layer_norm(tokens, block["norm2"]) @ block["mlp"]["fc1"]["kernel"] + block["mlp"]["fc1"]["bias"]
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        tokens = tokens + hidden @ block["mlp"]["fc2"]["kernel"] + block["mlp"]["fc2"]["bias"]
    return tokens


def test_the_encoder_computes_its_formulas(frames, weights):
    tokens, taps = jax.jit(TINY.apply)(weights, frames)
    assert taps == ()
    expected = naive_umt(weights, frames, 3)
    np.testing.assert_allclose(tokens, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("remat", ["", "block", "products"])
def test_taps_are_the_outputs_of_the_listed_blocks(frames, weights, remat):
    tokens, taps = jax.jit(TINY.clone(taps=(1, 3), remat=remat).apply)(weights, frames)
    for block, tap in zip((1, 3), taps, strict=True):
        expected = naive_umt(weights, frames, block)
        np.testing.assert_allclose(tap, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(tokens, taps[-1])


def test_gradients_through_taps_are_the_same_with_and_without_rematerialisation(frames, weights):
    def loss(weights, model):
        tokens, taps = model.apply(weights, frames)
        return (tokens**2).mean() + (taps[0] ** 3).mean()

    kept, recomputed = (
        jax.jit(jax.grad(loss), static_argnums=1)(weights, TINY.clone(taps=(2,), remat=remat))
        for remat in ("", "block")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), kept, recomputed)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(kept))


def test_an_untapped_block_after_the_last_tap_does_not_touch_it(frames, weights):
    def tap(weights):
        return TINY.clone(taps=(2,)).apply(weights, frames)[1][0].sum()

    gradient = jax.jit(jax.grad(tap))(weights)["params"]["blocks"]["mlp"]["fc2"]["kernel"]
    assert np.abs(gradient[1]).max() > 0
    np.testing.assert_array_equal(gradient[2], 0)


def test_every_frame_influences_every_other_frame(frames, weights):
    apply = jax.jit(TINY.apply)
    changed = frames.at[0, 3].add(1)
    before, after = apply(weights, frames)[0], apply(weights, changed)[0]
    assert np.abs(after[0, :9] - before[0, :9]).max() > 1e-4
    np.testing.assert_array_equal(before[1], after[1])


def test_the_compute_dtype_leaves_the_weights_float32(frames):
    model = TINY.clone(dtype=jnp.bfloat16)
    weights = jax.eval_shape(model.init, jax.random.key(0), frames)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.apply, weights, frames)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("fields", [{"taps": (3, 1)}, {"taps": (4,)}, {"taps": (0,)}, {"layers_run": 5}])
def test_blocks_that_do_not_run_cannot_be_tapped(frames, fields):
    with pytest.raises(ValueError, match="blocks"):
        jax.eval_shape(TINY.clone(**fields).init, jax.random.key(0), frames)
