"""How what adapters add to linear ops is lowered: only in steps that have a token with an adapter."""

from __future__ import annotations

from llmc.compiler.ir.adapters import Activated, LowRank
from llmc.compiler.ir.dims import product
from llmc.compiler.ir.op import Op
from llmc.targets.cpu.low_rank import (
    ActivatedProblem,
    ActivatedRows,
    InnerProblem,
    LowRankInner,
    LowRankOuter,
    OuterProblem,
)
from llmc.targets.cpu.plain import RULES
from llmc.targets.cpu.vector_isa import missing_vectors
from llmc.targets.cpu.vector_math import ACTIVATIONS
from llmc.targets.kernel import Call, Range, Scratch
from llmc.targets.lowering import Context, Lowered

ADAPTED = (Range("ADAPTED", 1, None),)
"""The steps in which some token has an adapter."""


@RULES.lower(LowRank, priority=10, needs=missing_vectors)
def low_rank_in_place(op: Op, context: Context) -> Lowered | str:
    """Two thin products for each token with an adapter, added to the sums where they lie."""
    assert isinstance(op, LowRank)
    if any(value.dtype != "f32" for value in (op.y, op.x, op.a, op.b)):
        return "activations or tables are not f32"
    (tokens, k), (_, parts, rank, _) = op.x.shape, op.a.shape
    assert isinstance(k, int) and isinstance(parts, int) and isinstance(rank, int)
    inner_problem, outer_problem = InnerProblem(k, parts, rank), OuterProblem(op.columns, rank)
    inner, outer = context.choose(LowRankInner, inner_problem), context.choose(LowRankOuter, outer_problem)
    if isinstance(inner, str) or isinstance(outer, str):
        return inner if isinstance(inner, str) else str(outer)
    held, machine = Scratch("inner", "f32", tokens * (parts * rank)), context.machine
    n = outer_problem.n
    return Lowered(
        (
            Call(
                inner.kernel(inner_problem, machine),
                (op.x, op.adapters, op.a, op.ranks, held),
                tokens * (parts * inner.blocks(inner_problem)),
                inner.grain(inner_problem),
                ADAPTED,
                note=f"[{parts} * {rank}, {k}]",
                operations=tokens * (2 * parts * rank * k),
            ),
            Call(
                outer.kernel(outer_problem, machine),
                (held, op.adapters, op.b, op.ranks, "result"),
                tokens * sum(outer.blocks(outer_problem, machine)),
                outer.grain(outer_problem),
                ADAPTED,
                note=f"[{n}, {rank}]",
                operations=tokens * (2 * rank * n),
            ),
        )
    )


@RULES.lower(Activated, priority=10, needs=missing_vectors)
def activated_rows(op: Op, context: Context) -> Lowered | str:
    """A vector at a time."""
    assert isinstance(op, Activated)
    features = op.shape[-1]
    if op.dtype != "f32" or (op.residual is not None and op.residual.dtype != "f32") or not isinstance(features, int):
        return f"no vectors of {op.type}"
    if op.activation not in ACTIVATIONS:
        return f"no kernel for {op.activation}"
    problem = ActivatedProblem(features, op.activation, op.gated, op.residual is not None)
    rows = context.choose(ActivatedRows, problem)
    if isinstance(rows, str):
        return rows
    args = (op.y, *(value for value in (op.residual,) if value is not None), "result")
    units = product(op.shape[:-1]) * rows.blocks(problem, context.machine)
    made = rows.kernel(problem, context.machine)
    return Lowered((Call(made, args, units, rows.grain(problem), note=f"[{features}]"),))
