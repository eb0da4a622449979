"""Statements of a kernel, emitted from ordinary Python: parameters, loops, register accumulators.

A thin skin over TVM's IR builder. Python loops unroll, Python functions emit; only `loop` and `when` leave control flow
in the generated code. Sizes and indices are int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

# The extent of a buffer's leading dimension where only the step knows it; it takes no part in addressing.
MANY = 1 << 40


def plain_function(
    pointers: Sequence[tuple[str, str]],
    sizes: Sequence[str],
    body: Callable[..., None],
    helpers: str = "",
) -> PrimFunc:
    """A plain C function: `pointers` are (name, dtype), then int64 `sizes`, begin and end.

    body(pointer variables by name, size variables by name) emits the statements. helpers: LLVM code to inline.
    """
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as I

    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name("kernel")
            handles = {name: I.arg(name, I.handle(dtype)) for name, dtype in pointers}
            numbers = {name: I.arg(name, I.int64()) for name in (*sizes, "begin", "end")}
            with I.attr(tirx.const(0, "int32"), "pragma_import_llvm", helpers) if helpers else nullcontext():
                body(handles, numbers)
        return builder.get()


def view(handle: Expr, shape: Sequence[int | Expr], dtype: str) -> Buffer:
    """A pointer parameter as an array."""
    from tvm.script.ir_builder import tirx as I

    return I.decl_buffer([index(s) for s in shape], dtype, data=handle)


def scratch(shape: Sequence[int] | int, dtype: str) -> Buffer:
    """Stack memory, of vectors; constant indices everywhere make it registers.

    The elements are vectors because TVM aligns an array of vectors to a vector, and an array of scalars to 16 bytes
    only; and because one aligned array makes LLVM align the whole frame, spilled registers included.
    """
    from tvm.script.ir_builder import tirx as I

    return I.alloc_buffer((shape,) if isinstance(shape, int) else tuple(shape), dtype, scope="local")


@contextmanager
def loop(extent: Expr | int) -> Iterator[Expr]:
    """`for (i = 0; i < extent; ++i)`."""
    from tvm.script.ir_builder import tirx as I

    with I.serial(index(extent)) as i:
        yield i


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """`if (condition)`."""
    from tvm.script.ir_builder import tirx as I

    with I.If(condition), I.Then():
        yield


def either(condition: Expr, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """`if (condition) yes else no`."""
    from tvm.script.ir_builder import tirx as I

    with I.If(condition):
        with I.Then():
            yes()
        with I.Else():
            no()


def let(value: Expr) -> Expr:
    """A variable with this value, for the rest of the scope.

    A computed index goes by way of memory that LLVM makes a register of. TVM writes whole numbers out again wherever
    their name stands, so that long expressions of an index stand in thousands of places: two seconds for one kernel.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as I

    computed = not isinstance(value, tirx.Var | tirx.IntImm)
    return Scalar("int64", value).get() if computed and str(value.ty.dtype) == "int64" else I.bind(value)


def index(value: int | Expr) -> Expr:
    """An int64 expression."""
    from tvm import tirx

    return tirx.const(value, "int64") if isinstance(value, int) else value


# What a kernel with `keep_order` imports: nothing happens, but as far as LLVM knows all memory may have changed.
ORDER_HELPER = """
    define void @llmc_keep_order() alwaysinline {
      call void asm sideeffect "", "~{memory}"()
      ret void
    }
    define void @llmc_order_scratch(ptr %scratch) alwaysinline {
      call void asm sideeffect "", "r,~{memory}"(ptr %scratch)
      ret void
    }
"""


def keep_order() -> None:
    """Loads and prefetches stay on their side of this statement. LLVM otherwise gathers a loop's prefetches in one
    place, and the memory idles until it comes there again. Needs `ORDER_HELPER`.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as I

    I.evaluate(tirx.call_extern("void", "llmc_keep_order"))


def order_scratch(buffer: Buffer) -> None:
    """From here on `keep_order` holds for this memory too: LLVM otherwise knows every access to the stack and to a
    kernel's pointers."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as I

    I.evaluate(tirx.call_extern("void", "llmc_order_scratch", buffer.data))


def clamped_rows(first: Expr, rows: int, tokens: Expr) -> list[Expr]:
    """Row indices first, first + 1, ..., none past the last row: a short block repeats it."""
    from tvm import tirx

    if rows == 1:
        return [let(first)]
    return [let(tirx.Min(first + m, tokens - 1)) for m in range(rows)]


class Registers:
    """`count` vector variables that live in registers (or spill to the stack): r[i] reads, r[i] = v writes."""

    def __init__(self, count: int, dtype: str) -> None:
        self.slots = [scratch(1, dtype) for _ in range(count)]

    def __getitem__(self, position: int) -> Expr:
        return self.slots[position][index(0)]

    def __setitem__(self, position: int, value: Expr) -> None:
        from tvm.script.ir_builder import tirx as I

        I.buffer_store(self.slots[position], value, [index(0)])


class Scalar:
    """A variable of a kernel, on the stack or in a register: `v.value` reads, `v.set(x)` writes."""

    def __init__(self, dtype: str, start: Expr | int | None = None) -> None:
        self.slot = scratch(1, dtype)
        if start is not None:
            self.set(start)

    @property
    def value(self) -> Expr:
        return self.slot[index(0)]

    def set(self, value: Expr | int) -> None:
        """An int is an int64."""
        from tvm.script.ir_builder import tirx as I

        I.buffer_store(self.slot, index(value), [index(0)])

    def get(self) -> Expr:
        """A variable with what it is now, for the rest of the scope."""
        from tvm.script.ir_builder import tirx as I

        return I.bind(self.value)
