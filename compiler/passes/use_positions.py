"""use-positions: what counts tokens 0, 1, ... becomes the input `positions`, right in a mixture of sequences too.

A source graph is one sequence from its beginning, so that a count of tokens is their position. Counts are recognised by
their values, for every token of the longest sequence: `arange(S)`, a running sum of ones minus one, either plus an
offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Add, Cast, constant
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Reshape
from llmc.compiler.ir.types import INTEGERS, Array, Tensor
from llmc.compiler.passes.lengths import Unsettled, regimes, settled
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.probe import LENGTH, Probe
from llmc.errors import IRError

_FEW = 3  # tokens that are looked at first


@dataclass(frozen=True)
class UsePositions(Pass, name="use-positions"):
    """No options."""

    def run(self, graph: Graph, report: Report) -> Graph:
        probe = Probe(graph)
        if probe.positions is None or probe.size is None:
            return graph
        replaced: dict[Value, Value] = {}
        for op in graph.ops:
            offset = _offset(probe, op)
            if offset is None:
                continue
            count: Value = Reshape(probe.positions, op.shape)
            count = count if count.dtype == op.dtype else Cast(count, op.dtype)
            replaced[op] = Add(count, constant(offset, op.dtype)) if offset else count
        if not replaced:
            return graph
        after = substitute_values(graph, replaced)
        for value in replaced.values():
            if value in after.users:
                report.hit("count")
        # Counts are inputs of other counts only where those were not recognised.
        return Graph(after.name, graph.inputs, after.outputs)


def _offset(probe: Probe, op: Op) -> int | None:
    """c where the integers `op` are c, c + 1, ..., one a token, for every number of tokens; else None."""
    if not isinstance(op.type, Tensor) or op.dtype not in INTEGERS or probe.longest is None:
        return None
    if probe.sources[op] - {LENGTH} or not probe.has_size(op) or product(op.shape) != probe.size:
        return None
    if probe.decided_by_other_sizes(op):
        return None
    try:
        counted: Value = op
        if probe.depends_on_length(op):
            # Such as the tokens of an empty past before these: numbers that every length leaves as they are.
            own, *others = regimes(probe, [op]).values
            if others:
                return None
            counted = settled(op, own)
        if not _counts(probe.evaluate([counted], _FEW, exact=False)[0]):
            return None  # most other integers
        # What no length decides is the same in a shorter sequence: the longest one says all.
        found = probe.evaluate([counted], probe.longest, exact=False)[0]
    except (IRError, Unsettled):
        return None
    return int(found.reshape(-1)[0]) if _counts(found) else None


def _counts(values: Array) -> bool:
    flat = values.reshape(-1)
    return np.array_equal(flat, flat[0] + np.arange(len(flat)))
