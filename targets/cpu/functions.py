"""Activations and softmax over f32, a vector at a time.

The limit is the arithmetic of exp, about 15 instructions a vector; libm's takes ten times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Activation, Sigmoid
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.structural import Softmax
from llmc.targets.cpu import vector_math
from llmc.targets.cpu.builder import index, let, loop, scratch
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays, few
from llmc.targets.cpu.plain import RULES, used_symbols
from llmc.targets.cpu.plain_functions import intrinsic
from llmc.targets.cpu.sizes import dim_expression, dim_param
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for, missing_vectors
from llmc.targets.cpu.vectors import add, aligned_scratch, divide, load, range_kernel, reduce, splat, store
from llmc.targets.kernel import Call, Param
from llmc.targets.lowering import Context, Lowered
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc


class _Tail:
    """The elements behind the last whole vector, in a vector of their own on the stack, moved one by one: by masks
    (`load` with a count) a softmax of 7 columns took 4% longer with 8 lanes, other sizes as long."""

    def __init__(self, isa: VectorIsa, count: Expr, fill: float) -> None:
        self.isa, self.count = isa, count
        self.memory = aligned_scratch(isa.lanes, isa.lanes)
        store(self.memory, 0, splat(fill, isa.lanes))

    def read(self, source: Buffer, start: Expr) -> None:
        with loop(self.count) as i:
            store(self.memory, i, load(source, start + i))

    @property
    def vector(self) -> Expr:
        return load(self.memory, 0, self.isa.lanes)

    def set(self, value: Expr) -> None:
        store(self.memory, 0, value)

    def write(self, target: Buffer, start: Expr) -> None:
        with loop(self.count) as i:
            store(target, start + i, load(self.memory, i))


def _keep_nan(isa: VectorIsa, x: Expr, result: Expr) -> Expr:
    """The result, but NaN where x is: clamping in exp turns NaN into a number."""
    from tvm import tirx

    bits = tirx.reinterpret(isa.i32, x) & 0x7FFFFFFF
    return tirx.Select(bits > 0x7F800000, x, result)


@dataclass(frozen=True)
class ActivationProblem(Problem):
    """out = kind(x), f32 [size]; symbols of the size in order."""

    kind: str
    size: Param
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class ActivationRows(CpuTemplate[ActivationProblem], name="activation_rows"):
    """One unit is `block` elements. least: elements that are worth a thread."""

    block: int = knob(256, 512, 1024, 2048, 4096)
    least: int = knob(1024, 2048, 4096, 8192, 16384, code=False)

    @classmethod
    def default(cls, problem: ActivationProblem, machine: Machine, rows: Rows = ANY_ROWS) -> ActivationRows:
        return cls(block=1024, least=4096)

    def grain(self, problem: ActivationProblem) -> int:
        return max(1, self.least // self.block)

    def stack_bytes(self, problem: ActivationProblem, machine: Machine) -> int:
        return arrays(4 * isa_for(machine).lanes)

    def build(self, problem: ActivationProblem, machine: Machine) -> PrimFunc:
        return _activation(problem, isa_for(machine), self.block)


def _activation(problem: ActivationProblem, isa: VectorIsa, block: int) -> PrimFunc:
    from tvm import tirx

    def unit(a: SimpleNamespace, u: Expr) -> None:
        start = let(u * block)
        count = let(tirx.Min(dim_expression(problem.size, vars(a)) - start, index(block)))
        whole = let(divide(count, isa.lanes))

        def value(x: Expr) -> Expr:
            return _keep_nan(isa, x, vector_math.activation(isa, problem.kind, x))

        with loop(whole) as number:
            at = start + number * isa.lanes
            store(a.out, at, value(let(load(a.x, at, isa.lanes))))
        behind = start + whole * isa.lanes
        tail = _Tail(isa, count - whole * isa.lanes, 0.0)
        tail.read(a.x, behind)
        tail.set(value(let(tail.vector)))
        tail.write(a.out, behind)

    return range_kernel([("x", "float32"), ("out", "float32")], problem.symbols, unit)


@dataclass(frozen=True)
class SoftmaxProblem(Problem):
    """out = softmax(x) over the rows of f32 [units, size]; symbols of the size in order.

    A row whose greatest element is infinite or not a number is not a number, as in exp(x - max) / sum.
    """

    size: Param
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class SoftmaxRows(CpuTemplate[SoftmaxProblem], name="softmax_rows"):
    """One unit is a row. least: elements that are worth a thread. There is one vector of running values: exp is so long
    that no addition is waited for."""

    least: int = knob(1024, 2048, 4096, 8192, 16384, code=False)

    @classmethod
    def default(cls, problem: SoftmaxProblem, machine: Machine, rows: Rows = ANY_ROWS) -> SoftmaxRows:
        return cls(least=4096)

    def grain(self, problem: SoftmaxProblem) -> int:
        return few(problem.size if isinstance(problem.size, int) else None, self.least)

    def stack_bytes(self, problem: SoftmaxProblem, machine: Machine) -> int:
        return arrays(*[4 * isa_for(machine).lanes] * 2)

    def build(self, problem: SoftmaxProblem, machine: Machine) -> PrimFunc:
        return _softmax(problem, isa_for(machine))


def _softmax(problem: SoftmaxProblem, isa: VectorIsa) -> PrimFunc:
    from tvm import tirx

    lanes = isa.lanes
    greatest = intrinsic("maximum")

    def unit(a: SimpleNamespace, u: Expr) -> None:
        columns = dim_expression(problem.size, vars(a))
        base, whole = let(u * columns), let(divide(columns, lanes))
        behind = base + whole * lanes
        tail = _Tail(isa, columns - whole * lanes, float("-inf"))
        tail.read(a.x, behind)
        running = scratch(lanes, "float32")
        store(running, 0, tail.vector)
        with loop(whole) as number:
            x = load(a.x, base + number * lanes, lanes)
            store(running, 0, greatest(load(running, 0, lanes), x))
        top = reduce(load(running, 0, lanes), greatest)

        def power(x: Expr) -> Expr:
            return let(vector_math.exp(isa, x - top))

        last = power(tail.vector)
        tail.set(last)
        store(running, 0, last)
        with loop(whole) as number:
            at = base + number * lanes
            value = power(load(a.x, at, lanes))
            store(a.out, at, value)
            store(running, 0, load(running, 0, lanes) + value)
        total = reduce(load(running, 0, lanes), add)
        # 0 * top is 0, or not a number; written as the intrinsic so that nobody folds it to 0.
        factor = let(intrinsic("fma")(top, tirx.const(0.0, "float32"), tirx.const(1.0, "float32") / total))
        with loop(whole) as number:
            at = base + number * lanes
            store(a.out, at, load(a.out, at, lanes) * factor)
        tail.set(tail.vector * factor)
        tail.write(a.out, behind)

    return range_kernel([("x", "float32"), ("out", "float32")], problem.symbols, unit)


@RULES.lower(Activation, Sigmoid, priority=5, needs=missing_vectors)
def activation_vectors(op: Op, context: Context) -> Lowered | str:
    """A vector of f32 at a time."""
    kind = op.kind if isinstance(op, Activation) else "sigmoid"
    if op.dtype != "f32" or 0 in op.shape:
        return f"no vectors of {op.type}"
    size, symbols = product(op.shape), used_symbols(op)
    names = tuple(str(symbol) for symbol in symbols)
    problem = ActivationProblem(kind, dim_param(size), names)
    rows = context.choose(ActivationRows, problem)
    if isinstance(rows, str):
        return rows
    made, units = rows.kernel(problem, context.machine), (size + (rows.block - 1)) // rows.block
    return Lowered((Call(made, (op.operands[0], "result", *symbols), units, rows.grain(problem), note=kind),))


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
    problem = SoftmaxProblem(dim_param(size), names)
    rows = context.choose(SoftmaxRows, problem)
    if isinstance(rows, str):
        return rows
    made, units = rows.kernel(problem, context.machine), product(op.shape[:-1])
    return Lowered((Call(made, (op.x, "result", *symbols), units, rows.grain(problem), note=f"[{size}]"),))
