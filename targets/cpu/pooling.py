"""Pooling: the mean, the greatest or the sum of each sequence's rows.

Rows are read once, a few vectors of columns at a time, and reading them is the limit: 4 bytes an element. Sums go by
runs of rows, so that the error of a long sequence grows with rows / run + run instead of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.ragged import PoolTokens
from llmc.targets.cpu.builder import either, index, let, loop, scratch
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays
from llmc.targets.cpu.plain import RULES
from llmc.targets.cpu.vector_isa import VectorIsa, isa_for
from llmc.targets.cpu.vectors import (
    add,
    divide,
    integer,
    load,
    maximum,
    pieces,
    range_kernel,
    remainder,
    splat,
    store,
)
from llmc.targets.kernel import Call
from llmc.targets.lowering import Context, Lowered
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc


@dataclass(frozen=True)
class PoolProblem(Problem):
    """One unit is a block of columns of a sequence, u = sequence * blocks + block. Arguments:

    x f32[T, columns], starts i32[B + 1], out f32[B, columns]. kind: "mean", "max" or "sum".
    """

    kind: str
    columns: int


@dataclass(frozen=True)
class Pool(CpuTemplate[PoolProblem], name="pool_tokens"):
    """vectors: columns of a unit, in vectors: independent chains of additions. run: rows that are added up before they
    are added to the total. A unit reads a whole sequence, so that any is worth a thread."""

    vectors: int = knob(1, 2, 4, 8)
    run: int = knob(16, 32, 64, 128, 256, exact=False)

    @classmethod
    def default(cls, problem: PoolProblem, machine: Machine, rows: Rows = ANY_ROWS) -> Pool:
        return cls(vectors=4, run=64)

    def stack_bytes(self, problem: PoolProblem, machine: Machine) -> int:
        lanes = isa_for(machine).lanes
        return arrays(*[4 * lanes] * (4 * (self.vectors + lanes.bit_length())))

    def blocks(self, problem: PoolProblem, machine: Machine) -> int:
        """Units of a sequence."""
        return -(-problem.columns // (self.vectors * isa_for(machine).lanes))

    def build(self, problem: PoolProblem, machine: Machine) -> PrimFunc:
        return _pool(problem, isa_for(machine), self.vectors, self.run)


def _pool(problem: PoolProblem, isa: VectorIsa, vectors: int, run: int) -> PrimFunc:
    columns, width = problem.columns, vectors * isa.lanes
    blocks = -(-columns // width)
    combine: Callable[[Expr, Expr], Expr] = maximum if problem.kind == "max" else add

    def unit(a: SimpleNamespace, u: Expr) -> None:
        from tvm import tirx

        sequence = let(divide(u, blocks))
        column = let(remainder(u, blocks) * width)
        first, end = (integer(load(a.starts, sequence + i)) for i in range(2))
        factor = let(tirx.const(1.0, "float32") / (end - first).astype("float32")) if problem.kind == "mean" else None

        def pooled(cut: Sequence[tuple[int, int]]) -> None:
            totals = [scratch(lanes, "float32") for _, lanes in cut]
            parts = [scratch(lanes, "float32") for _, lanes in cut]

            def row(place: Expr, into: Sequence[object], fresh: bool) -> None:
                for (offset, lanes), sum_ in zip(cut, into, strict=True):
                    value = load(a.x, place * columns + column + offset, lanes)
                    store(sum_, 0, value if fresh else combine(load(sum_, 0, lanes), value))

            with loop(divide(end - first + (run - 1), run)) as number:
                begin = let(first + number * run)
                row(begin, parts, True)
                with loop(tirx.Min(end - begin, index(run)) - 1) as step:
                    row(let(begin + 1 + step), parts, False)
                for (_, lanes), total, part in zip(cut, totals, parts, strict=True):
                    value = load(part, 0, lanes)
                    seen = tirx.Select(splat(number == 0, lanes), value, combine(load(total, 0, lanes), value))
                    store(total, 0, seen)
            for (offset, lanes), total in zip(cut, totals, strict=True):
                value = load(total, 0, lanes)
                result = value if factor is None else value * factor
                store(a.out, sequence * columns + column + offset, result)

        last = pieces(columns - (blocks - 1) * width, isa.lanes)
        if blocks == 1:
            pooled(last)
        else:
            full = pieces(width, isa.lanes)
            either(column < (blocks - 1) * width, lambda: pooled(full), lambda: pooled(last))

    return range_kernel([("x", "float32"), ("starts", "int32"), ("out", "float32")], [], unit)


@RULES.lower(PoolTokens, priority=10)
def pool_sequences(op: Op, context: Context) -> Lowered | str:
    """Each sequence's rows, by blocks of columns."""
    assert isinstance(op, PoolTokens)
    columns = product(op.x.shape[1:])
    if op.dtype != "f32" or not isinstance(columns, int):
        return f"rows are {op.x.type}: not f32, or of a size that is not known when compiling"
    problem = PoolProblem(op.kind, columns)
    pool = context.choose(Pool, problem)
    if isinstance(pool, str):
        return pool
    units = op.shape[0] * pool.blocks(problem, context.machine)
    made = pool.kernel(problem, context.machine)
    return Lowered((Call(made, (op.x, op.starts, "result"), units, note=f"[{columns}]"),))
