"""Recognise normalisation over the last axis: llm.rms_norm and llm.layer_norm, from canonical graphs.

Layer norm is the RMS norm of centred rows, so one rule finds the core x * rsqrt(mean(x^2) + eps), and others absorb
the centring, the weight and the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.elementwise import Add, Cast, Mul, Rsqrt, Sub
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import LayerNorm, RMSNorm
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.pattern import Const, Node, Through, Var, match
from llmc.compiler.ir.structural import Broadcast, Mean, Reshape
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.rewriting import Uses, number_of, rewrite_counting, uncast, vector_of

# x * rsqrt(spread + epsilon), and its spread when that is the mean of the squares of one value.
_SCALED = Node(Mul, Var("x"), Through((Broadcast,), Node(Rsqrt, Node(Add, Var("spread"), Const("epsilon")))))
_MEAN_OF_SQUARES = Node(Mean, Node(Mul, Var("squared"), Var("squared")))


def _plain_mean(value: Value) -> Mean | None:
    """The mean that this is, seen through broadcasts."""
    while isinstance(value, Broadcast):
        value = value.x
    return value if isinstance(value, Mean) else None


def _over_last_axis(mean: Mean) -> bool:
    return mean.axes == (mean.x.rank - 1,) and mean.keep


def _square_of(value: Value) -> Value | None:
    return value.a if isinstance(value, Mul) and value.a is value.b else None


def _is_mean_of(value: Value, x: Value) -> bool:
    mean = _plain_mean(value)
    return mean is not None and mean.x is x and _over_last_axis(mean)


def _centred_from(value: Value) -> Value | None:
    """x of x - mean(x, last axis)."""
    return value.a if isinstance(value, Sub) and _is_mean_of(value.b, value.a) else None


def _expanded_variance_of(value: Value) -> Value | None:
    """x of mean(x^2) - mean(x)^2."""
    if not isinstance(value, Sub):
        return None
    squares, squared = _plain_mean(value.a), _square_of(value.b)
    if squares is None or squared is None or not _over_last_axis(squares):
        return None
    x = _square_of(squares.x)
    return x if x is not None and _is_mean_of(squared, x) else None


@dataclass(frozen=True)
class FuseNorm(Pass, name="fuse-norm"):
    """RMS norms (with weight, with weight + offset, without) and layer norms (with and without weight and bias)."""

    def run(self, graph: Graph, report: Report) -> Graph:
        known = graph.constants

        def rule(op: Op, uses: Uses) -> Value | None:
            if isinstance(op, Mul):
                core = self._core(op, report)
                if core is not None:
                    return core
                for a, b in ((op.a, op.b), (op.b, op.a)):
                    found = self._weighted(op, a, b, known, uses, report)
                    if found is not None:
                        return found
            if isinstance(op, Add):
                for a, b in ((op.a, op.b), (op.b, op.a)):
                    if b in known and isinstance(a, LayerNorm):
                        return self._shifted(op, a, b, uses, report)
            if isinstance(op, Cast) and isinstance(op.x, (RMSNorm, LayerNorm)):
                return self._cast_back(op, op.x)
            return None

        return rewrite_counting(graph, rule)

    def _core(self, op: Mul, report: Report) -> Value | None:
        """x * rsqrt(mean(x * x) + eps), or the same of centred rows"""
        found = match(op, _SCALED)
        if found is None or found["x"].shape != op.shape:
            return None
        x, spread = found["x"], found["spread"]
        epsilon = number_of(found["epsilon"])
        assert epsilon is not None
        squares = match(spread, _MEAN_OF_SQUARES)
        if squares is not None:
            assert isinstance(spread, Mean)
            # x may reach the mean of squares through a widening of its own.
            if uncast(squares["squared"]) is not uncast(x):
                report.refuse(op, "the mean of squares is of another value than the one that is scaled")
                return None
            if not _over_last_axis(spread):
                report.refuse(op, f"the mean is over axes {list(spread.axes)} of {spread.x.type}, not over the last")
                return None
            centred_from = _centred_from(x)
            if centred_from is not None:
                report.hit("layer-norm")
                return LayerNorm(centred_from, None, None, float(epsilon))
            report.hit("rms-norm")
            return RMSNorm(x, None, float(epsilon))
        whole = _expanded_variance_of(spread)
        if whole is not None and _centred_from(x) is whole:
            report.hit("layer-norm")
            return LayerNorm(whole, None, None, float(epsilon))
        return None

    def _weighted(
        self, op: Mul, norm: Value, weight: Value, known: frozenset[Value], uses: Uses, report: Report
    ) -> Value | None:
        if weight not in known or not isinstance(norm, (RMSNorm, LayerNorm)) or norm.w is not None:
            return None
        if isinstance(norm, LayerNorm) and norm.b is not None:
            return None
        if number_of(weight) is not None:
            return None
        vector = vector_of(weight, norm.shape[-1])
        if vector is None or norm.shape != op.shape:
            report.refuse(op, f"the weight of {list(weight.shape)} is no vector of {norm.shape[-1]}")
            return None
        if isinstance(norm, LayerNorm):
            report.hit("weight")
            return norm.replace(w=vector)
        vector, offset = _split_offset(vector)
        report.hit("weight" if offset == 0 else "weight-with-offset")
        return norm.replace(w=vector, offset=offset)

    def _shifted(self, op: Add, norm: LayerNorm, bias: Value, uses: Uses, report: Report) -> Value | None:
        if norm.b is not None or norm.shape != op.shape:
            return None
        vector = vector_of(bias, norm.shape[-1])
        if vector is None:
            return None
        report.hit("bias")
        return norm.replace(b=vector)

    def _cast_back(self, op: Cast, norm: RMSNorm | LayerNorm) -> Value | None:
        """A norm of widened rows, cast back: the norm is accumulated in f32 anyway."""
        if isinstance(norm.x, Cast) and norm.x.x.dtype == op.to and uncast(norm.x) is norm.x.x:
            return norm.replace(x=norm.x.x)
        return None


def _split_offset(weight: Value) -> tuple[Value, float]:
    """(w, c) of w + c; (weight, 0) of any other."""
    inner = weight.x if isinstance(weight, Reshape) else weight
    if isinstance(inner, Add):
        offset = number_of(inner.b)
        vector = vector_of(inner.a, weight.shape[-1])
        if offset is not None and vector is not None:
            return vector, float(offset)
    return weight, 0.0
