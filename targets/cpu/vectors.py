"""Rows of numbers as vectors: loads and stores that convert, tails of any length, reductions, lane permutations.

A tail is read with ever narrower vectors (8, 4, 2, 1 lanes), never past its end: cheaper to reason about than masks,
and not every machine has masks for f16. Buffers here are flat and indexed by int64 element offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llmc.targets.cpu.builder import MANY, index, let, loop, plain_function, scratch, view
from llmc.targets.cpu.builder import prefetch as prefetch_line
from llmc.targets.cpu.vector_isa import CACHE_LINE

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc


def range_kernel(
    pointers: Sequence[tuple[str, str]],
    sizes: Sequence[str],
    unit: Callable[[SimpleNamespace, Expr], None],
    helpers: str = "",
) -> PrimFunc:
    """A kernel that does its units one after the other.

    unit(arguments, u) emits the work of unit u; `arguments` has the pointers as flat buffers and the sizes, by name.
    helpers: LLVM code that the statements call.
    """

    def body(handles: dict[str, Expr], numbers: dict[str, Expr]) -> None:
        buffers = {name: view(handles[name], [MANY], dtype) for name, dtype in pointers}
        arguments = SimpleNamespace(**buffers, **numbers)
        with loop(arguments.end - arguments.begin) as step:
            unit(arguments, pin(arguments.begin + step))

    return plain_function(pointers, sizes, body, helpers)


def pieces(length: int, lanes: int) -> list[tuple[int, int]]:
    """[0, length) as (offset, width) vectors: full ones, then the tail in powers of two."""
    out = []
    offset, width = 0, lanes
    while offset < length:
        if offset + width <= length:
            out.append((offset, width))
            offset += width
        else:
            width //= 2
    return out


def for_pieces(length: int, lanes: int, body: Callable[[Expr | int, int], None]) -> None:
    """body(offset, width) over [0, length): a loop over full vectors, then the tail's narrower ones."""
    full = length // lanes
    if full:
        with loop(full) as number:
            body(number * lanes, lanes)
    for offset, width in pieces(length, lanes)[full:]:
        body(offset, width)


def typed(dtype: str, lanes: int) -> str:
    """The name of a vector type; one lane is a scalar."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(value: Expr | float, lanes: int, dtype: str = "float32") -> Expr:
    """A scalar in every lane."""
    from tvm import tirx

    scalar = tirx.const(value, dtype) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    """`value` converted to `dtype`, lane by lane."""
    return value.astype(typed(dtype, lanes))


def _span(start: Expr | int, lanes: int) -> Expr:
    from tvm import tirx

    return index(start) if lanes == 1 else tirx.Ramp(index(start), index(1), lanes)


def load_raw(buffer: Buffer, start: Expr | int, lanes: int) -> Expr:
    """`lanes` elements from `start` on, in the buffer's dtype."""
    from tvm import tirx

    return tirx.BufferLoad(buffer, [_span(start, lanes)])


def load(buffer: Buffer, start: Expr | int, lanes: int) -> Expr:
    """`lanes` elements from `start` on, as f32. A uint16 buffer holds the bits of bfloat16 numbers."""
    from tvm import tirx

    value = load_raw(buffer, start, lanes)
    dtype = str(buffer.dtype)
    if dtype == "float32":
        return value
    if dtype == "uint16":
        bits = cast(value, "uint32", lanes) << splat(16, lanes, "uint32")
        return tirx.reinterpret(typed("float32", lanes), bits)
    return cast(value, "float32", lanes)


def store(buffer: Buffer, start: Expr | int, value: Expr, lanes: int) -> None:
    """Store an f32 vector from `start` on, rounded to the buffer's dtype (to nearest, ties to even)."""
    from tvm.script.ir_builder import tirx as I

    if str(buffer.dtype) != "float32":
        value = cast(value, str(buffer.dtype), lanes)
    I.buffer_store(buffer, value, [_span(start, lanes)])


def permute(values: Sequence[Expr], order: Sequence[int]) -> Expr:
    """The lanes of the concatenated `values`, in a constant order; one lane is a scalar."""
    from tvm import tirx

    return tirx.Shuffle(list(values), [tirx.const(lane, "int32") for lane in order])


