"""Helpers of the handlers of ONNX ops: known sizes, attributes that became inputs, casts, flips, index arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, bounds, exact_division, known_at_most, product
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.ranges import Ranges
from llmc.compiler.ir.shapes import axis_of, broadcast_shapes, require_equal
from llmc.compiler.ir.types import FLOATS, INTEGERS, NUMPY_DTYPES, Shape
from llmc.errors import DimError
from llmc.frontends.onnx.translation import Item, MayNotFit, Node, SizeUnknown, Unsupported

# onnx.TensorProto.DataType: the number in a file, and the IR's name of it.
DTYPES: dict[int, str] = {
    1: "f32",
    2: "u8",
    3: "i8",
    4: "u16",
    5: "i16",
    6: "i32",
    7: "i64",
    9: "bool",
    10: "f16",
    11: "f64",
    12: "u32",
    13: "u64",
    16: "bf16",
}
# The others have no counterpart in the IR.
OTHER_DTYPES: dict[int, str] = {
    8: "string",
    14: "complex64",
    15: "complex128",
    17: "float8e4m3fn",
    18: "float8e4m3fnuz",
    19: "float8e5m2",
    20: "float8e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4e2m1",
    24: "float8e8m0",
    25: "uint2",
    26: "int2",
}


def dtype_named(number: int) -> str:
    """The IR dtype of a TensorProto.DataType; Unsupported names one that the IR has not."""
    if number not in DTYPES:
        raise Unsupported(f"the data type {OTHER_DTYPES.get(number, number)} is not supported")
    return DTYPES[number]


def known(item: Item, what: str) -> list[Any]:
    """The elements of an item, flat: numbers and sizes. SizeUnknown where they are not known when compiling."""
    if item.known is None:
        raise SizeUnknown(f"{what} must be known when compiling")
    return list(item.known.flat)


def numbers(item: Item, what: str) -> NDArray[Any]:
    """The elements of an item as numbers; SizeUnknown where they are not."""
    if item.numbers is None:
        raise SizeUnknown(f"{what} must be known numbers when compiling")
    return item.numbers


def integers(item: Item, what: str) -> list[int]:
    """The elements of an item, flat, as Python ints."""
    return [int(x) for x in numbers(item, what).flat]


def settled(node: Node, name: str, item: Item | None = None) -> list[Any] | None:
    """What older opsets give as an attribute and newer ones as an input: known elements, or None where left out."""
    if item is not None:
        return known(item, f"the input {name!r}")
    value = node.get(name)
    if value is None:
        return None
    return [value] if isinstance(value, (int, float)) else list(value)


def axes_of(node: Node, rank: int, item: Item | None = None) -> tuple[int, ...] | None:
    """The axes that an op is given, by attribute or input, sorted, none negative; None where it is given none.

    An axis that is named twice counts once, as in onnxruntime.
    """
    given = settled(node, "axes", item)
    return None if given is None else tuple(sorted({axis_of(int(axis), rank) for axis in given}))


HALVES = ("f16", "bf16")


def cast(value: Value, dtype: str) -> Value:
    """The value in a dtype."""
    return value if value.dtype == dtype else e.Cast(value, dtype)


def like(number: object, value: Value) -> Value:
    """A scalar constant of the value's dtype."""
    return e.constant(number, value.dtype)


def reshape(value: Value, shape: Sequence[int | Dim]) -> Value:
    """The value in a shape."""
    return value if value.shape == tuple(shape) else s.Reshape(value, tuple(shape))


def broadcast(value: Value, shape: Sequence[int | Dim]) -> Value:
    """The value repeated to a shape."""
    return value if value.shape == tuple(shape) else s.Broadcast(value, tuple(shape))


def transpose(value: Value, permutation: Sequence[int]) -> Value:
    """The value's axes permuted."""
    return value if list(permutation) == list(range(value.rank)) else s.Transpose(value, tuple(permutation))


def unsqueeze(value: Value, *axes: int) -> Value:
    """Axes of size 1 put in, counted in the result."""
    rank = value.rank + len(axes)
    at = {axis_of(axis, rank) for axis in axes}
    rest = iter(value.shape)
    return reshape(value, [1 if i in at else next(rest) for i in range(rank)])


def squeeze(value: Value, *axes: int) -> Value:
    """Axes of size 1 taken out."""
    at = {axis_of(axis, value.rank) for axis in axes}
    for axis in at:
        said = f"axis {axis} of {list(value.shape)} is squeezed, and its size is not 1"
        require_equal(said, (value.shape[axis], 1))
    return reshape(value, [dim for i, dim in enumerate(value.shape) if i not in at])


def move_axis(value: Value, source: int, target: int) -> Value:
    """One axis moved, the others in their order."""
    order = [axis for axis in range(value.rank) if axis != axis_of(source, value.rank)]
    order.insert(axis_of(target, value.rank), axis_of(source, value.rank))
    return transpose(value, order)


def cut(value: Value, axis: int, start: int | Dim, stop: int | Dim, step: int = 1) -> Value:
    """Elements start, start + step, ... below stop of an axis."""
    if start == 0 and stop == value.shape[axis] and step == 1:
        return value
    return s.Slice(value, axis, start, stop, step)


