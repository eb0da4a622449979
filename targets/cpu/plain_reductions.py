"""Plain kernels that combine elements: reductions, running sums, softmax, order, matrix products.

Sums along rows have some running totals (`PlainSums.lanes`), sums across rows a strip of them (`PlainStrips.columns`):
both vectorise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, product
from llmc.targets.cpu import builder as b
from llmc.targets.cpu.plain_builder import (
    FORMS,
    Form,
    Index,
    MergedOp,
    Plain,
    PlainStrips,
    PlainSums,
    PlainTemplate,
    columns_of,
    elements,
    highest,
    lines,
    lowest,
    nest,
    register,
    repeat,
    strips,
)
from llmc.targets.cpu.plain_functions import (
    dtype_of,
    is_float,
    is_nan,
    let,
    libm,
    maximum,
    minimum,
    plus,
    times,
)
from llmc.targets.cpu.vectors import divide, store

if TYPE_CHECKING:
    from tvm.tirx import Expr

Fold = Callable[["Expr", "Expr"], "Expr"]


def _fold(k: Plain) -> tuple[str, Expr, Fold]:
    """The TIR dtype of a reduction's total, its start, and how an element joins it."""
    from tvm import tirx

    dtype = k.wide()
    total = dtype if dtype.startswith("float") else "uint64" if dtype.startswith("u") else "int64"
    kind = k.attributes["op"]
    if kind in ("t.sum", "t.mean"):
        return total, tirx.const(0, total), plus
    if kind == "t.prod":
        return total, tirx.const(1, total), times
    if kind in ("t.max", "t.any"):
        return dtype, tirx.const(0, dtype) if k.operands[0][0] == "bool" else lowest(dtype), maximum
    return dtype, tirx.const(1, dtype) if k.operands[0][0] == "bool" else highest(dtype), minimum


def _finish(k: Plain, total: Expr) -> Expr:
    """The result of a total: a mean divides."""
    if k.attributes["op"] != "t.mean":
        return total
    count: Expr = b.index(1)
    for axis in k.integers("axes"):
        count = count * k.extent(0, axis)
    dtype = dtype_of(total) if is_float(total) else "float64"
    hidden = b.Scalar("int64", count).get()  # TVM refuses to divide by a constant 0
    return total.astype(dtype) / hidden.astype(dtype)


def _outer_index(k: Plain, kept: Sequence[Expr], reduced: Sequence[Expr]) -> list[Expr]:
    """The operand's index from those of the axes that stay and of those that go."""
    axes, stay, go = k.integers("axes"), iter(kept), iter(reduced)
    return [next(go) if axis in axes else next(stay) for axis in range(len(k.operands[0][1]))]


def _along_row(k: Plain, index: Index) -> Expr:
    """One result where the last axis goes: some totals side by side, then combined."""
    dtype, start, fold = _fold(k)
    *axes, last = k.integers("axes")
    size = k.extent(0, last)
    assert isinstance(k.template, PlainSums)
    lanes = k.template.lanes
    totals = b.scratch(lanes, dtype)
    with b.loop(lanes) as lane:
        store(totals, lane, start)

    def row(outer: list[Expr]) -> None:
        def join(lane: Expr, place: Expr) -> None:
            x = let(k.load(0, _outer_index(k, index, [*outer, place])).astype(dtype))
            store(totals, lane, fold(let(totals[lane]), x))

        whole = divide(size, lanes)
        with b.loop(whole) as block, b.loop(lanes) as lane:
            join(lane, block * lanes + lane)
        with b.loop(size - whole * lanes) as lane:
            join(lane, whole * lanes + lane)

    nest([k.extent(0, axis) for axis in axes], row)
    width = lanes
    while width > 1:
        width //= 2
        with b.loop(width) as lane:
            store(totals, lane, fold(let(totals[lane]), let(totals[lane + width])))
    return _finish(k, let(totals[b.index(0)]))


