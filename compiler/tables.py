"""Tables that are read by position or token id: proof that no row beyond their end is ever asked for.

Kernels do not check indices, so a context that is longer than a table of learned positions must be refused when
compiling. The index of each lookup is evaluated at the smallest and the largest value that the runtime lets through.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.evaluate import LoadParam, evaluate_values
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.structural import Gather
from llmc.errors import CompileError


def check_tables(graph: Graph, max_context: int, vocabulary: int, load: LoadParam) -> None:
    """CompileError where a token at a position below max_context, or an id below `vocabulary`, reads beyond a table.

    graph: after all passes, over inputs `positions` and `ids` of shape [T]. Only lookups whose index depends on one of
    the two alone are looked at; other indices are made by ops whose results are bounded by construction.
    """
    highest = {"positions": max_context - 1, "ids": vocabulary - 1}
    for op in graph.ops:
        table, index = _lookup(op)
        if table is None or index is None:
            continue
        rows = table.shape[0]
        inputs = [value for value in topological([index]) if isinstance(value, Input)]
        if not isinstance(rows, int) or len(inputs) != 1 or inputs[0].name not in highest or inputs[0].rank != 1:
            continue
        name = inputs[0].name
        ends = np.array([0, highest[name]], np.int32)
        found = evaluate_values([index], {inputs[0]: ends}, load, dict.fromkeys((s.name for s in graph.symbols), 2))
        last = int(np.max(np.asarray(found["0"])))
        if last >= rows:
            raise CompileError(_refusal(name, _name(table), rows, max_context, vocabulary, last))


def _lookup(op: Op) -> tuple[Value | None, Value | None]:
    """(table, index) of an op that reads rows by index."""
    if isinstance(op, Embed):
        return op.table, op.ids
    if isinstance(op, Gather) and op.axis == 0:
        return op.x, op.indices
    return None, None


def _name(table: Value) -> str:
    names = [value.name for value in topological([table]) if isinstance(value, Param)]
    return names[0] if names else "a constant table"


def _refusal(name: str, table: str, rows: int, max_context: int, vocabulary: int, last: int) -> str:
    if name == "ids":
        return f"{table} has {rows} rows, and the model a vocabulary of {vocabulary}: the checkpoint's config is wrong"
    most = max_context - (last - rows + 1)
    return (
        f"a context of {max_context} tokens needs more rows than the {rows} of {table}: "
        f"give --max-context {most} or less"
    )