def reduce_lanes(value: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes combined into one scalar, by halves: a tree, so the order of additions is fixed."""
    while lanes > 1:
        whole = let(value)
        lanes //= 2
        low, high = range(lanes), range(lanes, 2 * lanes)
        value = combine(permute([whole], list(low)), permute([whole], list(high)))
    return let(value)


def add(left: Expr, right: Expr) -> Expr:
    return left + right


def maximum(left: Expr, right: Expr) -> Expr:
    from tvm import tirx

    return tirx.Max(left, right)


def reciprocal_root(total: Expr, features: int, eps: float) -> Expr:
    """1 / sqrt(total / features + eps), what a norm multiplies a row of f32 by whose squares add up to `total`."""
    from tvm import tirx

    return let(tirx.const(1.0, "float32") / tirx.sqrt(total * (1.0 / features) + tirx.const(eps, "float32")))


def integer(value: Expr) -> Expr:
    """An index read from memory (i32), as int64 for address arithmetic."""
    return pin(value.astype("int64"))


def pin(value: Expr) -> Expr:
    """A variable for an int64 index that TVM must not substitute into its uses.

    TVM inlines integer `let`s everywhere; a chain of divisions then grows exponentially and takes minutes to simplify.
    A load is never inlined, and LLVM turns the one-element array back into a register.
    """
    from tvm.script.ir_builder import tirx as I

    slot = scratch(1, "int64")
    I.buffer_store(slot, value, [index(0)])
    return let(load_raw(slot, 0, 1))


def divide(value: Expr, divisor: Expr | int) -> Expr:
    """value // divisor of numbers that are not negative: the machine's own division, no sign fix-up."""
    from tvm import tirx

    return tirx.truncdiv(value, index(divisor))


def remainder(value: Expr, divisor: Expr | int) -> Expr:
    """value % divisor of numbers that are not negative."""
    from tvm import tirx

    return tirx.truncmod(value, index(divisor))


def copy(lanes: int, source: Buffer, start: Expr, target: Buffer, at: Expr, elements: int) -> None:
    """`elements` of target from `at` on = source from `start` on, rounded to the target's dtype."""
    for_pieces(elements, lanes, lambda i, width: store(target, at + i, load(source, start + i, width), width))


def store_int(buffer: Buffer, position: Expr, value: Expr) -> None:
    """Store an int64 index in an i32 array."""
    from tvm.script.ir_builder import tirx as I

    I.buffer_store(buffer, value.astype("int32"), [index(position)])


def copy_element(source: Buffer, start: Expr | int, target: Buffer, at: Expr | int) -> None:
    """target[at] = source[start], of the same dtype."""
    from tvm.script.ir_builder import tirx as I

    I.buffer_store(target, load_raw(source, start, 1), [index(at)])


def prefetch(buffer: Buffer, start: Expr | int, elements: int) -> None:
    """Ask for the cache lines of `elements` elements from `start` on, to be read soon."""
    from tvm import DataType

    line = CACHE_LINE * 8 // DataType(str(buffer.dtype)).bits
    for offset in range(0, elements, line):
        prefetch_line(buffer, index(start) + offset)


def aligned_scratch(elements: int, lanes: int, dtype: str = "float32") -> Buffer:
    """Stack memory for 32-bit numbers whose start is aligned to a vector, for arrays with computed indices.

    TVM aligns an array of scalars to 16 bytes only, so that most vector accesses would straddle two cache lines; an
    array of vectors is aligned to a vector. This is one, seen as scalars.
    """
    from tvm.script.ir_builder import tirx as I

    vectors = scratch(-(-elements // lanes), typed(dtype, lanes))
    return I.decl_buffer((index(elements),), dtype, data=vectors.data, scope="local")


# What a kernel with `keep_in_memory` imports: nothing happens, but as far as LLVM knows anyone may now use the array.
MEMORY_HELPER = """
    define void @llmc_keep_in_memory(ptr %start) alwaysinline {
      call void asm sideeffect "", "r,~{memory}"(ptr %start)
      ret void
    }
"""


def keep_in_memory(buffer: Buffer) -> None:
    """This stack array stays one. Where all its indices are constant LLVM makes registers of it, however many they are,
    and spills what does not fit in the middle of the loops that should have had the registers. Needs `MEMORY_HELPER`.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as I

    I.evaluate(tirx.call_extern("void", "llmc_keep_in_memory", tirx.address_of(buffer[index(0)])))
