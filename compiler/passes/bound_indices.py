"""bound-indices: every index is proved to be in range, or is checked when the step runs.

Kernels trust their indices. What this pass cannot prove from the ranges of inputs (`compiler/ir/ranges.py`), or by
trying every value of the one input that decides an index, goes through a `t.checked_index`, which ends the step with an
error. A check that is proved to hold is removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.dims import Dim, concrete, product, substitute, symbols_of
from llmc.compiler.ir.elementwise import Cast, Constant
from llmc.compiler.ir.evaluate import LoadParam, evaluate_values
from llmc.compiler.ir.graph import Graph, rewrite, topological
from llmc.compiler.ir.op import Input, Lookup, Op, Param, Tokens, Value
from llmc.compiler.ir.ranges import Range, Ranges
from llmc.compiler.ir.structural import Broadcast, CheckedIndex, Gather, Reshape, Slice, Transpose
from llmc.compiler.ir.types import INTEGERS, Array
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.probe import read_weight
from llmc.errors import LlmcError

_MOST_VALUES = 1 << 20  # of an index that is computed for every value of an input
_NAMES = 3  # of inputs in a message


@dataclass(frozen=True)
class BoundIndices(Pass, name="bound-indices"):
    """text: inputs are those of a step of tokens, which the runtime checks: `ids` below `vocabulary` (0: the rows of
    the table that they look up), `positions` below `context` (0: any). In any other graph inputs may have any value.
    """

    text: bool = False
    vocabulary: int = 0
    context: int = 0

    def run(self, graph: Graph, report: Report) -> Graph:
        limits = {"ids": self.vocabulary or _rows_of_ids(graph), "positions": self.context} if self.text else {}
        ranges = Ranges(_given(graph, limits) if self.text else {}, read_weight)

        def proved(index: Value, size: int | Dim) -> bool:
            return ranges.integers(index).within(0, size - 1) or _holds_for_all(index, size, limits)

        def rule(op: Op) -> Value | None:
            if isinstance(op, CheckedIndex):
                if op.sizes is not None or not proved(op.x, op.size):
                    return None
                report.hit("proved")
                return op.x if op.x.dtype == op.dtype else Cast(op.x, op.dtype)
            changes = {}
            for lookup in op.lookups():
                index: Value = getattr(op, lookup.field)
                if not proved(index, lookup.size):
                    report.hit("checked")
                    changes[lookup.field] = CheckedIndex(index, None, lookup.size, described(index, lookup))
            return op.replace(**changes) if changes else None

        return rewrite(graph, rule)


def _given(graph: Graph, limits: dict[str, int]) -> dict[Value, Range]:
    """What the runtime sees to before each step of tokens (docs/architecture.md has the inputs)."""
    inputs = {value.name: value for value in graph.inputs}
    if "ids" not in inputs:
        return {}
    tokens = inputs["ids"].shape[-1]
    found: dict[Value, Range] = {inputs[name]: Range(0, n - 1) for name, n in limits.items() if n and name in inputs}
    if "rows" in inputs:
        found[inputs["rows"]] = Range(0, tokens - 1)
    starts = inputs.get("starts")
    if starts is None:
        return found
    # No sequence is empty: the last start is that of a token, the first end is behind one.
    found[starts] = Range(0, tokens)
    last = starts.shape[0] - 1
    for op in graph.users.get(starts, ()):
        if isinstance(op, Slice) and (op.stop == last or op.start == 1):
            found[op] = Range(0 if op.start == 0 else 1, tokens - 1 if op.stop == last else tokens)
    return found


def _rows_of_ids(graph: Graph) -> int:
    """The rows of the smallest table that is looked up by token id; 0 where none is."""
    found = []
    for op in graph.ops:
        for lookup in op.lookups():
            index: Value = getattr(op, lookup.field)
            while isinstance(index, (Cast, Reshape, CheckedIndex)):
                index = index.x
            if isinstance(index, Input) and index.name == "ids" and isinstance(lookup.size, int):
                found.append(lookup.size)
    return min(found, default=0)


def _holds_for_all(index: Value, size: int | Dim, limits: dict[str, int]) -> bool:
    """Whether an index that one input decides, by whole numbers only, is in range for each value of that input."""
    if not limits or not isinstance(size, int):
        return False
    if any(value.dtype not in (*INTEGERS, "bool") for value in topological([index]) if isinstance(value, Op)):
        return False  # floats may be rounded otherwise in kernels
    found = for_all_values(index, limits, read_weight)
    return found is not None and not outside(found[1], size).any()


def outside(index: Array, size: int) -> Array:
    """Which indices are not in 0 .. size - 1."""
    return np.asarray((index < 0) | (index >= size))


_SHAPES = (Reshape, Broadcast, Transpose, Constant)


def for_all_values(index: Value, limits: dict[str, int], load: LoadParam) -> tuple[Input, Array] | None:
    """(input, index) where one input of tokens decides an index, a token alone: the index for each of its values.

    limits: how many values inputs have, by name. None for an index that is not made so, or that is too large.
    """
    values = topological([index])
    inputs = [value for value in values if isinstance(value, Input)]
    if len(inputs) != 1 or not limits.get(inputs[0].name):
        return None
    for value in values:
        if isinstance(value, Gather) and not any(item is inputs[0] for item in topological([value.x])):
            continue
        if isinstance(value, Op) and value.tokens is not Tokens.ELEMENTS and not isinstance(value, _SHAPES):
            return None
    source, count = inputs[0], limits[inputs[0].name]
    binding = {symbol.name: count for dim in source.shape for symbol in symbols_of(dim)}
    sizes = [substitute(product(value.shape), binding) for value in (source, *values) if not isinstance(value, Param)]
    if sizes[0] != count or not all(isinstance(size, int) and size <= _MOST_VALUES for size in sizes):
        return None
    given = np.arange(count, dtype=np.int32).reshape([concrete(dim, binding) for dim in source.shape])
    try:
        found = evaluate_values([index], {source: given}, load, binding)["0"]
    except LlmcError:
        return None
    return (source, found) if isinstance(found, np.ndarray) else None


def described(index: Value, lookup: Lookup) -> str:
    """`axis 0 of wte.weight, by ids`: what is looked up, and which inputs decide where."""
    names = [value.name for value in topological([index]) if isinstance(value, Input)]
    by = ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")
    return f"axis {lookup.axis} of {table_name(lookup.table)}" + (f", by {by}" if by else "")


def table_name(table: Value) -> str:
    """The weight or input that a table is, or is made of, for messages."""
    if isinstance(table, (Input, Param)):
        return table.name
    made = topological([table])
    params = [value.name for value in made if isinstance(value, Param)]
    if any(isinstance(value, Input) for value in made):
        return "a value that is computed"
    return params[0] if params else "a constant table"
