"""Activations and softmax over f32, a vector at a time.

The limit is the arithmetic of exp, about 15 instructions a vector; libm's takes ten times as long.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Activation, Sigmoid
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.structural import Softmax
from llmc.targets.cpu import vector_math
from llmc.targets.cpu.builder import index, let, loop, scratch
from llmc.targets.cpu.plain import RULES, used_symbols
from llmc.targets.cpu.plain_builder import few
from llmc.targets.cpu.plain_functions import intrinsic
from llmc.targets.cpu.sizes import dim_expression, dim_param
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for, missing_vectors
from llmc.targets.cpu.vectors import (
    add,
    aligned_scratch,
    copy_element,
    divide,
    load,
    pin,
    range_kernel,
    reduce_lanes,
    splat,
    store,
)
from llmc.targets.kernel import Call, Param, kernel
from llmc.targets.lowering import Context, Lowered
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

BLOCK = 1024  # elements of a unit of an activation


class _Tail:
    """The elements behind the last whole vector, in a vector of their own on the stack."""

    def __init__(self, isa: VectorIsa, count: Expr, fill: float) -> None:
        self.isa, self.count = isa, count
        self.memory = aligned_scratch(isa.lanes, isa.lanes)
        store(self.memory, 0, splat(fill, isa.lanes), isa.lanes)

    def read(self, source: Buffer, start: Expr) -> None:
        with loop(self.count) as i:
            copy_element(source, start + i, self.memory, i)

    @property
    def vector(self) -> Expr:
        return load(self.memory, 0, self.isa.lanes)

    def set(self, value: Expr) -> None:
        store(self.memory, 0, value, self.isa.lanes)

    def write(self, target: Buffer, start: Expr) -> None:
        with loop(self.count) as i:
            copy_element(self.memory, i, target, start + i)


def _keep_nan(isa: VectorIsa, x: Expr, result: Expr) -> Expr:
    """The result, but NaN where x is: clamping in exp turns NaN into a number."""
    from tvm import tirx

    bits = tirx.reinterpret(isa.i32, x) & isa.splat(0x7FFFFFFF, "int32")
    return tirx.Select(bits > isa.splat(0x7F800000, "int32"), x, result)


def activation_rows(machine: Machine, *, kind: str, size: Param, symbols: tuple[str, ...]) -> PrimFunc:
    """out = kind(x), f32 [size]; symbols in order. One unit is `BLOCK` elements."""
    from tvm import tirx

    isa = isa_for(machine)

    def unit(a: SimpleNamespace, u: Expr) -> None:
        start = pin(u * BLOCK)
        count = pin(tirx.Min(dim_expression(size, vars(a)) - start, index(BLOCK)))
        whole = pin(divide(count, isa.lanes))

        def value(x: Expr) -> Expr:
            return _keep_nan(isa, x, vector_math.activation(isa, kind, x))

        with loop(whole) as number:
            at = start + number * isa.lanes
            store(a.out, at, value(let(load(a.x, at, isa.lanes))), isa.lanes)
        behind = start + whole * isa.lanes
        tail = _Tail(isa, count - whole * isa.lanes, 0.0)
        tail.read(a.x, behind)
        tail.set(value(let(tail.vector)))
        tail.write(a.out, behind)

    return range_kernel([("x", "float32"), ("out", "float32")], symbols, unit)


def softmax_rows(machine: Machine, *, size: Param, symbols: tuple[str, ...]) -> PrimFunc:
    """out = softmax(x) over the rows of f32 [units, size]; symbols in order.

    A row whose greatest element is infinite or not a number is not a number, as in exp(x - max) / sum.
    """
    from tvm import tirx

    isa = isa_for(machine)
    lanes = isa.lanes
    greatest = intrinsic("maximum")

    def unit(a: SimpleNamespace, u: Expr) -> None:
        columns = dim_expression(size, vars(a))
        base, whole = pin(u * columns), pin(divide(columns, lanes))
        behind = base + whole * lanes
        tail = _Tail(isa, columns - whole * lanes, float("-inf"))
        tail.read(a.x, behind)
        running = scratch(lanes, "float32")
        store(running, 0, tail.vector, lanes)
        with loop(whole) as number:
            x = load(a.x, base + number * lanes, lanes)
            store(running, 0, greatest(load(running, 0, lanes), x), lanes)
        top = reduce_lanes(load(running, 0, lanes), lanes, greatest)

        def power(x: Expr) -> Expr:
            return let(vector_math.exp(isa, x - splat(top, lanes)))

        last = power(tail.vector)
        tail.set(last)
        store(running, 0, last, lanes)
        with loop(whole) as number:
            at = base + number * lanes
            value = power(load(a.x, at, lanes))
            store(a.out, at, value, lanes)
            store(running, 0, load(running, 0, lanes) + value, lanes)
        total = reduce_lanes(load(running, 0, lanes), lanes, add)
        # 0 * top is 0, or not a number; written as the intrinsic so that nobody folds it to 0.
        factor = let(intrinsic("fma")(top, tirx.const(0.0, "float32"), tirx.const(1.0, "float32") / total))
        with loop(whole) as number:
            at = base + number * lanes
            store(a.out, at, load(a.out, at, lanes) * splat(factor, lanes), lanes)
        tail.set(tail.vector * splat(factor, lanes))
        tail.write(a.out, behind)

    return range_kernel([("x", "float32"), ("out", "float32")], symbols, unit)


@RULES.lower(Activation, Sigmoid, priority=5, needs=missing_vectors)
def activation_vectors(op: Op, context: Context) -> Lowered | str:
    """A vector of f32 at a time."""
    kind = op.kind if isinstance(op, Activation) else "sigmoid"
    if op.dtype != "f32" or 0 in op.shape:
        return f"no vectors of {op.type}"
    size, symbols = product(op.shape), used_symbols(op)
    names = tuple(str(symbol) for symbol in symbols)
    made = kernel(activation_rows, context.machine.key, kind=kind, size=dim_param(size), symbols=names)
    units = (size + (BLOCK - 1)) // BLOCK
    return Lowered((Call(made, (op.operands[0], "result", *symbols), units, grain=4, note=kind),))


@RULES.lower(Softmax, priority=5, needs=missing_vectors)
def softmax_vectors(op: Op, context: Context) -> Lowered | str:
    """Rows of f32, a vector at a time."""
    assert isinstance(op, Softmax)
    if op.dtype != "f32" or 0 in op.shape:
        return f"no vectors of {op.type}"
    if op.axis % op.x.rank != op.x.rank - 1:
        return "not over the last axis"
    size, symbols = op.shape[-1], used_symbols(op)
    names = tuple(str(symbol) for symbol in symbols)
    made = kernel(softmax_rows, context.machine.key, size=dim_param(size), symbols=names)
    call = Call(made, (op.x, "result", *symbols), product(op.shape[:-1]), grain=few(size), note=f"[{size}]")
    return Lowered((call,))