def _reduced_work(merged: MergedOp) -> int | Dim:
    axes = merged.attributes["axes"]
    assert isinstance(axes, tuple)
    return product(tuple(merged.operands[0][1][axis] for axis in axes))


@strips(_reduced_work)
def _across_rows(k: Plain, outer: list[Expr], each: Callable[[Callable[[Expr], None]], None], start: Expr) -> None:
    """A strip of results where the last axis stays: each row is added to the totals of the strip."""
    dtype, initial, fold = _fold(k)
    totals = b.scratch(columns_of(k.template), dtype)
    each(lambda column: store(totals, column, initial))

    def row(reduced: list[Expr]) -> None:
        def join(column: Expr) -> None:
            x = let(k.load(0, _outer_index(k, [*outer, start + column], reduced)).astype(dtype))
            store(totals, column, fold(let(totals[column]), x))

        each(join)

    nest([k.extent(0, axis) for axis in k.integers("axes")], row)
    each(lambda column: k.store([*outer, start + column], _finish(k, let(totals[column]))))


def _is_across(merged: MergedOp) -> bool:
    axes = merged.attributes["axes"]
    assert isinstance(axes, tuple)
    return len(merged.operands[0][1]) - 1 not in axes


def _reduction() -> Form:
    elements(s.Sum)(_along_row)
    along = FORMS[s.Sum.name]

    def units(merged: MergedOp, template: PlainTemplate) -> int | Dim:
        return (_across_rows if _is_across(merged) else along).units(merged, template)

    def work(merged: MergedOp) -> int | Dim:
        if _is_across(merged):
            return _across_rows.work(merged)
        row = 1 if len(merged.shape) <= 1 else merged.shape[-1]
        return _reduced_work(merged) * row

    def emit(k: Plain, begin: Expr, end: Expr) -> None:
        across = len(k.operands[0][1]) - 1 not in k.integers("axes")
        (_across_rows if across else along).emit(k, begin, end)

    return Form(units, work, emit, lambda merged: PlainStrips if _is_across(merged) else PlainSums)


register(_reduction(), s.Sum, s.Prod, s.Mean, s.Max, s.Min, s.Any, s.All)


@elements(s.Argmax)
def _argmax(k: Plain, index: Index) -> Expr:
    """[outer, size, inner] to [outer, inner]; the first NaN is the largest."""
    from tvm import tirx

    outer, inner = index
    best = b.Scalar("int64", b.index(0))
    top = b.Scalar(k.wide(), k.load(0, [outer, b.index(0), inner]))
    with b.loop(k.extent(0, 1)) as place:
        x = let(k.load(0, [outer, place, inner]))
        with b.when(_before(x, let(top.value))):
            best.set(place)
            top.set(x)
    return tirx.Select(k.extent(0, 1) > 0, best.value, b.index(0))


def _before(x: Expr, y: Expr) -> Expr:
    """Whether x is larger than y, where NaN is the largest."""
    from tvm import tirx

    if not is_float(x):
        return x > y
    return tirx.Or(x > y, tirx.And(is_nan(x), tirx.Not(is_nan(y))))


@lines(s.Cumsum)
def _cumsum(k: Plain, at: Callable[[Expr], list[Expr]]) -> None:
    """Each sum is rounded to the result's dtype, as the next one is made of it."""
    from tvm import tirx

    total = b.Scalar(k.wide(), tirx.const(0, k.wide()))
    with b.loop(k.extents[1]) as place:
        k.store(at(place), plus(let(total.value), let(k.load(0, at(place)))))
        total.set(k.stored(at(place)))


