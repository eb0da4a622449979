"""What the passes share: scalars and vectors seen through casts and shapes, exact casts, rebuilding a graph."""

from __future__ import annotations

from collections.abc import Callable

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Cast, Constant, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.pattern import Number as Number
from llmc.compiler.ir.pattern import number_of as number_of
from llmc.compiler.ir.structural import Broadcast, Reshape, Transpose
from llmc.compiler.ir.types import FLOATS, Shape

# For each dtype, those that hold every one of its values.
_WIDER: dict[str, tuple[str, ...]] = {
    "bool": ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"),
    "u8": ("u16", "u32", "u64", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"),
    "u16": ("u32", "u64", "i32", "i64", "f32", "f64"),
    "u32": ("u64", "i64", "f64"),
    "u64": (),
    "i8": ("i16", "i32", "i64", "f16", "bf16", "f32", "f64"),
    "i16": ("i32", "i64", "f32", "f64"),
    "i32": ("i64", "f64"),
    "i64": (),
    "f16": ("f32", "f64"),
    "bf16": ("f32", "f64"),
    "f32": ("f64",),
    "f64": (),
}


def holds(wide: str, narrow: str) -> bool:
    """Whether dtype `wide` represents every value of dtype `narrow`."""
    return wide == narrow or wide in _WIDER[narrow]


def widens(value: Value) -> bool:
    """Whether this is a cast from one float dtype to another that loses nothing."""
    return isinstance(value, Cast) and value.x.dtype in FLOATS and value.to in FLOATS and holds(value.to, value.x.dtype)


def uncast(value: Value) -> Value:
    """The value under any lossless float casts."""
    while isinstance(value, Cast) and widens(value):
        value = value.x
    return value


def is_number(value: Value, expected: float, tolerance: float = 1e-6) -> bool:
    """Whether a value is this number everywhere, to a relative tolerance that forgives rounding to f32."""
    number = number_of(value)
    return number is not None and abs(number - expected) <= tolerance * abs(expected)


def number(value: Number, like: Value) -> Constant:
    """A rank-0 constant with the dtype of `like`."""
    return constant(value, like.dtype)


def shaped(value: Value, shape: Shape) -> Value:
    """`value` broadcast to `shape`, itself where it has that shape already."""
    return value if value.shape == shape else Broadcast(value, shape)


def vector_of(value: Value, size: object) -> Value | None:
    """The [size] vector under lossless casts that `value` holds along its last axis, and only there; None if none is.

    The vector has the dtype in which it is stored, which may be narrower than that of `value`.
    """
    value = uncast(value)
    while isinstance(value, (Reshape, Broadcast)) and value.shape[-1:] == value.x.shape[-1:] == (size,):
        value = uncast(value.x)
    if value.shape[-1:] != (size,) or product(value.shape) != size:
        return None
    return value if value.rank == 1 else Reshape(value, (value.shape[-1],))


def transposed(matrix: Value) -> Value:
    """The transpose of a rank-2 value, cancelling a transpose and passing under lossless casts."""
    inner = uncast(matrix)
    if isinstance(inner, Transpose) and inner.permutation == (1, 0):
        return uncast(inner.x)
    return Transpose(inner, (1, 0))


Renewed = Callable[[Value], Value]
Build = Callable[[Op, Renewed], Value | None]


def rebuild(graph: Graph, build: Build) -> Graph:
    """The graph op by op, operands first: `build` gives what stands for an original op, or None to keep it.

    `build` gets the op as it was and a function from values of the original graph, or written over them, to the same
    over the new graph. It must use only values that come before the op.
    """
    new: dict[Value, Value] = {}

    def renewed(value: Value) -> Value:
        if value in new or not isinstance(value, Op):
            return new.get(value, value)
        new[value] = value.map_operands(renewed)
        return new[value]

    changed = False
    for op in graph.ops:
        replacement = build(op, renewed)
        result = op.map_operands(renewed) if replacement is None else replacement
        changed |= result is not op
        new[op] = result
        new.setdefault(result, result)
    if not changed:
        return graph
    return graph.replace_outputs((name, new.get(value, value)) for name, value in graph.outputs)


Uses = Callable[[Value], int]
CountingRule = Callable[[Op, Uses], Value | None]


def rewrite_counting(graph: Graph, rule: CountingRule) -> Graph:
    """`rewrite`, for rules that must know how often a value is used before they absorb it.

    Ops that depend on params and constants only are left alone, so that membership in `graph.constants` stays true of
    the operands that a rule sees. `uses(value)` counts the uses, in the graph as it was, of what `value` now stands for
    (an output counts as one).
    """
    count: dict[Value, int] = {}
    for op in graph.ops:
        for operand in op.operands:
            count[operand] = count.get(operand, 0) + 1
    for _, value in graph.outputs:
        count[value] = count.get(value, 0) + 1

    def uses(value: Value) -> int:
        return count.get(value, 0)

    def build(op: Op, renewed: Renewed) -> Value:
        if op in graph.constants:
            return op
        rebuilt = op.map_operands(renewed)
        replacement = rule(rebuilt, uses)
        result = rebuilt if replacement is None else replacement
        if result is not op:
            # Several old values may come to be one new value: its uses are the sum.
            count[result] = count.get(result, 0) + count.get(op, 0)
        return result

    return rebuild(graph, build)
