"""Places in an axis that are looked at while a step runs: those outside of it end the step.

One element is read and one written an index; the comparisons between are the limit of neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.compiler.ir.dims import Dim, product, symbol, symbols_of
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.structural import CheckedIndex
from llmc.compiler.ir.types import UNSIGNED
from llmc.targets.cpu import builder as b
from llmc.targets.cpu.cpu_template import CpuTemplate
from llmc.targets.cpu.plain import RULES
from llmc.targets.cpu.plain_builder import TIR_DTYPES
from llmc.targets.cpu.sizes import dim_expression, dim_param
from llmc.targets.cpu.vectors import store
from llmc.targets.kernel import FAILED, Call, Param
from llmc.targets.lowering import Context, Lowered
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc


@dataclass(frozen=True)
class CheckProblem(Problem):
    """One unit is an index. Arguments: x, sizes (where each index has one of its own), out, failed i32[1], symbols.

    failed becomes 1 where an index is in neither 0 .. size - 1 nor -size .. -1. What is written for it is 0.
    dtype, result, sizes: IR dtypes of x, out and sizes (empty: all indices have the size `size`).
    """

    dtype: str
    result: str
    sizes: str
    size: Param
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class CheckIndices(CpuTemplate[CheckProblem], name="checked_index"):
    """least: indices that are worth a thread."""

    least: int = knob(1024, 4096, 16384, code=False)

    @classmethod
    def default(cls, problem: CheckProblem, machine: Machine, rows: Rows = ANY_ROWS) -> CheckIndices:
        return cls(least=4096)

    def grain(self, problem: CheckProblem) -> int:
        return self.least

    def build(self, problem: CheckProblem, machine: Machine) -> PrimFunc:
        return _check(**problem.params())  # type: ignore[arg-type]


def _check(dtype: str, result: str, sizes: str, size: Param, symbols: tuple[str, ...]) -> PrimFunc:
    def body(handles: Mapping[str, Expr], given: Mapping[str, Expr]) -> None:
        from tvm import tirx

        x = b.view(handles["x"], [b.MANY], TIR_DTYPES[dtype])
        own = b.view(handles["sizes"], [b.MANY], TIR_DTYPES[sizes]) if sizes else None
        out = b.view(handles["out"], [b.MANY], TIR_DTYPES[result])
        failed = b.view(handles["failed"], [b.MANY], "int32")
        with b.loop(given["end"] - given["begin"]) as step:
            at = b.let(given["begin"] + step)
            index = b.let(x[at].astype("int64"))
            limit = b.let(own[at].astype("int64") if own is not None else dim_expression(size, given))
            first = b.index(0) if dtype in UNSIGNED else b.index(0) - limit
            inside = tirx.And(index >= first, index < limit)
            counted = b.let(tirx.Select(index < 0, index + limit, index))
            store(out, at, tirx.Select(inside, counted, b.index(0)).astype(TIR_DTYPES[result]))
            with b.when(tirx.Not(inside)):
                store(failed, 0, tirx.const(1, "int32"))

    pointers = [("x", TIR_DTYPES[dtype]), *([("sizes", TIR_DTYPES[sizes])] if sizes else [])]
    pointers += [("out", TIR_DTYPES[result]), ("failed", "int32")]
    return b.plain_function(pointers, list(symbols), body)


@RULES.lower(CheckedIndex, priority=0)
def check_indices(op: Op, context: Context) -> Lowered | str:
    """An index after the other."""
    assert isinstance(op, CheckedIndex)
    if 0 in op.shape:
        return Lowered((), reason="nothing to compute")
    names = sorted(item.name for item in symbols_of(op.size)) if op.sizes is None else []
    problem = CheckProblem(
        dtype=op.x.dtype,
        result=op.dtype,
        sizes=op.sizes.dtype if op.sizes is not None else "",
        size=dim_param(op.size) if op.sizes is None else 0,
        symbols=tuple(names),
    )
    check = context.choose(CheckIndices, problem)
    if isinstance(check, str):
        return check
    own = () if op.sizes is None else (op.sizes,)
    sizes: tuple[int | Dim, ...] = tuple(symbol(name) for name in names)
    made, args = check.kernel(problem, context.machine), (op.x, *own, "result", FAILED, *sizes)
    call = Call(made, args, product(op.shape), check.grain(problem), failure=op.failure)
    return Lowered((call,), reason="not proved to be in range")