@lines(s.Softmax)
def _softmax(k: Plain, at: Callable[[Expr], list[Expr]]) -> None:
    """exp is taken once; the result's memory holds it until the sum is known (halves, which it would round: twice)."""
    from tvm import tirx

    dtype = k.wide()
    once = k.dtype in ("f32", "f64")
    top = b.Scalar(dtype, lowest(dtype))
    total = b.Scalar(dtype, tirx.const(0, dtype))
    with b.loop(k.extents[1]) as place:
        top.set(maximum(let(top.value), let(k.load(0, at(place)))))
    largest = let(top.value)
    with b.loop(k.extents[1]) as place:
        power = let(libm("exp")(k.load(0, at(place)) - largest))
        total.set(total.value + power)
        if once:
            k.store(at(place), power)
    whole = let(total.value)
    with b.loop(k.extents[1]) as place:
        power = k.stored(at(place)) if once else libm("exp")(k.load(0, at(place)) - largest)
        k.store(at(place), power / whole)


@lines(s.TopK)
def _top_k(k: Plain, at: Callable[[Expr], list[Expr]]) -> None:
    """The result's line is a heap of the best so far with the worst on top, sorted at the end: n log k comparisons."""
    from tvm import tirx

    largest = bool(k.attributes["largest"])
    count = k.extents[1]

    def read(place: Expr) -> Expr:
        return k.stored(at(place))

    def worse(one: Expr, other: Expr) -> Expr:
        """Whether the element with index `one` comes after the one with index `other`."""
        x, y = let(k.load(0, at(one))), let(k.load(0, at(other)))
        above, below = let(_before(x, y)), let(_before(y, x))
        after, first = (below, above) if largest else (above, below)
        return tirx.Or(after, tirx.And(tirx.Not(first), one > other))

    def sift(start: Expr, size: Expr) -> None:
        """Move the element at `start` down until none below it is worse."""
        parent = b.Scalar("int64", start)
        with repeat(parent.value * 2 + 1 < size):
            child = b.Scalar("int64", parent.value * 2 + 1)
            left = let(child.value)
            with b.when(left + 1 < size), b.when(worse(let(read(left + 1)), let(read(left)))):
                child.set(left + 1)
            down, up = let(read(child.value)), let(read(parent.value))

            def swap(down: Expr = down, up: Expr = up, child: b.Scalar = child) -> None:
                k.store(at(child.value), up)
                k.store(at(parent.value), down)
                parent.set(child.value)

            b.either(worse(down, up), swap, lambda: parent.set(size))

    with b.loop(count) as place:
        k.store(at(place), place)
    half = let(divide(count, 2))
    with b.loop(half) as step:
        sift(half - 1 - step, count)
    with b.loop(k.extent(0, 1) - count) as step:
        candidate = let(count + step)
        with b.when(worse(let(read(b.index(0))), candidate)):
            k.store(at(b.index(0)), candidate)
            sift(b.index(0), count)
    with b.loop(count) as step:
        last = let(count - 1 - step)
        worst = b.Scalar("int64", read(b.index(0)))
        k.store(at(b.index(0)), read(last))
        k.store(at(last), worst.value)
        sift(b.index(0), last)


def _product_work(merged: MergedOp) -> int | Dim:
    return merged.operands[0][1][-1]


@strips(_product_work)
def _matmul(k: Plain, outer: list[Expr], each: Callable[[Callable[[Expr], None]], None], start: Expr) -> None:
    """A strip of one row of the product: rows of b's strip, times the elements of a's row, added up."""
    from tvm import tirx

    *leading, row = outer
    dtype = k.wide()
    totals = b.scratch(columns_of(k.template), dtype)
    each(lambda column: store(totals, column, tirx.const(0, dtype)))

    with b.loop(k.extent(0, len(k.operands[0][1]) - 1)) as i:
        factor = let(k.load_broadcast(0, [*leading, row, i]))

        def join(column: Expr) -> None:
            other = let(k.load_broadcast(1, [*leading, i, start + column]))
            store(totals, column, plus(let(totals[column]), let(times(factor, other))))

        each(join)
    each(lambda column: k.store([*outer, start + column], totals[column]))


register(_matmul, s.Matmul)
