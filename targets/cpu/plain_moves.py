"""Plain kernels that move elements: transposes, slices, gathers and the like, and elementwise ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Op
from llmc.targets.cpu import builder as b
from llmc.targets.cpu.plain_builder import Form, Index, Plain, PlainRanges, elements, register
from llmc.targets.cpu.plain_functions import ACTIVATIONS, ELEMENTWISE, let, maximum, minimum, plus, times

if TYPE_CHECKING:
    from tvm.tirx import Expr


def _elementwise(kind: type[Op], function: Callable[..., Expr]) -> None:
    @elements(kind)
    def value(k: Plain, index: Index) -> Expr:
        return function(*(let(k.load_broadcast(operand, index)) for operand in range(len(k.operands))))


for _kind, _function in ELEMENTWISE.items():
    _elementwise(_kind, _function)


@elements(e.Activation)
def _activation(k: Plain, index: Index) -> Expr:
    return ACTIVATIONS[str(k.attributes["kind"])](let(k.load(0, index)))


@elements(s.Iota)
def _iota(k: Plain, index: Index) -> Expr:
    return index[0]


@elements(s.Transpose)
def _transpose(k: Plain, index: Index) -> Expr:
    source: list[Expr] = [b.index(0)] * len(index)
    for position, axis in enumerate(k.integers("permutation")):
        source[axis] = index[position]
    return k.load(0, source)


@elements(s.Broadcast)
def _broadcast(k: Plain, index: Index) -> Expr:
    return k.load_broadcast(0, index)


@elements(s.Slice)
def _slice(k: Plain, index: Index) -> Expr:
    """[outer, size, inner] or [outer, size], cut along axis 1."""
    outer, place, *inner = index
    return k.load(0, [outer, k.size("start") + place * k.integer("step"), *inner])


@elements(s.Pad)
def _pad(k: Plain, index: Index) -> Expr:
    from tvm import tirx

    source = [i - before for i, before in zip(index, k.integers("low"), strict=True)]
    inside = tirx.const(True, "bool")
    for axis, i in enumerate(source):
        if k.shape[axis] != k.operands[0][1][axis]:
            inside = tirx.And(inside, tirx.And(i >= 0, i < k.extent(0, axis)))
    value = k.attributes["value"]
    assert isinstance(value, (int, float))
    padding = tirx.const(value if k.wide().startswith("float") else int(value), k.wide())
    return tirx.if_then_else(inside, k.load(0, source), padding)


@elements(s.Gather)
def _gather(k: Plain, index: Index) -> Expr:
    """[outer, size, inner] or [outer, size] by indices [count] along axis 1."""
    outer, place, *inner = index
    return k.load(0, [outer, k.wrapped(k.load(1, [place]), k.extent(0, 1)), *inner])


@elements(s.GatherElements)
def _gather_elements(k: Plain, index: Index) -> Expr:
    axis = k.integer("axis")
    chosen = k.wrapped(k.load(1, index), k.extent(0, axis))
    return k.load(0, [*index[:axis], chosen, *index[axis + 1 :]])


def _concat(k: Plain, begin: Expr, end: Expr) -> None:
    """Operands [outer, size_i], copied one after another."""
    with b.loop(end - begin) as step:
        row = b.let(begin + step)
        start: Expr = b.index(0)
        for operand in range(len(k.operands)):
            size = k.extent(operand, 1)
            with b.loop(size) as column:
                k.store([row, start + column], k.load(operand, [row, column]))
            start = start + size


register(Form(lambda merged, _: merged.shape[0], lambda merged: merged.shape[1], _concat), s.Concat)


_COMBINE: dict[str, Callable[[Expr, Expr], Expr]] = {
    "none": lambda old, new: new,
    "add": plus,
    "mul": times,
    "max": maximum,
    "min": minimum,
}


def _scatter(k: Plain, begin: Expr, end: Expr) -> None:
    """x [rows, inner], indices [count], updates [count, inner]: a range of rows takes the updates that are for it."""
    from tvm import tirx

    combine = _COMBINE[str(k.attributes["reduction"])]
    inner = k.extents[1]
    with b.loop(end - begin) as step, b.loop(inner) as column:
        k.store([begin + step, column], k.load(0, [begin + step, column]))
    with b.loop(k.extent(1, 0)) as count:
        row = b.let(k.load(1, [count]).astype("int64"))
        with b.when(tirx.And(row >= begin, row < end)), b.loop(inner) as column:
            k.store([row, column], combine(let(k.stored([row, column])), let(k.load(2, [count, column]))))


register(
    Form(lambda merged, _: merged.shape[0], lambda merged: merged.shape[1], _scatter, lambda merged: PlainRanges),
    s.Scatter,
)
