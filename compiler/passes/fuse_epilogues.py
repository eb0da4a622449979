"""Bias, activation and residual move into the linear op in front of them, which writes its result once."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.elementwise import Activation, Add, Cast
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Reshape
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.rewriting import Uses, rewrite_counting, vector_of
from llmc.compiler.passes.schemes import describe


@dataclass(frozen=True)
class FuseEpilogues(Pass, name="fuse-epilogues"):
    """activation(x w + bias) + residual in one op, where nothing else uses what lies between.

    bias, activation, residual: what to fuse. Biases alone are worth fusing before `merge-projections`, which then
    merges them too. A sum of two linears and a third value (a parallel block) becomes a chain of two residuals.
    """

    bias: bool = True
    activation: bool = True
    residual: bool = True

    def run(self, graph: Graph, report: Report) -> Graph:
        def rule(op: Op, uses: Uses) -> Value | None:
            if isinstance(op, Add):
                fused = _with_bias(op, graph, uses, report) if self.bias else None
                if fused is None and self.residual:
                    fused = _with_residual(op, graph, uses, report)
                return fused
            if isinstance(op, Activation) and self.activation:
                return _with_activation(op, uses, report)
            return None

        return rewrite_counting(graph, rule)


def _with_bias(op: Add, graph: Graph, uses: Uses, report: Report) -> Value | None:
    for linear, other in ((op.a, op.b), (op.b, op.a)):
        if not isinstance(linear, Linear) or other not in graph.constants or op.shape != linear.shape:
            continue
        bias = _as_bias(other, linear)
        if bias is None:
            return None
        obstacle = _obstacle(linear, uses)
        if obstacle:
            report.refuse(describe(linear, linear.w), f"bias not fused: {obstacle}")
            return None
        report.hit("bias")
        return linear.replace(bias=bias if linear.bias is None else _sum(linear.bias, bias))
    return None


def _sum(a: Value, b: Value) -> Value:
    """a + b in f32, in which a linear adds its bias."""
    return Add(a if a.dtype == "f32" else Cast(a, "f32"), b if b.dtype == "f32" else Cast(b, "f32"))


def _as_bias(value: Value, linear: Linear) -> Value | None:
    """[outputs] of a value that broadcasts over rows; None when it is another thing."""
    size = linear.shape[-1]
    if all(dim == 1 for dim in value.shape):
        return Broadcast(value if value.rank == 0 else Reshape(value, ()), (size,))
    return vector_of(value, size)


def _with_activation(op: Activation, uses: Uses, report: Report) -> Value | None:
    linear = op.x
    if not isinstance(linear, Linear):
        return None
    obstacle = _obstacle(linear, uses)
    if obstacle:
        report.refuse(describe(linear, linear.w), f"{op.kind} not fused: {obstacle}")
        return None
    report.hit(op.kind)
    return linear.replace(activation=op.kind)


def _obstacle(linear: Linear, uses: Uses) -> str:
    """Why nothing more can be applied to a linear's result in place; empty when it can."""
    if uses(linear) > 1:
        return "the result without it is used too"
    if linear.residual is not None:
        return "a residual is added already"
    return f"{linear.activation} is applied already" if linear.activation else ""


def _with_residual(op: Add, graph: Graph, uses: Uses, report: Report) -> Value | None:
    refusals: list[tuple[Linear, str]] = []
    # The right operand first: in `x + f(x)` it is the younger one, and of two linears the one to carry the sum.
    for linear, other in ((op.b, op.a), (op.a, op.b)):
        if not isinstance(linear, Linear) or other in graph.constants:
            continue
        chained = None
        if other.shape != linear.shape:
            refusals.append((linear, f"it is {other.type} and broadcasts"))
        elif uses(linear) > 1 or linear is other:
            refusals.append((linear, "the result without it is used too"))
        else:
            chained = _chain(linear, other, uses)
            refusals.append((linear, "another is added already"))
        if chained is not None:
            report.hit("residual")
            return chained
    for linear, reason in refusals:
        report.refuse(describe(linear, linear.w), f"residual not fused: {reason}")
    return None


def _chain(linear: Linear, other: Value, uses: Uses) -> Linear | None:
    """`linear` with `other` added: as its residual, or as that of the linear which is its residual."""
    if linear.residual is None:
        return linear.replace(residual=other)
    inner = linear.residual
    if not isinstance(inner, Linear) or uses(inner) > 1:
        return None
    chained = _chain(inner, other, uses)
    return None if chained is None else linear.replace(residual=chained)
