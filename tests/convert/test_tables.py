"""Every table works in both directions: no bit changes, no weight is missing, and published names and layouts hold."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from favchat_jax.checkpoints import mistral_folder as mistral
from favchat_jax.checkpoints.table import TRANSFORMS, Row, Table, account, is_finite, read, slots, write
from favchat_jax.config import ABLATIONS, VARIANTS
from favchat_jax.convert import facexformer, favchat, lora, qformer, umt, videochat2
from favchat_jax.errors import UserError
from favchat_jax.models.facexformer import FaceXFormerEncoder, LinearFuse
from favchat_jax.models.favchat import build
from favchat_jax.models.mistral import LoRA
from favchat_jax.models.qformer import QFormer
from favchat_jax.models.umt import UMT
from tests.models.tiny_parts import MISTRAL, favchat_shapes, tiny_config

TINY_UMT = UMT(width=8, depth=3, layers_run=2, heads=2, patch=4)
TINY_SWIN = FaceXFormerEncoder(width=4, depths=(1, 2, 1, 1), heads=(1, 1, 2, 2), window=2)
TINY_QFORMER = QFormer(width=8, depth=3, heads=2, mlp=12, queries=2, extra_queries=3, vocabulary=11, positions=5)
TINY_LORA = LoRA(rank=2)


def visual_shapes(variant, ablation):
    """Returns the shapes of all FaVChat weights except the language model's."""
    config = tiny_config(f"variant={variant},ablation={ablation}")
    model = build(config.model, MISTRAL, variant=variant, ablation=ablation, lora_rank=2)
    shapes = favchat_shapes(model, config.model.frames, config.model.image_size)
    return {path: leaf.shape for path, leaf in shapes.items() if not path.startswith("llm/")}


CASES = {
    "mistral": (mistral.TABLE, mistral.weight_shapes(MISTRAL)),
    "umt": (umt.TABLE, umt.weight_shapes(TINY_UMT)),
    "facexformer": (facexformer.TABLE, facexformer.weight_shapes(TINY_SWIN, LinearFuse(width=3))),
    "qformer": (qformer.TABLE, qformer.weight_shapes(TINY_QFORMER, visual=6)),
    "lora": (lora.TABLE, lora.weight_shapes(MISTRAL, TINY_LORA)),
    "videochat2": (videochat2.TABLE, videochat2.weight_shapes(TINY_UMT, TINY_QFORMER, MISTRAL, TINY_LORA)),
    **{
        f"favchat {variant} {ablation}": (favchat.TABLE, visual_shapes(variant, ablation))
        for variant in VARIANTS
        for ablation in ABLATIONS
    },
}


def weights_for(shapes, dtype=np.float32):
    """Draws random weights that use all bits."""
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(shape).astype(dtype) for path, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_weights_keep_their_bits_when_written_under_published_names_and_read_again(case, dtype):
    table, shapes = CASES[case]
    weights = weights_for(shapes, dtype)
    again = read(table, write(table, weights), shapes, case, dtype)
    assert again.keys() == weights.keys()
    assert all(again[path].tobytes() == leaf.tobytes() and again[path].dtype == dtype for path, leaf in weights.items())


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_written_once_as_published_tensors(case):
    table, shapes = CASES[case]
    written = list(write(table, weights_for(shapes)))
    assert len({name for name, _ in written}) == len(written) == len(slots(table, shapes))
    assert sum(tensor.size for _, tensor in written) == sum(int(np.prod(shape)) for shape in shapes.values())
    assert all(tensor.flags.c_contiguous for _, tensor in written)


def test_patch_kernels_are_ordered_by_row_column_and_colour():
    published = np.arange(2 * 3 * 1 * 2 * 2).reshape(2, 3, 1, 2, 2)
    ours = TRANSFORMS["frame patches"].ours(published)
    for out, colour, row, column in np.ndindex(2, 3, 2, 2):
        assert ours[(row * 2 + column) * 3 + colour, out] == published[out, colour, 0, row, column]
    np.testing.assert_array_equal(TRANSFORMS["patches"].ours(published[:, :, 0]), ours)


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [(value, dtype) for value in (np.nan, -np.nan, np.inf, -np.inf) for dtype in ("f2", "f4", "f8", jnp.bfloat16)],
)
def test_nan_and_infinity_of_either_sign_are_distinguished_from_finite_numbers(bad, dtype):
    largest = ml_dtypes.finfo(dtype).max
    numbers = np.array([0, -0.0, 1, -1, largest, -largest], dtype)
    assert is_finite(numbers) and is_finite(numbers[:0]) and is_finite(np.arange(3)) and is_finite(numbers[0])
    numbers[3] = bad
    assert not is_finite(numbers)


TABLE = Table(
    "Thing",
    (Row("a.{i}.w", "a/w", "transposed"), Row("b", "b"), Row("c.{i}", "c_{i}"), Row("d", "d")),
    ignored=((r"old\..*", "no longer used"),),
    optional=((r"c_\d", "the c branch"),),
)
SHAPES = {"a/w": (2, 3, 4), "b": (5,), "c_0": (1,), "c_1": (1,)}


@pytest.fixture
def tensors():
    return dict(write(TABLE, weights_for(SHAPES)))


def test_every_key_and_every_weight_is_accounted_for_once(tensors):
    del tensors["c.0"], tensors["c.1"]
    found = account(TABLE, {**tensors, "old.x": np.ones(1), "z": np.ones(1), "b": np.ones(4)}, SHAPES)
    assert list(found.used) == ["a.0.w", "a.1.w"]
    assert found.ignored == {"old.x": "no longer used"}
    assert found.absent == {"c.0": "the c branch", "c.1": "the c branch"}
    assert (found.missing, found.unknown, found.misshapen) == ([], ["z"], {"b": ((5,), (4,))})


def test_an_optional_part_may_be_absent_but_not_incomplete(tensors):
    del tensors["c.0"]
    with pytest.raises(UserError, match=r"file lacks c\.0: fetch it again"):
        read(TABLE, tensors.items(), SHAPES, "file")
    del tensors["c.1"]
    assert read(TABLE, tensors.items(), SHAPES, "file").keys() == {"a/w", "b"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"z": np.ones(1)}, r"file: z is not a weight of Thing: check that"),
        ({"d": np.ones(1)}, r"file: d is not a weight of Thing: check that"),
        ({"a.2.w": np.ones((4, 3))}, r"file: a\.2\.w is not a weight of Thing"),
        ({"a.1.w": np.ones((3, 4))}, r"file: a\.1\.w has shape \(3, 4\), expected \(4, 3\): "),
        ({"b": np.full(5, np.nan)}, r"file: b holds NaN or infinity"),
    ],
)
def test_the_problem_of_a_tensor_is_named(change, says, tensors):
    with pytest.raises(UserError, match=says):
        read(TABLE, (tensors | change).items(), SHAPES, "file")


def test_a_source_of_another_kind_is_reported_as_such():
    with pytest.raises(UserError, match=r"file holds no weight of Thing \(its first is x\): check the kind"):
        read(TABLE, [("x", np.ones(1))], SHAPES, "file")
    with pytest.raises(UserError, match=r"its first is nothing"):
        read(TABLE, [], SHAPES, "file")


def test_a_weight_without_a_row_in_the_table_is_an_error():
    with pytest.raises(ValueError, match="e/w has 0 rows in the table of Thing"):
        list(write(TABLE, {"e/w": np.ones(1)}))
