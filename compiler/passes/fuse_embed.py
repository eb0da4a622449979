"""Recognise table look-ups: t.gather of a compile-time matrix's rows becomes llm.embed."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Gather
from llmc.compiler.ir.types import FLOATS
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.rewriting import Uses, holds, rewrite_counting, uncast


@dataclass(frozen=True)
class FuseEmbed(Pass, name="fuse-embed"):
    """gather(table, ids) along axis 0 -> llm.embed, which widens the rows to the dtype that is wanted."""

    def run(self, graph: Graph, report: Report) -> Graph:
        known = graph.constants

        def rule(op: Op, uses: Uses) -> Value | None:
            if isinstance(op, Gather):
                return self._lookup(op, known, report)
            if isinstance(op, Cast) and isinstance(op.x, Embed) and op.to in FLOATS and holds(op.to, op.x.dtype):
                # Rows in both dtypes are cheaper to look up twice than to convert.
                return op.x.replace(dtype_name=op.to)
            return None

        return rewrite_counting(graph, rule)

    def _lookup(self, op: Gather, known: frozenset[Value], report: Report) -> Value | None:
        if op.x not in known or op.x.dtype not in FLOATS:
            return None
        if op.x.rank != 2 or op.axis % op.x.rank != 0:
            report.refuse(op, f"looks up along axis {op.axis} of {op.x.type}, not rows of a matrix")
            return None
        if op.indices.dtype not in ("i32", "i64"):
            report.refuse(op, f"ids are {op.indices.dtype}, not i32 or i64")
            return None
        indices = op.indices
        if isinstance(indices, Cast) and (indices.x.dtype, indices.dtype) == ("i32", "i64"):
            indices = indices.x  # the same rows
        report.hit("embed")
        return Embed(uncast(op.x), indices, op.dtype)
