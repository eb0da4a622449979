"""Make the rounding of activations an op of its own, so that linears that share an input share its rounding."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.llm import GatedLinear, Linear, QuantizeActivations
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.passes.manager import Pass, Report


@dataclass(frozen=True)
class SplitRounding(Pass, name="split-rounding"):
    """linear(x) with int8 activations becomes linear(quantize_activations(x)), in the weight's groups.

    bf16 activations become a pair of casts.
    """

    def run(self, graph: Graph, report: Report) -> Graph:
        def rule(op: Op) -> Value | None:
            if not isinstance(op, (Linear, GatedLinear)) or op.rounding == "f32":
                return None
            if op.rounding == "bf16":
                report.hit("rounding")
                return op.replace(x=Cast(Cast(op.x, "bf16"), op.x.dtype), rounding="f32")
            group = getattr(op.w.tensor.encoding, "group", None)
            if group is None:
                report.refuse(op, "the weight is not quantized in groups")
                return op.replace(rounding="f32")
            report.hit("rounding")
            return op.replace(x=QuantizeActivations(op.x, int(group)), rounding="f32")

        return rewrite(graph, rule)
