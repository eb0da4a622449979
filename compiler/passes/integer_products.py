"""Recognise products of integers that stand for floats: what dynamic quantization writes becomes llm.linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Cast, Mul, Sub, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import RoundToIntegers, ScaleIntegers
from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Matmul, Reshape, Transpose
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.rewriting import Uses, rewrite_counting

_WIDE = ("i32", "i64", "f32")


@dataclass(frozen=True)
class IntegerProducts(Pass, name="integer-products"):
    """(round(x / s) + z - z) @ (q - zero) * s * scale -> llm.linear(x, what q stands for), activations rounded to int8.

    s is computed from x at run time. Kernels round each row by its own largest element, where the source rounds the
    whole tensor by one: a rounding in the graph is the lowest precision that kernels may use. Products by scales that
    are known when compiling stay: such scales also cut off what is beyond them.
    """

    exact: ClassVar[bool] = False
    moves: ClassVar[float] = 2.0**-4  # all of a tensor was rounded by one scale, 1 / 255 of its range, once a layer

    def run(self, graph: Graph, report: Report) -> Graph:
        known = graph.constants

        def rule(op: Op, uses: Uses) -> Value | None:
            return self._scaled(op, known, report) if isinstance(op, Mul) else None

        return rewrite_counting(graph, rule)

    def _scaled(self, op: Mul, known: frozenset[Value], report: Report) -> Value | None:
        factors = _factors(op)
        products = [(f, found) for f in factors if (found := _integer_product(f)) is not None]
        if len(products) != 1:
            return None
        factor, (rounded, weight, zero) = products[0]
        scales = [f for f in factors if f is not factor and _plain(f) is not _plain(rounded.scale)]
        if len(scales) != len(factors) - 2:
            report.refuse(op, "the product is not scaled by what its activations were divided by, once")
            return None
        if rounded.scale in known:
            report.refuse(op, "the activations' scale is known when compiling: what is beyond it is cut off")
            return None
        if weight not in known or weight.rank != 2 or any(s not in known for s in scales):
            report.refuse(op, "the weight is no matrix known when compiling, or its scale is not")
            return None
        if 0 in weight.shape:
            report.refuse(op, f"the weight of {list(weight.shape)} is empty")
            return None
        columns = weight.shape[1]
        rows = [_per_column(value, columns) for value in (*scales, *(() if zero is None else (zero,)))]
        if any(row is None for row in rows):
            report.refuse(op, "a scale or zero point is neither one number nor one a column")
            return None
        zeros = None if zero is None else rows.pop()
        scale: Value = constant(1.0, "f32")
        for index, row in enumerate(rows):
            assert row is not None
            scale = row if index == 0 else Mul(scale, row)
        report.hit("linear of rounded activations")
        linear = Linear(rounded.x, Transpose(ScaleIntegers(weight, scale, zeros), (1, 0)), rounding="int8")
        return linear if linear.shape == op.shape else Broadcast(linear, op.shape)


def _factors(value: Value) -> list[Value]:
    """What a tree of products multiplies."""
    if not isinstance(value, Mul):
        return [value]
    return [*_factors(value.a), *_factors(value.b)]


def _plain(value: Value) -> Value:
    """The value under changes of shape."""
    while isinstance(value, (Reshape, Broadcast)):
        value = value.x
    return value


def _integer_product(value: Value) -> tuple[RoundToIntegers, Value, Value | None] | None:
    """Rounded activations, the weight's integers and their zero points, of f32(a @ b)."""
    if not isinstance(value, Cast) or not isinstance(value.x, Matmul) or value.x.dtype not in _WIDE:
        return None
    rounded, zero = _centred(value.x.a)
    weight, weight_zero = _centred(value.x.b)
    if not isinstance(rounded, RoundToIntegers) or rounded.x.dtype != value.dtype:
        return None
    same = zero is rounded.zero or (zero is not None and _plain(zero) is rounded.zero)
    return (rounded, weight, weight_zero) if same else None


def _centred(value: Value) -> tuple[Value, Value | None]:
    """Integers and their zero point, of wide(q) - wide(zero)."""
    if isinstance(value, Sub):
        return _narrow(value.a), _narrow(_plain(value.b))
    return _narrow(value), None


def _narrow(value: Value) -> Value:
    """The integers that a cast has widened."""
    return value.x if isinstance(value, Cast) and value.to in _WIDE else value


def _per_column(value: Value, columns: object) -> Value | None:
    """[1, columns], or [1, 1] for one number; None where the value is neither."""
    size = product(value.shape)
    if size == 1:
        return Reshape(value, (1, 1))
    if size == columns and value.shape[-1] == columns:
        return Reshape(value, (1, value.shape[-1]))
    return None
