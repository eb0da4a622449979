"""Helpers of the handlers of ONNX Runtime's own operations."""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.dims import Dim, exact_division
from llmc.compiler.ir.elementwise import Add, Cast, Constant, Rsqrt, Sub, constant
from llmc.compiler.ir.elementwise import Mul as Multiply
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.shapes import axis_of
from llmc.compiler.ir.structural import Broadcast, Mean, Reshape, Slice
from llmc.frontends.onnx.translation import Item, Node, Unsupported

MICROSOFT = "com.microsoft"


def require(condition: bool, message: str) -> None:
    """Unsupported(message) unless the condition holds."""
    if not condition:
        raise Unsupported(message)


def given(item: Item | None) -> Value | None:
    """An optional input's value."""
    return None if item is None else item.value


def refuse_inputs(node: Node, **items: Item | None) -> None:
    """Unsupported where one of these inputs is given."""
    for name, item in items.items():
        require(item is None, f"its input {name} is not supported")


def refuse_attributes(node: Node, **usual: object) -> None:
    """Unsupported where an attribute differs from the only value of it that is supported."""
    for name, value in usual.items():
        found = node.get(name, value)
        require(found == value, f"{name}={found} is not supported, only {value}")


def in_dtype(x: Value, dtype: str) -> Value:
    """The value, cast where it has another dtype."""
    return x if x.dtype == dtype else Cast(x, dtype)


def sum_of(*values: Value | None) -> Value:
    """The sum of those that are given, in the first one's dtype."""
    first, *rest = [value for value in values if value is not None]
    for value in rest:
        first = Add(first, in_dtype(value, first.dtype))
    return first


def scaled(x: Value, factor: float) -> Value:
    """x * factor."""
    return x if factor == 1 else Multiply(x, constant(factor, x.dtype))


def split(size: int | Dim, parts: int | Dim, what: str) -> int | Dim:
    """size / parts; Unsupported where that is no whole size."""
    quotient = exact_division(size, parts)
    require(quotient is not None, f"{what}: {size} does not split into {parts} parts")
    assert quotient is not None
    return quotient


def known(size: int | Dim, what: str) -> int:
    """A size that must be a number."""
    require(isinstance(size, int), f"{what} must be known when compiling, not {size}")
    assert isinstance(size, int)
    return size


def part(x: Value, axis: int, start: int | Dim, stop: int | Dim) -> Value:
    """Elements start .. stop - 1 along an axis."""
    axis = axis_of(axis, x.rank)
    return x if (start, stop) == (0, x.shape[axis]) else Slice(x, axis, start, stop)


def all_ones(x: Value) -> bool:
    """Whether a tensor is ones only, as far as its form says: what stands for a mask that hides nothing."""
    while isinstance(x, (Broadcast, Reshape, Cast)):
        x = x.x
    return isinstance(x, Constant) and bool(np.all(x.value.array == 1))


def statistics(x: Value, eps: float, centred: bool) -> tuple[Value, Value]:
    """The mean and 1 / deviation of rows, f32 [..., 1]; not centred: around 0."""
    wide, axes = in_dtype(x, "f32"), (x.rank - 1,)
    mean: Value = Mean(wide, axes)
    apart = Sub(wide, mean) if centred else wide
    return mean, Rsqrt(Add(Mean(Multiply(apart, apart), axes), constant(eps, "f32")))
