"""Give norms, biases, sinks and slopes their weights in f32: they are few, and kernels then need one form only."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.passes.manager import Pass, Report


@dataclass(frozen=True)
class WidenVectors(Pass, name="widen-vectors"):
    """The operands that an op's `vectors` name: f16 and bf16 are cast to f32, which is exact; f64 is rounded."""

    def run(self, graph: Graph, report: Report) -> Graph:
        def rule(op: Op) -> Value | None:
            changes = {}
            for field in op.vectors:
                value = getattr(op, field)
                if value is not None and value.dtype in ("f16", "bf16", "f64"):
                    changes[field] = Cast(value, "f32")
                    report.hit(field)
            return op.replace(**changes) if changes else None

        return rewrite(graph, rule)
