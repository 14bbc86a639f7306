"""FaceXFormer's encoder: the published sizes, and window attention against masked attention over the map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from favchat_jax.models.facexformer import (
    FaceXFormerEncoder,
    LinearFuse,
    PatchMerging,
    WindowAttention,
    relative_position_index,
)
from tests.models.tiny_parts import drawn_for

TINY = FaceXFormerEncoder(width=8, depths=(2, 1), heads=(2, 2), window=4, mlp_ratio=2, patch=4)


def test_swin_b_without_norm_and_head_has_the_published_number_of_weights():
    torchvision_swin_b, head, norm = 87_768_224, 1024 * 1000 + 1000, 2 * 1024
    blocks = 0
    for stage, (depth, heads) in enumerate(zip((2, 2, 18, 2), (4, 8, 16, 32), strict=True)):
        width = 128 * 2**stage
        attention = width * 3 * width + 3 * width + width * width + width + 13 * 13 * heads
        mlp = width * 4 * width + 4 * width + 4 * width * width + width
        blocks += depth * (attention + mlp + 2 * 2 * width)
    merging = sum(4 * width * 2 * width + 2 * 4 * width for width in (128, 256, 512))
    by_hand = 4 * 4 * 3 * 128 + 128 + 2 * 128 + blocks + merging
    shapes = jax.eval_shape(
        FaceXFormerEncoder().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == by_hand == torchvision_swin_b - head - norm == 86_741_176


def test_the_four_taps_of_the_paper_have_the_published_shapes():
    frames = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    taps, _ = jax.eval_shape(FaceXFormerEncoder(remat="block").init_with_output, jax.random.key(0), frames)
    assert [tap.shape for tap in taps] == [(2, 56, 56, 128), (2, 28, 28, 256), (2, 14, 14, 512), (2, 7, 7, 1024)]


def test_linear_fuse_has_the_published_number_of_weights():
    taps = [jax.ShapeDtypeStruct((1, n, n, d), jnp.float32) for n, d in ((56, 128), (28, 256), (14, 512), (7, 1024))]
    shapes = jax.eval_shape(LinearFuse().init, jax.random.key(0), taps)
    by_hand = sum(256 * width + 256 for width in (128, 256, 512, 1024)) + 1024 * 256
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == by_hand == 754_688


@pytest.mark.parametrize(("window", "table_window"), [((3, 3), 3), ((2, 3), 4)])
def test_the_bias_index_numbers_the_offsets_of_query_and_key(window, table_window):
    offsets = [
        (row, column)
        for row in range(-table_window + 1, table_window)
        for column in range(-table_window + 1, table_window)
    ]
    tokens = [(row, column) for row in range(window[0]) for column in range(window[1])]
    index = relative_position_index(window, table_window)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            assert offsets[index[i, j]] == (query[0] - key[0], query[1] - key[1])


def attention_over_the_map(params, tokens, heads, window, shift):
    """Computes window attention as attention over the map with all tokens outside the window masked out, in float64.

    A token moves by -shift around the map. It reads the tokens of its new window whose distance has not changed.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)["params"]
    _, height, width, channels = tokens.shape
    flat = rearrange(np.asarray(tokens, np.float64), "b h w d -> b (h w) d")
    qkv = flat @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    query, key, value = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=heads)

    places = np.array([(y, x) for y in range(height) for x in range(width)])
    moved = (places - shift) % (height, width)
    offset = places[:, None] - places[None]
    seen = (moved[:, None] // window == moved[None] // window).all(-1)
    seen &= (moved[:, None] - moved[None] == offset).all(-1)
    row = (np.clip(offset, 1 - window, window - 1) + window - 1) @ (2 * window - 1, 1)

    scores = query @ key.swapaxes(-1, -2) * (channels // heads) ** -0.5
    scores = np.where(seen, np.exp(scores + np.moveaxis(params["relative_position_bias_table"][row], -1, 0)), 0)
    attended = rearrange(scores / scores.sum(-1, keepdims=True) @ value, "b h l d -> b l (h d)")
    attended = attended @ params["proj"]["kernel"] + params["proj"]["bias"]
    return rearrange(attended, "b (h w) d -> b h w d", h=height)


@pytest.mark.parametrize(
    ("size", "window", "shifted", "shift"),
    [
        ((8, 8), 4, False, 0),
        ((8, 12), 4, True, (2, 2)),
        ((6, 9), 3, True, (1, 1)),
        ((4, 8), 4, True, (0, 2)),  # one window high: no vertical shift
        ((4, 4), 4, True, 0),
        ((2, 2), 4, True, 0),  # smaller than the window
    ],
)
def test_window_attention_is_masked_attention_over_the_map(size, window, shifted, shift):
    attention = WindowAttention(heads=2, window=window, shifted=shifted)
    tokens = jax.random.normal(jax.random.key(0), (2, *size, 8))
    weights = drawn_for(attention, tokens)
    expected = attention_over_the_map(weights, tokens, 2, window, np.array(shift))
    np.testing.assert_allclose(jax.jit(attention.apply)(weights, tokens), expected, atol=1e-5)


def test_a_map_that_does_not_divide_into_windows_is_padded_with_zeros_that_take_part():
    attention = WindowAttention(heads=2, window=4, shifted=True)
    tokens = jax.random.normal(jax.random.key(0), (2, 6, 9, 8))
    weights = drawn_for(attention, tokens)
    apply = jax.jit(attention.apply)
    padded = apply(weights, jnp.pad(tokens, ((0, 0), (0, 2), (0, 3), (0, 0))))
    np.testing.assert_allclose(apply(weights, tokens), padded[:, :6, :9], atol=1e-6)


def test_merging_puts_the_four_neighbours_side_by_side_down_the_column_first():
    tokens = jax.random.normal(jax.random.key(0), (1, 4, 3, 2))
    weights = drawn_for(PatchMerging(), tokens)
    merged = jax.jit(PatchMerging().apply)(weights, tokens)
    assert merged.shape == (1, 2, 2, 4)
    grid = np.pad(np.asarray(tokens)[0], ((0, 0), (0, 1), (0, 0)))
    for y in range(2):
        for x in range(2):
            row = np.concatenate([grid[2 * y + j, 2 * x + i] for i in (0, 1) for j in (0, 1)])
            norm, kernel = weights["params"]["norm"], weights["params"]["reduction"]["kernel"]
            row = (row - row.mean()) / np.sqrt(row.var() + 1e-5) * norm["scale"] + norm["bias"]
            np.testing.assert_allclose(merged[0, y, x], row @ kernel, atol=1e-5)


@pytest.mark.parametrize(("depth", "reaches"), [(1, False), (2, True)])
def test_only_the_shifted_block_carries_content_across_windows(depth, reaches):
    model = TINY.clone(depths=(depth,), heads=(2,))
    frames = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
    weights = drawn_for(model, frames)
    apply = jax.jit(model.apply)
    moved = apply(weights, frames.at[:, :16, :16].add(1))[0] - apply(weights, frames)[0]
    assert np.abs(moved[:, :4, :4]).max() > 1e-3  # the changed window itself
    assert (np.abs(moved[:, 4:, :4]).max() > 1e-3) == reaches


def test_frames_do_not_influence_each_other():
    frames = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
    weights = drawn_for(TINY, frames)
    apply = jax.jit(TINY.apply)
    before, after = apply(weights, frames), apply(weights, frames.at[1].add(1))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])
        assert np.abs(a[1] - b[1]).max() > 1e-3


