"""Whether a kernel stays within its arrays on the stack, by what its indices can be: for code that no CPU here runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import ir, sym
from tvm.tirx import PrimFunc

NO_BOUND = 1 << 62
_PARTS = ("value", "a", "b", "args", "indices", "condition", "true_value", "false_value", "base", "vectors")


def beyond_arrays(function: PrimFunc, views: bool = False) -> list[str]:
    """Accesses to arrays on the stack whose indices are not proved to lie within: from the bounds of loops, the values
    of lets, what is ever stored in a variable, and the conditions around. function: before lowering, where each array
    has its shape. A variable is taken to be set before it is read. views: accesses by another shape
    too, which is not proved of all kernels yet."""
    first = _Walk([], views)
    first.statement(function.body)
    second = _Walk(first.stored, views)
    second.statement(function.body)
    return second.wrong


@dataclass(frozen=True)
class _Stored:
    """Between which values a number is that is stored in a variable."""

    variable: Any
    least: int
    most: int


class _Walk:
    """variables: the least and the most that is ever stored in a variable (an array of one index); of those that are
    not there only the statement before tells something."""

    def __init__(self, variables: list[_Stored], views: bool) -> None:
        self.views = views
        self.analyzer = sym.Analyzer()
        self.variables = variables
        self.stored: list[_Stored] = []
        self.arrays: list[Any] = []
        self.wrong: list[str] = []
        self.seen = 0

    def statement(self, statement: Any, before: Any = None) -> None:
        kind = type(statement).__name__
        if kind == "AllocBuffer":
            self.arrays.append(statement.buffer)
        elif kind == "DeclBuffer" and self.views:
            # A view of an array has a shape of its own, of no more than is there.
            seen = getattr(statement.data, "args", ())
            if seen and any(seen[0].same_as(array) for array in self.arrays):
                self.arrays.append(statement.buffer)
        elif kind == "Bind":
            self.accesses(statement.value)
            if statement.value.ty.dtype in ("int32", "int64"):
                self.bind(statement, before)
        elif kind == "For":
            self.analyzer.bind(statement.loop_var, ir.Range.from_min_extent(statement.min, statement.extent))
            self.statement(statement.body)
        elif kind == "IfThenElse":
            self.accesses(statement.condition)
            with self.analyzer.constraint_scope(statement.condition):
                self.statement(statement.then_case)
            if statement.else_case is not None:
                self.statement(statement.else_case)
        elif kind == "SeqStmt":
            for part, previous in zip(statement.seq, [None, *statement.seq], strict=False):
                self.statement(part, previous)
        else:
            if kind == "BufferStore":
                self.check(statement)
                self.remember(statement)
                for index in statement.indices:
                    self.accesses(index)
            if getattr(statement, "value", None) is not None:
                self.accesses(statement.value)
            if getattr(statement, "body", None) is not None:
                self.statement(statement.body)

    def bind(self, statement: Any, before: Any) -> None:
        """What a let's variable is: its value, what was stored there in the statement before, or what ever is."""
        value = statement.value
        if type(value).__name__ == "TensorLoad" and _is_variable(value.source):
            if type(before).__name__ == "BufferStore" and before.buffer.same_as(value.source):
                self.analyzer.bind(statement.var, before.value)
                return
            stored = [known for known in self.variables if known.variable.same_as(value.source)]
            if stored:
                least, most = min(known.least for known in stored), max(known.most for known in stored)
                if least > -NO_BOUND and most < NO_BOUND:
                    self.analyzer.bind(statement.var, ir.Range(least, most + 1))
            return
        self.analyzer.bind(statement.var, value)

    def remember(self, store: Any) -> None:
        """That a variable may have this value."""
        if _is_variable(store.buffer):
            bound = self.analyzer.const_int_bound(store.value)
            self.stored.append(_Stored(store.buffer, bound.min_value, bound.max_value))

    def accesses(self, expression: Any) -> None:
        """All loads in an expression."""
        if type(expression).__name__ == "TensorLoad":
            self.check(expression)
        for part in _parts(expression):
            self.accesses(part)

    def check(self, access: Any) -> None:
        accessed = access.buffer if hasattr(access, "buffer") else access.source
        shape = next((array.shape for array in self.arrays if array.same_as(accessed)), None)
        for index, size in zip(access.indices, shape or (), strict=shape is not None):
            self.seen += 1
            last = index
            if type(index).__name__ == "Ramp":
                index, last = index.base, index.base + index.stride * (index.lanes - 1)
            if not (self.analyzer.can_prove(index >= 0) and self.analyzer.can_prove(last < size)):
                self.wrong.append(f"{index} of {size} in {accessed.name}")


def _is_variable(buffer: Any) -> bool:
    return str(buffer.dtype) == "int64" and [int(size) for size in buffer.shape] == [1]


def _parts(expression: Any) -> Iterator[Any]:
    for name in _PARTS:
        part = getattr(expression, name, None)
        if isinstance(part, (list, tuple)) or type(part).__name__ == "Array":
            yield from part
        elif part is not None and not isinstance(part, (int, float, str, bool)):
            yield part
