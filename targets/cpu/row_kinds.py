"""Which arithmetic a row gets on machines that have one for few rows and another for many: those with tile registers.

In steps of several sequences it is decided by what a row is, never by how many there are, so that no row changes with
its company. Rows of prompts, and of texts that are encoded, have the arithmetic of many rows, also when they are few;
rows that decode, rows whose logits are wanted, and rows of whole sequences have that of few, also when they are many. A
step says which kind its tokens are (`LLMC_PROMPT` of runtime/csrc/step.h); all of them are of one kind.

Where a step sees one sequence only, or arrays, the number of rows decides, by what is faster.
"""

from __future__ import annotations

from llmc.compiler.ir.dims import Dim, Symbol, symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.types import KV
from llmc.targets.kernel import Range

PROMPT = symbol("PROMPT", 0, 1)
Guard = tuple[Range, ...] | None

_OF_A_STEP = ("T",)
_ALWAYS_FEW = ("R", "B")


def plain_symbol(rows: int | Dim) -> str | None:
    """The symbol's name when a size is just that symbol."""
    if isinstance(rows, int):
        return None
    monomial, coefficient = rows.terms[0]
    if len(rows.terms) != 1 or coefficient != 1 or len(monomial) != 1:
        return None
    atom, power = monomial[0]
    return atom.name if isinstance(atom, Symbol) and power == 1 else None


def in_company(graph: Graph) -> bool:
    """Whether steps have rows of several sequences: they have a cache, or say where each sequence starts."""
    return any(isinstance(value.type, KV) or value.name == "starts" for value in graph.inputs)


def only_few(rows: int | Dim, graph: Graph) -> bool:
    """Whether these rows have the arithmetic of few rows in every step."""
    return in_company(graph) and plain_symbol(rows) in _ALWAYS_FEW


def guard(rows: int | Dim, low: int, high: int | None) -> Guard:
    """The condition low <= rows <= high (None: no limit) as guards of a call; None where it never holds.

    Of a size that is no plain symbol nothing is known: only what has no upper limit serves it.
    """
    if isinstance(rows, int):
        return () if low <= rows and (high is None or rows <= high) else None
    name = plain_symbol(rows)
    if name is None:
        return () if high is None else None
    return (Range(name, low, high),) if low > 1 or high is not None else ()


def few_when(rows: int | Dim, low: int, high: int | None, many_from: int | None, graph: Graph) -> Guard:
    """When a kernel for `low` to `high` rows runs that has the arithmetic of few, if that of many serves `many_from`
    rows and more (None: it serves no number)."""
    if many_from is None or only_few(rows, graph):
        return guard(rows, low, high)
    if in_company(graph) and plain_symbol(rows) in _OF_A_STEP:
        found = guard(rows, low, high)
        return None if found is None else (*found, Range(str(PROMPT), 0, 0))
    most = many_from - 1 if high is None else min(high, many_from - 1)
    return guard(rows, low, most) if low <= most else None


def many_when(rows: int | Dim, low: int, high: int | None, many_from: int, graph: Graph) -> Guard:
    """When a kernel for `low` to `high` rows runs that has the arithmetic of many, which serves `many_from` and more
    rows."""
    if only_few(rows, graph):
        return None
    if in_company(graph) and plain_symbol(rows) in _OF_A_STEP:
        found = guard(rows, 1 if low == many_from else low, high)
        return None if found is None else (*found, Range(str(PROMPT), 1, None))
    return guard(rows, low, high)
