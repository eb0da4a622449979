"""Whether a kernel stays within its arrays on the stack, by what its indices can be: for code that no CPU here runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm import ir, sym
from tvm.tirx import PrimFunc

_PARTS = ("value", "a", "b", "args", "indices", "condition", "true_value", "false_value", "base", "vectors")


def beyond_arrays(function: PrimFunc) -> list[str]:
    """Accesses to arrays on the stack whose indices are not proved to lie within: from the bounds of loops, the values
    of lets, and the conditions around. function: before lowering, where each array has its shape."""
    found = _Walk()
    found.statement(function.body)
    return found.wrong


class _Walk:
    def __init__(self) -> None:
        self.analyzer = sym.Analyzer()
        self.arrays: list[Any] = []
        self.wrong: list[str] = []
        self.seen = 0

    def statement(self, statement: Any) -> None:
        kind = type(statement).__name__
        if kind == "AllocBuffer":
            self.arrays.append(statement.buffer)
        elif kind == "Bind":
            self.accesses(statement.value)
            if statement.value.ty.dtype in ("int32", "int64"):
                self.analyzer.bind(statement.var, statement.value)
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
            for part in statement.seq:
                self.statement(part)
        else:
            if kind == "BufferStore":
                self.check(statement)
                for index in statement.indices:
                    self.accesses(index)
            if getattr(statement, "value", None) is not None:
                self.accesses(statement.value)
            if getattr(statement, "body", None) is not None:
                self.statement(statement.body)

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


def _parts(expression: Any) -> Iterator[Any]:
    for name in _PARTS:
        part = getattr(expression, name, None)
        if isinstance(part, (list, tuple)) or type(part).__name__ == "Array":
            yield from part
        elif part is not None and not isinstance(part, (int, float, str, bool)):
            yield part
