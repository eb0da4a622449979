"""Recognise products with a weight: t.matmul by a compile-time matrix becomes llm.linear, with its bias."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Add
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Matmul, Reshape, Transpose
from llmc.compiler.ir.types import FLOATS
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.rewriting import Uses, rewrite_counting, transposed, uncast, vector_of


def _matrix(value: Value) -> Value:
    """The rank-2 value under leading ones that a batched product's right side has been given."""
    if value.rank == 2:
        return value
    if isinstance(value, (Reshape, Broadcast)) and value.x.shape[-2:] == value.shape[-2:]:
        inner = _matrix(value.x)
        if inner.rank == 2:
            return inner
    return Reshape(value, value.shape[-2:]) if all(dim == 1 for dim in value.shape[:-2]) else value


@dataclass(frozen=True)
class FuseLinear(Pass, name="fuse-linear"):
    """x @ w for a w known when compiling -> llm.linear(x, w^T), whose weight is [outputs, inputs].

    A transpose of a transposed weight cancels, and a cast that widens a weight goes, since linear takes any float
    dtype. x that was flattened in front of the product is taken as it was. An added compile-time vector becomes the
    bias where nothing else reads the product.
    """

    def run(self, graph: Graph, report: Report) -> Graph:
        known = graph.constants

        def product_rule(op: Op, uses: Uses) -> Value | None:
            if not isinstance(op, Matmul):
                return None
            return self._product(op, known, report)

        def bias_rule(op: Op, uses: Uses) -> Value | None:
            if not isinstance(op, Add):
                return None
            for y, bias in ((op.a, op.b), (op.b, op.a)):
                if bias in known:
                    return self._biased(op, y, bias, uses, report)
            return None

        return rewrite_counting(rewrite_counting(graph, product_rule), bias_rule)

    def _product(self, op: Matmul, known: frozenset[Value], report: Report) -> Value | None:
        if op.b not in known:
            if op.a in known and op.a.rank == 2 and op.b.rank == 2 and op.dtype in FLOATS and 0 not in op.a.shape:
                return self._mirrored(op, report)
            return None
        if op.dtype not in FLOATS:
            report.refuse(op, f"the product is of {op.dtype}, not of floats")
            return None
        matrix = _matrix(op.b)
        if matrix.rank != 2:
            report.refuse(op, f"the weight has rank {op.b.rank}: one matrix a batch element")
            return None
        if op.a.shape[:-1] != op.shape[:-1]:
            report.refuse(op, f"the weight of {list(op.b.shape)} repeats the activations of {list(op.a.shape)}")
            return None
        if 0 in matrix.shape:
            report.refuse(op, f"the weight of {list(matrix.shape)} is empty")
            return None
        weight = transposed(matrix)
        report.hit("linear")
        flat = op.a
        if isinstance(flat, Reshape) and flat.x.rank >= 2 and flat.x.shape[-1] == flat.shape[-1]:
            return Reshape(Linear(flat.x, weight), op.shape)
        return Linear(flat, weight)

    def _mirrored(self, op: Matmul, report: Report) -> Value:
        """w @ x is (x^T @ w^T)^T."""
        report.hit("linear-transposed")
        columns = op.b
        rows = columns.x if isinstance(columns, Transpose) else Transpose(columns, (1, 0))
        return Transpose(Linear(rows, uncast(op.a)), (1, 0))

    def _biased(self, op: Add, y: Value, bias: Value, uses: Uses, report: Report) -> Value | None:
        linear = y.x if isinstance(y, Reshape) and y.shape[-1:] == y.x.shape[-1:] else y
        if not isinstance(linear, Linear) or y.shape != op.shape:
            return None
        if linear.bias is not None or linear.activation or linear.residual is not None:
            return None
        vector = vector_of(bias, linear.shape[-1])
        if vector is None:
            if product(bias.shape) != 1:
                report.refuse(op, f"the addend of {list(bias.shape)} is no vector of {linear.shape[-1]} outputs")
            return None
        if uses(y) > 1 or uses(linear) > 1:
            report.refuse(op, "the product is also used without its bias")
            return None
        report.hit("bias")
        biased = linear.replace(bias=vector)
        return biased if linear is y else Reshape(biased, op.shape)
