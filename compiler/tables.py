"""Tables that are read by position or token id: a context or a vocabulary that is larger than they are is refused.

What an index may be otherwise is settled in `passes/bound_indices.py`: in range for all inputs, or looked at when a
step runs. An index that positions or token ids alone decide is known when compiling, for each of their values.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.attention import PagedAttention
from llmc.compiler.ir.evaluate import LoadParam
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.ragged import RelativeBias, span_of
from llmc.compiler.ir.structural import CheckedIndex
from llmc.compiler.ir.types import Array
from llmc.compiler.passes.bound_indices import for_all_values, outside, table_name
from llmc.errors import CompileError


def check_tables(graph: Graph, max_context: int, vocabulary: int, load: LoadParam) -> None:
    """CompileError where a token at a position below max_context, or an id below `vocabulary`, reads beyond a table.

    graph: after all passes. Every value of an input that alone decides an index is tried.
    """
    limits = {"positions": max_context, "ids": vocabulary}
    for op in graph.ops:
        distances = op.table if isinstance(op, RelativeBias) else op.bias if isinstance(op, PagedAttention) else None
        if distances is not None and span_of(distances) < max_context:
            raise CompileError(
                f"a context of {max_context} tokens needs more distances than the {span_of(distances)} of "
                f"{table_name(distances)}: give --max-context {span_of(distances)} or less"
            )
        if not isinstance(op, CheckedIndex) or not isinstance(op.size, int) or op.sizes is not None:
            continue
        found = for_all_values(op.x, limits, load)
        if found is None:
            continue
        source, index = found
        wrong = outside(np.where(index < 0, index + op.size, index), op.size)
        if wrong.any():
            limit = limits[source.name]
            raise CompileError(_refusal(source.name, _table(graph, op), op.size, limit, index, wrong))


def _table(graph: Graph, check: CheckedIndex) -> str:
    """The name of what a checked index is for."""
    for user in graph.users.get(check, ()):
        for lookup in user.lookups():
            if getattr(user, lookup.field) is check:
                return table_name(lookup.table)
    return "a table"


def _refusal(name: str, table: str, rows: int, limit: int, index: Array, wrong: Array) -> str:
    """What reads beyond a table, and the greatest context that does not."""
    place = int(np.argmax(wrong.reshape(-1)))
    if name == "ids":
        return (
            f"{table} has {rows} rows, and the model a vocabulary of {limit}, one of which looks up row "
            f"{index.reshape(-1)[place]}: the checkpoint's config is wrong"
        )
    text = f"a context of {limit} tokens needs more rows than the {rows} of {table}"
    # Where there is an index a position, those before the first wrong one are right.
    return f"{text}: give --max-context {place} or less" if index.size == limit and place > 1 else text
