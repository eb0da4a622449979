"""Constant folding: small values that depend on neither inputs nor params are computed now."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Cast, Constant, Floor, FloorDivide, Round, constant
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Iota
from llmc.compiler.ir.types import FLOATS, INTEGERS, NUMPY_DTYPES, Array, Tensor, precise
from llmc.compiler.passes.manager import Pass, Report

_ROUNDING = ("bf16", "f16")


@dataclass(frozen=True)
class Fold(Pass, name="fold"):
    """Values made of `t.constant` and `t.iota` only become one constant, up to `limit` elements.

    Params stay symbolic: what depends on them is evaluated, streamed, when an artifact is written. Arithmetic is done
    in f64 and rounded once at the end, unless the values pass through a 16-bit float, whose rounding is then intended;
    functions that jump (a cast to integers, a floor) are evaluated in the source's own dtypes, as its author saw them.
    A broadcast is no gain by itself and stays.
    """

    limit: int = 65536

    def run(self, graph: Graph, report: Report) -> Graph:
        data: dict[Value, Array] = {}
        plain: dict[Value, Array] = {}  # the same in the ops' own dtypes
        rounded: set[Value] = set()
        for op in graph.ops:
            if self._foldable(op, data):
                rounds = isinstance(op, Cast) and op.to in _ROUNDING
                if rounds or any(operand in rounded for operand in op.operands):
                    rounded.add(op)
                plain[op] = _plainly(op, plain)
                data[op] = plain[op] if _jumps(op) else _evaluate(op, data, op in rounded)
        replaced: dict[Value, Value] = {}
        wanted = {value for _, value in graph.outputs}
        wanted.update(operand for op in graph.ops if op not in data for operand in op.operands)
        for value, array in data.items():
            if value in wanted and not isinstance(value, (Constant, Iota, Broadcast)):
                replaced[value] = constant(array, value.dtype)
                report.hit("constant")
        return substitute_values(graph, replaced) if replaced else graph

    def _foldable(self, op: Op, data: dict[Value, Array]) -> bool:
        if op.level != "t" or not isinstance(op.type, Tensor):
            return False
        if not all(operand in data for operand in op.operands):
            return False
        size = product(op.shape)
        return isinstance(size, int) and size <= self.limit and all(isinstance(dim, int) for dim in op.shape)


def _jumps(op: Op) -> bool:
    """Whether the least change of a float may change the result by 1: in f64, 1.9999999 may be what was 2.0 in f32."""
    if isinstance(op, Cast):
        return op.x.dtype in FLOATS and op.to in (*INTEGERS, "bool")
    return isinstance(op, (Floor, Round, FloorDivide)) and op.dtype in FLOATS


def _plainly(op: Op, plain: dict[Value, Array]) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(op.evaluate(*(plain[operand] for operand in op.operands)))


def _evaluate(op: Op, data: dict[Value, Array], rounded: bool) -> Array:
    # No t-level op has an optional operand, so the flat operands are the arguments.
    arguments = [data[operand] for operand in op.operands]
    if rounded:
        arguments = [
            value.astype(NUMPY_DTYPES[operand.dtype]) for value, operand in zip(arguments, op.operands, strict=True)
        ]
    # Folding 1/0 or log(0) is as legitimate as computing it at run time.
    with np.errstate(all="ignore"):
        if rounded:
            return np.asarray(op.evaluate(*arguments))
        with precise():
            return np.asarray(op.evaluate(*arguments))
