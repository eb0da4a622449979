"""Recognise normalisation over the last axis: llm.rms_norm and llm.layer_norm, from canonical graphs.

Layer norm is the RMS norm of centred rows, so one rule finds the core x * rsqrt(mean(x^2) + eps), and others absorb
the centring, the weight and the bias. A norm over several last axes is one over them as a single axis, and a reshape.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Add, Cast, Mul, Rsqrt, Sub
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import LayerNorm, RMSNorm
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.pattern import Const, Node, Through, Var, match
from llmc.compiler.ir.structural import Broadcast, Mean, Reshape
from llmc.compiler.ir.types import Shape
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


def _last_axes(mean: Mean) -> int:
    """How many last axes of known sizes this mean is over; 0 where it is over others or none, or drops them."""
    count, rank = len(mean.axes), mean.x.rank
    if not mean.keep or sorted(mean.axes) != list(range(rank - count, rank)):
        return 0
    return count if all(isinstance(dim, int) and dim for dim in mean.x.shape[rank - count :]) else 0


def _square_of(value: Value) -> Value | None:
    return value.a if isinstance(value, Mul) and value.a is value.b else None


def _is_mean_of(value: Value, x: Value, count: int) -> bool:
    mean = _plain_mean(value)
    return mean is not None and mean.x is x and _last_axes(mean) == count


def _centred_from(value: Value, count: int) -> Value | None:
    """x of x - mean(x, the last `count` axes)."""
    return value.a if isinstance(value, Sub) and _is_mean_of(value.b, value.a, count) else None


def _expanded_variance_of(value: Value) -> tuple[Value, int] | None:
    """x of mean(x^2) - mean(x)^2, and over how many last axes the means are."""
    if not isinstance(value, Sub):
        return None
    squares, squared = _plain_mean(value.a), _square_of(value.b)
    if squares is None or squared is None or not _last_axes(squares):
        return None
    x, count = _square_of(squares.x), _last_axes(squares)
    return (x, count) if x is not None and _is_mean_of(squared, x, count) else None


def _flat(x: Value, count: int) -> Value:
    """The last `count` axes as one."""
    return x if count == 1 else Reshape(x, (*x.shape[: x.rank - count], product(x.shape[x.rank - count :])))


def _back(norm: Value, shape: Shape) -> Value:
    return norm if norm.shape == shape else Reshape(norm, shape)


def _norm_of(value: Value) -> tuple[RMSNorm | LayerNorm, int] | None:
    """The norm that this is, and how many last axes of the value it normalises together."""
    if isinstance(value, (RMSNorm, LayerNorm)):
        return value, 1
    if isinstance(value, Reshape) and isinstance(value.x, (RMSNorm, LayerNorm)):
        norm, count = value.x, value.rank - value.x.rank + 1
        if count > 1 and value.shape[: value.rank - count] == norm.shape[:-1]:
            return norm, count
    return None


def _flat_vector(weight: Value, shape: Shape, count: int) -> Value | None:
    """The vector of a weight over the last `count` axes of a shape; None where it is none."""
    if count == 1:
        return vector_of(weight, shape[-1])
    own = shape[len(shape) - count :]
    if weight.shape[-count:] != own or product(weight.shape) != product(own):
        return None
    return Reshape(weight, (product(own),))


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
                    shifted = self._shifted(op, a, b, uses, report)
                    if shifted is not None:
                        return shifted
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
            count = _last_axes(spread)
            if not count:
                report.refuse(op, f"the mean is over axes {list(spread.axes)} of {spread.x.type}, not over the last")
                return None
            centred_from = _centred_from(x, count)
            if centred_from is not None:
                report.hit("layer-norm")
                return _back(LayerNorm(_flat(centred_from, count), None, None, float(epsilon)), op.shape)
            report.hit("rms-norm")
            return _back(RMSNorm(_flat(x, count), None, float(epsilon)), op.shape)
        whole = _expanded_variance_of(spread)
        if whole is not None and _centred_from(x, whole[1]) is whole[0]:
            report.hit("layer-norm")
            return _back(LayerNorm(_flat(*whole), None, None, float(epsilon)), op.shape)
        return None

    def _weighted(
        self, op: Mul, normed: Value, weight: Value, known: frozenset[Value], uses: Uses, report: Report
    ) -> Value | None:
        found = _norm_of(normed)
        if found is None or found[0].w is not None or number_of(weight) is not None:
            return None
        norm, count = found
        if isinstance(norm, LayerNorm) and norm.b is not None:
            return None
        vector = _flat_vector(weight, normed.shape, count)
        if vector is None or normed.shape != op.shape:
            if weight in known:
                report.refuse(op, f"the weight of {list(weight.shape)} is no vector of {norm.shape[-1]}")
            return None
        if isinstance(norm, LayerNorm):
            report.hit("weight")
            return _back(norm.replace(w=vector), op.shape)
        vector, offset = _split_offset(vector)
        report.hit("weight" if offset == 0 else "weight-with-offset")
        return _back(norm.replace(w=vector, offset=offset), op.shape)

    def _shifted(self, op: Add, normed: Value, bias: Value, uses: Uses, report: Report) -> Value | None:
        found = _norm_of(normed)
        if found is None or not isinstance(found[0], LayerNorm) or found[0].b is not None or normed.shape != op.shape:
            return None
        vector = _flat_vector(bias, normed.shape, found[1])
        if vector is None:
            return None
        report.hit("bias")
        return _back(found[0].replace(b=vector), op.shape)

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
