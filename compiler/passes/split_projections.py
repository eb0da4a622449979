"""split-projections: a projection whose outputs are taken apart head by head becomes one projection a part.

Some models keep queries, keys and values of each head side by side: [heads, 3, dim] rows of one weight. Slicing that
apart costs a strided copy a token; slicing the weight costs nothing at run time. `merge-projections` then puts the
parts into one product again, one whole part after another.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import PackGroups
from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Reshape, Slice
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.rewriting import Renewed, rebuild


@dataclass(frozen=True)
class SplitProjections(Pass, name="split-projections"):
    """No options."""

    def run(self, graph: Graph, report: Report) -> Graph:
        parts: dict[Op, Linear] = {}

        def build(op: Op, renewed: Renewed) -> Value | None:
            if isinstance(op, Linear):
                slices = _strided_slices(graph, op)
                parts.update(dict.fromkeys(slices, op))
                if slices:
                    report.hit("projection")
            return _part(op, parts[op], renewed) if isinstance(op, Slice) and op in parts else None

        return rebuild(graph, build)


def _strided_slices(graph: Graph, linear: Linear) -> list[Slice]:
    """The slices through which a projection is used, if nothing else uses it and they cut within heads; else none."""
    if linear.residual is not None or linear in {value for _, value in graph.outputs}:
        return []
    slices: list[Slice] = []
    for user in graph.users.get(linear, ()):
        if not isinstance(user, Reshape) or user.shape[: linear.rank - 1] != linear.shape[:-1]:
            return []
        if user in {value for _, value in graph.outputs}:
            return []
        for part in graph.users.get(user, ()):
            if not isinstance(part, Slice) or isinstance(part.start, Dim) or isinstance(part.stop, Dim):
                return []
            axis = part.axis % part.rank
            # Behind a leading axis of size 1 a part is a run of outputs as it is.
            if axis < linear.rank or product(user.shape[linear.rank - 1 : axis]) == 1:
                return []
            slices.append(part)
    taken = sum(_features(part, linear) for part in slices)
    return slices if 0 < taken <= _features(linear, linear) else []


def _features(value: Value, linear: Linear) -> int:
    total = product(value.shape[linear.rank - 1 :])
    assert isinstance(total, int)
    return total


def _part(part: Slice, linear: Linear, renewed: Renewed) -> Value:
    """The slice as a projection of its own, in the slice's shape."""
    assert isinstance(part.x, Reshape)
    heads = part.x.shape[linear.rank - 1 :]
    axis = part.axis % part.rank - (linear.rank - 1)
    outputs = _features(part, linear)

    def rows(value: Value) -> Value:
        """The same slice of the first axis [outputs] of a weight or bias."""
        rest = value.shape[1:]
        taken = Slice(Reshape(value, (*heads, *rest)), axis, part.start, part.stop, part.step)
        return Reshape(taken, (outputs, *rest))

    bias = None if linear.bias is None else rows(linear.bias)
    return Reshape(linear.replace(x=renewed(linear.x), w=PackGroups.of_rows(linear.w, rows), bias=bias), part.shape)
