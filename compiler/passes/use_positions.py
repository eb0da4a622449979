"""use-positions: what counts tokens 0, 1, ... becomes the input `positions`, right in a mixture of sequences too.

A source graph is one sequence from its beginning, so that a count of tokens is their position. Counts are recognised by
their values: `arange(S)`, a running sum of ones minus one, either plus an offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Add, Cast, constant
from llmc.compiler.ir.graph import Graph, substitute_values
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Reshape
from llmc.compiler.ir.types import INTEGERS, Tensor
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.probe import LENGTH, Probe
from llmc.errors import IRError

_SIZES = (2, 3, 5, 8, 13)
_LONGEST = 1 << 16  # tokens that a count is evaluated for, at most


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
    if (
        not isinstance(op.type, Tensor)
        or op.dtype not in INTEGERS
        or probe.sources[op] - {LENGTH}
        or not probe.has_size(op)
    ):
        return None
    if probe.size is None or product(op.shape) != probe.size:
        return None
    offset: int | None = None
    # A count that stops somewhere, such as min(position, 511), shows it at the largest size.
    highest = min((symbol.high or _LONGEST for symbol in probe.size.symbols()), default=_LONGEST)
    for size in (*_SIZES, min(highest, _LONGEST)):
        try:
            found = probe.evaluate([op], size)[0].reshape(-1)
        except IRError:
            return None
        if offset is None:
            offset = int(found[0])
        if not np.array_equal(found, offset + np.arange(size)):
            return None
    return offset