def concat(values: Sequence[Value], axis: int) -> Value:
    """Values one after another; one alone is itself."""
    first, *rest = values
    return s.Concat((first, *rest), axis) if rest else first


def iota(size: int | Dim, dtype: str = "i64") -> Value:
    """0, 1, ..., size - 1 in a dtype; a constant where the size is a number."""
    if isinstance(size, int) and size <= 4096:
        return e.constant(np.arange(size).astype(NUMPY_DTYPES[dtype]), dtype)
    return s.Iota(size, dtype)


def along(value: Value, axis: int, rank: int) -> Value:
    """A vector as a tensor of a rank that varies along one axis only."""
    (size,) = value.shape
    axis = axis_of(axis, rank)
    return reshape(value, [size if i == axis else 1 for i in range(rank)])


def flip(value: Value, axis: int) -> Value:
    """An axis in reverse order."""
    axis = axis_of(axis, value.rank)
    size = value.shape[axis]
    return s.Gather(value, e.Sub(size_scalar(size - 1), iota(size)), axis)


def size_scalar(size: int | Dim, dtype: str = "i64") -> Value:
    """A size as a tensor of rank 0."""
    return cast(reshape(Item(known=np.array([size], object)).value, ()), dtype)


def at_most(a: int | Dim, b: int | Dim) -> bool | None:
    """Whether a <= b for every size; None where that depends on the size."""
    try:
        return known_at_most(a, b)
    except DimError:
        return None


def require_room(room: int | Dim, message: str) -> None:
    """`MayNotFit(message)` unless `room` is never negative; where it is for some sizes, no program could run those."""
    if at_most(0, room) is not True:
        raise MayNotFit(message, room) if isinstance(room, Dim) else Unsupported(message)


def smaller(a: int | Dim, b: int | Dim) -> int | Dim:
    """min(a, b); Unsupported where it depends on the size which one it is."""
    return _chosen(a, b, at_most(a, b), at_most(b, a), "smaller")


def larger(a: int | Dim, b: int | Dim) -> int | Dim:
    """max(a, b); Unsupported where it depends on the size which one it is."""
    return _chosen(a, b, at_most(b, a), at_most(a, b), "larger")


def _chosen(a: int | Dim, b: int | Dim, first: bool | None, second: bool | None, word: str) -> int | Dim:
    if first:
        return a
    if second:
        return b
    raise SizeUnknown(f"the {word} one of the sizes {a} and {b} depends on the input")


def is_negative(size: int | Dim) -> bool:
    """Whether a size stands below zero, as one that counts from the end does."""
    low, high = bounds(size)
    if low >= 0:
        return False
    if high is not None and high < 0:
        return True
    raise SizeUnknown(f"whether {size} is negative depends on the input")


def broadcast_of(*values: Value | Item) -> Shape:
    """The shape that some values broadcast to."""
    return broadcast_shapes(*(value.shape for value in values))


def divided(total: Sequence[int | Dim], by: Sequence[int | Dim]) -> int | Dim:
    """product(total) / product(by), where that is a whole size: equal sizes cancel before anything is multiplied."""
    above, below = list(total), []
    for dim in by:
        if dim in above:
            above.remove(dim)
        else:
            below.append(dim)
    if any(dim == 0 for dim in below):
        raise Unsupported(f"a size cannot be inferred from {list(total)} over {list(by)}")
    found: int | Dim | None = product(tuple(above))
    for dim in sorted(below, key=lambda dim: isinstance(dim, int)):  # sizes first: they are single monomials
        found = exact_division(found, dim) if found is not None else None
    if found is None:
        raise Unsupported(f"{list(total)} elements do not split evenly over {list(by)}")
    return found


def from_start(index: Value, size: int | Dim) -> Value:
    """Indices into an axis with negative ones counted from its end, as i64 that are none."""
    index = cast(index, "i64")
    return e.Where(e.Less(index, like(0, index)), e.Add(index, size_scalar(size)), index)


def checked(index: Value, size: int | Dim, what: str) -> Value:
    """Indices into an axis as i64 from 0 to size - 1; others than those, and those from its end, are errors.

    `what` the axis is, for the message. An index of several axes needs this: out of one axis it may be a place of
    another row.
    """
    if isinstance(index, e.Constant) and isinstance(size, int):
        array = index.value.array
        wrong = array[(array < -size) | (array >= size)]
        if wrong.size:
            raise Unsupported(f"index {int(wrong[0])} is out of range: {what} has {size} elements")
        return from_start(index, size)
    if Ranges({}).integers(index).within(0, size - 1):
        return cast(index, "i64")
    return cast(s.CheckedIndex(index, None, size, what), "i64")


def lowest(dtype: str) -> float | int:
    """The least value of a dtype of numbers: minus infinity for floats."""
    return -math.inf if dtype in FLOATS else int(np.iinfo(NUMPY_DTYPES[dtype]).min)


def highest(dtype: str) -> float | int:
    """The greatest value of a dtype of numbers: infinity for floats."""
    return math.inf if dtype in FLOATS else int(np.iinfo(NUMPY_DTYPES[dtype]).max)


def require_floats(value: Value) -> None:
    if value.dtype not in FLOATS:
        raise Unsupported(f"needs floats, not {value.dtype}")


def is_integer(value: Value) -> bool:
    return value.dtype in INTEGERS
