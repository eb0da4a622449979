"""Keep indices that a caller gives within their table: kernels of embeddings and of rows trust them."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Add, Cast, Less, Maximum, Minimum, Sub, Where, constant
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Gather, Reshape, Sum
from llmc.compiler.passes.manager import Pass, Report


@dataclass(frozen=True)
class BoundIndices(Pass, name="bound-indices"):
    """Indices of rows that are computed at run time: negative ones count from the end, others stop at the ends.

    For graphs whose inputs nobody has checked. Indices in range stay what they are; others would be read from
    outside of the table.
    """

    def run(self, graph: Graph, report: Report) -> Graph:
        def rule(op: Op) -> Value | None:
            table, indices = _lookup(op)
            if table is None or indices is None or indices in graph.constants:
                return None
            report.hit(op.name)
            bound = _bounded(indices, table.shape[0])
            return op.replace(ids=bound) if isinstance(op, Embed) else op.replace(indices=bound)

        return rewrite(graph, rule)


def _lookup(op: Op) -> tuple[Value | None, Value | None]:
    """(table, indices) of an op that reads whole rows by index."""
    if isinstance(op, Embed):
        return op.table, op.ids
    if isinstance(op, Gather) and op.axis % op.x.rank == 0:
        return op.x, op.indices
    return None, None


def _bounded(indices: Value, rows: int | Dim) -> Value:
    if isinstance(rows, int):
        count: Value = constant(rows, "i64")
    else:
        count = Reshape(Sum(Broadcast(constant(1, "i64"), (rows,)), (0,)), ())
    wide = Cast(indices, "i64") if indices.dtype != "i64" else indices
    counted = Where(Less(wide, constant(0, "i64")), Add(wide, count), wide)
    inside = Maximum(Minimum(counted, Sub(count, constant(1, "i64"))), constant(0, "i64"))
    return Cast(inside, indices.dtype) if indices.dtype != "i64" else inside
