"""How many positions a graph of one sequence has room for: the ends of its tables of positions."""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.dims import Symbol, symbol
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.structural import Gather, Slice
from llmc.compiler.ir.types import Array
from llmc.errors import LlmcError
from llmc.frontends.lifted import WeightSource


def longest_sequence(graph: Graph, size: Symbol, weights: WeightSource) -> int | None:
    """The most tokens that every table of positions and every stored mask has rows for; None: no limit is found.

    Tables may be read from a later row on (OPT and RoBERTa leave two rows out): the rows that a short sequence reads
    are evaluated.
    """
    found = []
    for op in graph.ops:
        if isinstance(op, Gather) and op.x in graph.constants and op.indices not in graph.constants:
            rows = op.x.shape[op.axis]
            first = _last_index(graph, op.indices, size, 1, weights)
            if not isinstance(rows, int) or first is None or first >= rows:
                continue
            # What does not count tokens, such as the kind of a token, is no position; nor is a bucket of distances,
            # which counts a few tokens only: neither ever reads the row behind the last one.
            if _last_index(graph, op.indices, size, rows - first + 1, weights) == rows:
                found.append(rows - first)
        elif isinstance(op, Slice) and op.x in graph.constants and not isinstance(op.stop, int):
            rows, extra = op.x.shape[op.axis], op.stop - symbol(size.name, size.low, size.high)
            if isinstance(rows, int) and isinstance(extra, int):
                found.append(rows - extra)
    return min(found, default=None)


def _last_index(graph: Graph, indices: Value, size: Symbol, tokens: int, weights: WeightSource) -> int | None:
    """The greatest row that a sequence of `tokens` tokens reads; None where that depends on the words."""
    given: dict[Value, Array] = {
        value: np.arange(tokens, dtype=np.int32).reshape(1, tokens)
        for value in graph.inputs
        if value.name == "positions"
    }
    try:
        found = np.asarray(evaluate_values([indices], given, weights.load, {size.name: tokens})["0"])
    except LlmcError:
        return None
    return int(found.max()) if found.size else None
