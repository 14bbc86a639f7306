"""Translates between published weights and this project's, by tables that are read in both directions.

A row has a published name, a path in this project and the transform between them. A name is a pattern with fields, as
in `model.layers.{i}.mlp.up_proj.weight`. A field that the path lacks is an axis along which this project stacks
weights, because it scans layers: `layers/mlp/up_proj/kernel` holds all of them.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange

from favchat_jax.errors import UserError

Shape = tuple[int, ...]
Array = np.ndarray
COLOURS = 3
STRIP = 16  # columns transposed at a time


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse; both keep every bit of every value."""

    ours: Callable[[Array], Array]
    published: Callable[[Array], Array]


def _patch_kernel(time: str) -> Transform:
    """Reshapes a convolution [out, colour, row, column] over patches to a matrix [row column colour, out], and back."""
    published = f"out colour {time}row column"

    def unfold(kernel: Array) -> Array:
        side = round((kernel.shape[0] / COLOURS) ** 0.5)
        return rearrange(kernel, f"(row column colour) out -> {published}", row=side, colour=COLOURS)

    return Transform(lambda kernel: rearrange(kernel, f"{published} -> (row column colour) out"), unfold)


TRANSFORMS = {
    "same": Transform(lambda x: x, lambda x: x),
    "transposed": Transform(lambda x: x.T, lambda x: x.T),  # torch keeps a linear layer as [out, in]
    "patches": _patch_kernel(""),  # Conv2d
    "frame patches": _patch_kernel("1 "),  # Conv3d over single frames
    "pointwise": Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),  # 1x1 Conv2d
    "leading axis": Transform(lambda x: x[0], lambda x: x[None]),  # a batch of one
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: published name, path here, name of the transform."""

    published: str
    path: str
    transform: str = "same"


@dataclasses.dataclass(frozen=True)
class Table:
    """Describes the weights of a published source.

    Attributes:
        holds: name of the weights in messages: "Mistral".
        rows: one for each weight.
        ignored: (pattern of published names, why they are not needed).
        optional: (pattern of paths, why a source may lack them); a source has all weights of a pattern, or none.
        hint: likely cause of an unexpected shape, for the error message.
    """

    holds: str
    rows: tuple[Row, ...]
    ignored: tuple[tuple[str, str], ...] = ()
    optional: tuple[tuple[str, str], ...] = ()
    hint: str = "it has another size or is of another kind"


@dataclasses.dataclass(frozen=True)
class Slot:
    """The destination of a published tensor: a path, a place along its stacked axes, and the published shape."""

    path: str
    place: tuple[int, ...]
    transform: Transform
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Account:
    """Sorts every key of a source and every wanted weight under one heading.

    Attributes:
        used: published name -> its destination.
        ignored: published name -> why it is not needed.
        absent: published name -> why the source may lack it.
        missing: published names that the source should have.
        unknown: names of the source that no row and no reason covers.
        misshapen: published name -> (expected shape, found shape).
    """

    used: dict[str, Slot]
    ignored: dict[str, str]
    absent: dict[str, str]
    missing: list[str]
    unknown: list[str]
    misshapen: dict[str, tuple[Shape, Shape]]


def linear(published: str, path: str, bias: bool = True) -> tuple[Row, ...]:
    """Returns the rows of a linear layer."""
    rows = Row(f"{published}.weight", f"{path}/kernel", "transposed"), Row(f"{published}.bias", f"{path}/bias")
    return rows if bias else rows[:1]


def norm(published: str, path: str) -> tuple[Row, ...]:
    """Returns the rows of a layer norm."""
    return Row(f"{published}.weight", f"{path}/scale"), Row(f"{published}.bias", f"{path}/bias")


def prefixed(rows: Iterable[Row], *, published: str = "", path: str = "") -> tuple[Row, ...]:
    """Returns the rows with a prefix before every published name and every path."""
    return tuple(Row(published + row.published, path + row.path, row.transform) for row in rows)


def slots(table: Table, shapes: Mapping[str, Shape]) -> dict[str, Slot]:
    """Returns published name -> slot of all weights in `shapes`.

    Raises:
        ValueError: a path has no row or several.
    """
    patterns = [(_pattern(row.path), row) for row in table.rows]
    found = {}
    for path, shape in shapes.items():
        matches = [(match, row) for pattern, row in patterns if (match := pattern.fullmatch(path))]
        if len(matches) != 1:
            raise ValueError(f"{path} has {len(matches)} rows in the table of {table.holds}, not one")
        (match, row), bound = matches[0], matches[0][0].groupdict()
        stacked = [field for field in re.findall(r"{(\w+)}", row.published) if field not in bound]
        transform = TRANSFORMS[row.transform]
        published = transform.published(np.broadcast_to(np.float32(0), shape[len(stacked) :])).shape
        for place in itertools.product(*map(range, shape[: len(stacked)])):
            fields = {**bound, **dict(zip(stacked, place, strict=True))}
            found[row.published.format(**fields)] = Slot(path, place, transform, published)
    return found


def account(table: Table, tensors: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Account:
    """Sorts every key of `tensors` and every weight of `shapes` under a heading; reads only shapes."""
    wanted = slots(table, shapes)
    used, ignored, unknown, misshapen = {}, {}, [], {}
    for name, tensor in tensors.items():
        if name not in wanted:
            reason = _reason(table.ignored, name)
            ignored.update({name: reason} if reason else {})
            unknown += [] if reason else [name]
        elif tuple(tensor.shape) != wanted[name].shape:
            misshapen[name] = wanted[name].shape, tuple(tensor.shape)
        else:
            used[name] = wanted[name]
    lacking = [name for name in wanted if name not in tensors]
    begun = {_reason(table.optional, wanted[name].path) for name in used}  # parts of which the source has some weight
    reasons = {name: _reason(table.optional, wanted[name].path) for name in lacking}
    absent = {name: reason for name, reason in reasons.items() if reason and reason not in begun}
    missing = [name for name in lacking if name not in absent]
    return Account(used, ignored, absent, missing, unknown, misshapen)


def check(table: Table, found: Account, source: object) -> None:
    """Raises UserError if a key is unknown or missing, or a shape is not as expected."""
    if not found.used and not found.misshapen:
        first = next(iter((*found.unknown, *found.ignored)), "nothing")
        raise UserError(f"{source} holds no weight of {table.holds} (its first is {first}): check the kind of the file")
    if found.unknown:
        others = f", nor are {len(found.unknown) - 1} more" if len(found.unknown) > 1 else ""
        hint = "check that it is an unchanged file of this kind"
        raise UserError(f"{source}: {found.unknown[0]} is not a weight of {table.holds}{others}: {hint}")
    if found.misshapen:
        name, (expected, shape) = next(iter(found.misshapen.items()))
        others = _others(found.misshapen)
        raise UserError(f"{source}: {name} has shape {shape}, expected {expected}{others}: {table.hint}")
    if found.missing:
        missing = sorted(found.missing)
        raise UserError(f"{source} lacks {missing[0]}{_others(missing)}: fetch it again")


def each(
    table: Table,
    tensors: Iterable[tuple[str, Any]],
    shapes: Mapping[str, Shape],
    source: object,
    dtype=np.float32,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Iterator[tuple[str, Array]]:
    """Yields the weights of `shapes` from published tensors, one after another, each read tensor by tensor.

    Args:
        table: names and transforms.
        tensors: published names and arrays; `tensors.open_tensors` gives objects that are read when they are converted.
        shapes: path -> shape of every wanted weight, with layers stacked if their path has no number.
        source: name of the source in messages.
        dtype: of the result, independent of the source's.
        progress: wraps the tensors as they are read, for example `tqdm`.

    Yields:
        Path and array; optional weights that the source lacks are skipped.

    Raises:
        UserError: a key is unknown or missing, a shape is not as expected, or a weight is NaN or infinite.
    """
    by_name = dict(tensors)
    found = account(table, by_name, shapes)
    check(table, found, source)
    in_order = sorted(found.used.items(), key=lambda item: item[1].path)
    for path, group in itertools.groupby(progress(in_order), lambda item: item[1].path):
        weight = np.empty(shapes[path], dtype)
        for name, slot in group:
            _copy(weight[(*slot.place, ...)], slot.transform.ours(finite(by_name[name], name, source)))
        yield path, weight


def read(*of, **options) -> dict[str, Array]:
    """Returns all weights that `each` yields with the same arguments, by path."""
    return dict(each(*of, **options))


def write(table: Table, weights: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """Yields published names and tensors of a flat dictionary of weights; the inverse of `read`, bit for bit.

    Raises:
        ValueError: the table has no row for a weight.
    """
    wanted = slots(table, {path: tuple(leaf.shape) for path, leaf in weights.items()})
    for path, group in itertools.groupby(wanted.items(), lambda item: item[1].path):
        leaf = np.asarray(weights[path])
        for name, slot in group:
            published = slot.transform.published(leaf[slot.place])
            tensor = np.empty(published.shape, published.dtype)
            _copy(tensor, published)
            yield name, tensor


def finite(tensor: Any, name: str, source: object) -> Array:
    """Returns the tensor as an array; raises UserError if one of its values is NaN or infinite."""
    array = np.asarray(tensor)
    if not is_finite(array):
        raise UserError(f"{source}: {name} holds NaN or infinity: fetch it again")
    return array


def is_finite(tensor: Array) -> bool:
    """Returns whether no value is NaN or infinite.

    It compares bit patterns: those of NaN lie above that of infinity, and those of finite numbers below, for each sign.
    Two maxima need no memory and are several times as fast as `np.isfinite`.
    """
    if not tensor.size or not np.issubdtype(tensor.dtype, np.inexact) and tensor.dtype.kind != "V":
        return True
    bits = np.ascontiguousarray(tensor)
    for sign, kind in ((1, "i"), (-1, "u")):
        integer = np.dtype(f"{kind}{tensor.itemsize}")
        if bits.view(integer).max() >= np.array(sign * np.inf, tensor.dtype).view(integer):
            return False
    return True


def _copy(target: Array, source: Array) -> None:
    """Assigns target[...] = source; a transposed matrix in strips that fit into the cache, several times as fast."""
    if source.ndim == 2 and source.flags.f_contiguous:
        for start in range(0, source.shape[1], STRIP):
            target[:, start : start + STRIP] = source[:, start : start + STRIP]
    else:
        target[...] = source


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template)))


def _reason(reasons: Iterable[tuple[str, str]], name: str) -> str | None:
    return next((reason for pattern, reason in reasons if re.fullmatch(pattern, name)), None)


def _others(names) -> str:
    return f" and {len(names) - 1} more weights" if len(names) > 1 else ""
