"""Counts the operations of a program before it is compiled, from its jaxpr.

XLA's own count includes a loop's body only once, and some backends have no count.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from favchat_jax.models.kernels.attention import SCOPE


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of matrices (`dot_general`).

    Attributes:
        flops: its operations; a multiplication and an addition count as two.
        bytes: bytes of its operands and its result, each moved once; 0 in attention, whose scores can stay on the chip.
            A kernel that is only widened for the product moves in its stored width.
        times: how often it runs.
    """

    flops: float
    bytes: float
    times: int


# Operations between a stored kernel and its product, which the compiler fuses into the product.
FUSED = ("convert_element_type", "transpose", "reshape", "broadcast_in_dim", "squeeze", "mul", "optimization_barrier")


def products(
    jaxpr: Jaxpr | ClosedJaxpr, times: int = 1, fused: bool = False, stored: Sequence[float] = ()
) -> Iterator[Product]:
    """Yields all products of a program, counting iterations of loops and only the costliest branch of a condition.

    Args:
        jaxpr: the program with plain attention, since a custom kernel hides its products.
        times: how often the program runs.
        fused: whether the program is a part of attention.
        stored: bytes of each argument's elements as they are stored; by default those of its dtype.
    """
    program = getattr(jaxpr, "jaxpr", jaxpr)
    widths = dict(zip(program.invars, stored, strict=True)) if stored else {}

    def width(variable: Any) -> float:
        known = None if isinstance(variable, Literal) else widths.get(variable)
        return known or {"int4": 0.5}.get(variable.aval.dtype.name) or getattr(variable.aval.dtype, "itemsize", 0)

    for equation in program.eqns:
        name, inner = equation.primitive.name, list(_inner(equation))
        given = [width(variable) for variable in equation.invars]
        if name in FUSED:
            for made in equation.outvars:
                alike = [w for w, v in zip(given, equation.invars, strict=True) if v.aval.size == made.aval.size]
                widths[made] = min([*alike, width(made)])
        within = fused or SCOPE in str(equation.source_info.name_stack)
        if name == "dot_general":
            yield _product(equation, times, within, [*given, width(equation.outvars[0])])
        elif name == "cond":
            branches = [list(products(branch, times, within)) for branch in inner]
            yield from max(branches, key=lambda branch: sum(p.flops * p.times for p in branch))
        elif name == "while" and any(True for body in inner for _ in products(body)):
            raise ValueError("a loop of unknown length holds a product: its work cannot be counted")
        else:
            length = equation.params["length"] if name == "scan" else 1
            for body in inner:
                known = given if len(getattr(body, "jaxpr", body).invars) == len(given) else ()
                yield from products(body, times * length, within, known)


def total_flops(program: Iterable[Product]) -> float:
    """Returns the number of operations of all products of a program."""
    return sum(product.flops * product.times for product in program)


def roofline_seconds(program: Iterable[Product], devices: int, flops: float, bandwidth: float) -> float:
    """Returns a lower bound of a program's time: each product is limited by its operations or its memory traffic.

    All other operations count as fused into the products.

    Args:
        program: its products, of all devices together.
        devices: number of devices that share each product evenly.
        flops: operations per second of a device.
        bandwidth: bytes per second of a device.
    """
    return sum(p.times * max(p.flops / flops, p.bytes / bandwidth) for p in program) / devices


def saved_bytes(jaxpr: ClosedJaxpr, weights: set[tuple[int, ...]]) -> int:
    """Returns the bytes of a program's results that are neither arguments nor shaped like weights or stacks of them.

    For a forward pass that returns the inputs of its backward pass, these are the activations.
    """
    given = set(jaxpr.jaxpr.invars) | set(jaxpr.jaxpr.constvars)
    kept = {v for v in jaxpr.jaxpr.outvars if not isinstance(v, Literal) and v not in given}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept if not {v.aval.shape, v.aval.shape[1:]} & weights)


def _inner(equation: Any) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in equation.params.values():
        yield from (v for v in jax.tree.leaves(value, is_leaf=_is_jaxpr) if _is_jaxpr(v))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _product(equation: Any, times: int, fused: bool, widths: Sequence[float]) -> Product:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, right, result = (*(v.aval for v in equation.invars), equation.outvars[0].aval)
    length = math.prod(left.shape[axis] for axis in contracted)
    moved = sum(array.size * width for array, width in zip((left, right, result), widths, strict=True))
    return Product(2.0 * result.size * length, 0 if fused else moved, times)