def test_rematerialisation_changes_no_gradient():
    model = TINY.clone(depths=(1,), heads=(2,))
    frames = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    weights = drawn_for(model, frames)

    def loss(weights, model):
        return (model.apply(weights, frames)[0] ** 2).mean()

    kept, recomputed = (
        jax.jit(jax.grad(loss), static_argnums=1)(weights, model.clone(remat=remat)) for remat in ("", "block")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), kept, recomputed)


def test_linear_fuse_is_project_resize_concatenate_deepest_first_and_mix():
    taps = [jax.random.normal(jax.random.key(n), (2, n, n, 64 // n)) for n in (8, 4, 2)]
    fuse = LinearFuse(width=5)
    weights = drawn_for(fuse, taps)
    params = weights["params"]
    # jax.image.resize enlarges as torch's bilinear interpolation with align_corners=False does.
    resized = [
        jax.image.resize(tap @ linear["kernel"] + linear["bias"], (2, 8, 8, 5), "bilinear")
        for tap, linear in ((tap, params[f"linear_c_{i}"]) for i, tap in enumerate(taps))
    ]
    expected = jnp.concatenate(resized[::-1], axis=-1) @ params["linear_fuse"]
    np.testing.assert_allclose(fuse.apply(weights, taps), expected, atol=1e-4)
