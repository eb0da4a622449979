"""How much of a thread's stack a kernel takes, read off the very allocations that its template makes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmc.errors import CompileError

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc, Stmt

# The pool's workers have 2 MiB (runtime/csrc/pool.c), and threads of a program itself mostly 1 MiB and more. Kernels do
# not call each other, so that one frame is all that a step adds.
MOST_STACK_BYTES = 512 << 10

ARRAY_ALIGNMENT = 64  # bytes; single numbers lie anywhere


def stack_bytes(function: PrimFunc) -> int:
    """Bytes of all arrays that a kernel has on the stack, each at its own place: what LLVM makes registers of counts,
    registers that it spills do not. function: before or after lowering."""
    total = 0
    for statement in _statements(function.body):
        buffer = getattr(statement, "buffer", None)
        if type(statement).__name__ != "AllocBuffer" or buffer is None:
            continue
        from tvm import DataType

        kind, size = DataType(buffer.dtype), math.prod(int(size) for size in buffer.shape)
        nbytes = size * -(-kind.bits * kind.lanes // 8)
        alignment = nbytes if size * kind.lanes == 1 else ARRAY_ALIGNMENT
        total += -(-nbytes // alignment) * alignment
    return total


def refuse_stack(nbytes: int) -> str:
    """Why a kernel cannot take so many bytes of the stack, empty where it can: no thread is sure to have more."""
    if nbytes <= MOST_STACK_BYTES:
        return ""
    return f"needs {nbytes >> 10} KiB of stack, and threads are sure of {MOST_STACK_BYTES >> 10}"


def check_stack(name: str, function: PrimFunc) -> None:
    """CompileError where a kernel would take more of the stack than any thread that runs it is sure to have."""
    reason = refuse_stack(stack_bytes(function))
    if reason:
        raise CompileError(
            f"kernel {name} {reason}: the layer is too wide for it. Give that layer another scheme (--override), or "
            "larger groups (--group-size)"
        )


def _statements(statement: Stmt) -> Iterator[Stmt]:
    """A statement and all within it."""
    waiting = [statement]
    while waiting:
        found = waiting.pop()
        yield found
        waiting += [
            part for name in ("body", "then_case", "else_case", "block") if (part := getattr(found, name, None))
        ]
        waiting += list(getattr(found, "seq", None) or ())
