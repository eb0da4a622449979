"""Vectors of numbers in memory: the words that kernels move them by, tails of any length, reductions, permutations.

`load`, `store`, `splat`, `reduce` and `prefetch` are all there are. An element is given by its index, or by a tuple of
them where the buffer has several dimensions; indices are int64. A vector of one lane is a scalar.

The elements behind the last whole vector of a row are its *tail*, and nothing past it may be read or written. Where
pieces of a row have nothing to do with each other, `for_pieces` takes a tail by halves: whole loads and stores of 8, 4,
2, 1 lanes, which every machine has for every dtype. Where a computation wants whole vectors, of zeros behind the tail
(a group's largest magnitude, a tile's rows), `load` and `store` take a `count`, and use masks of lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeAlias

from llmc.targets.cpu.builder import MANY, index, let, loop, plain_function, scratch, view

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc

    Element: TypeAlias = Expr | int | tuple[Expr | int, ...]

CACHE_LINE = 64  # bytes, of every machine that there is a target for


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
            unit(arguments, let(arguments.begin + step))

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


def lanes_of(value: Expr) -> int:
    """How many numbers a value has."""
    return int(value.ty.dtype.lanes)


def splat(value: Expr | float, lanes: int, dtype: str = "float32") -> Expr:
    """A scalar in every lane; dtype: what a Python number becomes.

    Beside f32, i32 or u32 an operator does this by itself: `v * 2.0`. It would turn narrower numbers into wider ones.
    """
    from tvm import tirx

    scalar = tirx.const(value, dtype) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def cast(value: Expr, dtype: str) -> Expr:
    """`value` converted to `dtype`, lane by lane."""
    return value.astype(typed(dtype, lanes_of(value)))


def as_f32(value: Expr) -> Expr:
    """Floats as f32; u16 are the bits of bf16."""
    from tvm import tirx

    lanes, dtype = lanes_of(value), value.ty.dtype.with_lanes(1)
    if dtype == "float32":
        return value
    if dtype == "uint16":
        return tirx.reinterpret(typed("float32", lanes), cast(value, "uint32") << splat(16, lanes, "uint32"))
    return cast(value, "float32")


def load(buffer: Buffer, at: Element, lanes: int = 1, count: Expr | int | None = None) -> Expr:
    """`lanes` consecutive elements from `at` on, in the buffer's dtype.

    count: only the first so many are read, by a mask, and the other lanes are zeros. Without: all.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as I

    mask, dtype = _mask(count, lanes), str(buffer.dtype)
    if mask is None:
        return tirx.BufferLoad(buffer, _elements(at, lanes))
    # Bound before it is used: TVM takes a mask for true inside of what it selects, and would read all.
    found = let(I.masked_load(typed(dtype, lanes), buffer, *_elements(at, lanes), mask))
    return tirx.Select(mask, found, splat(0, lanes, dtype))  # the other lanes of what is found are undefined


def store(buffer: Buffer, at: Element, value: Expr, count: Expr | int | None = None) -> None:
    """The lanes of `value` to consecutive elements from `at` on. Floats are rounded to the buffer's (to nearest, ties
    to even); other dtypes have to be the buffer's, which may be one of vectors: TypeError where they are not.

    count: only the first so many are written, by a mask. Without: all.
    """
    from tvm.script.ir_builder import tirx as I

    element = buffer.dtype
    if element.lanes == 1 and element.is_float and value.ty.dtype.is_float:
        value = cast(value, str(element))
    lanes = lanes_of(value) // element.lanes
    if value.ty.dtype != element.with_lanes(lanes * element.lanes):
        raise TypeError(f"{value.ty.dtype} into {buffer.name}, a buffer of {element}")
    mask = _mask(count, lanes)
    if mask is None:
        I.buffer_store(buffer, value, _elements(at, lanes))
    else:
        I.evaluate(I.masked_store(buffer, value, *_elements(at, lanes), mask))


def _elements(at: Element, lanes: int) -> list[Expr]:
    """The indices of `lanes` elements from `at` on."""
    from tvm import tirx

    *outer, start = (index(i) for i in (at if isinstance(at, tuple) else (at,)))
    return [*outer, start if lanes == 1 else tirx.Ramp(start, index(1), lanes)]


def _mask(count: Expr | int | None, lanes: int) -> Expr | None:
    """Of the first `count` lanes; None: of all."""
    return None if count is None or (isinstance(count, int) and count >= lanes) else first_lanes(count, lanes)


def first_lanes(count: Expr | int, lanes: int) -> Expr:
    """A mask of the first `count` of some lanes: of none where it is negative, of all from `lanes` to 2^31."""
    from tvm import tirx

    number = tirx.const(count, "int32") if isinstance(count, int) else count.astype("int32")
    return tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes) < splat(number, lanes)


def prefetch(buffer: Buffer, at: Expr | int, elements: int = 1, write: bool = False, near: bool = False) -> None:
    """Start reading the cache lines of `elements` elements of a flat buffer. They may lie past its end: prefetches
    never fault.

    Into the second-level cache, which has more reads from memory under way at a time than the first; near: into the
    first. write: to be written, so that the lines are ours by then.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as I

    line = CACHE_LINE // buffer.dtype.itemsize
    for offset in range(0, elements, line):
        address = tirx.address_of(buffer[index(at) + offset])
        numbers = (tirx.const(value, "int32") for value in (int(write), 3 if near else 2, 1))
        I.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *numbers))


def permute(values: Sequence[Expr], order: Sequence[int]) -> Expr:
    """The lanes of the concatenated `values`, in a constant order; one lane is a scalar."""
    from tvm import tirx

    return tirx.Shuffle(list(values), [tirx.const(lane, "int32") for lane in order])


def reduce(value: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes combined into one scalar, by halves: a tree, so the order of additions is fixed."""
    lanes = lanes_of(value)
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


def integer(value: Expr) -> Expr:
    """An index read from memory (i32), as int64 for address arithmetic."""
    return let(value.astype("int64"))


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
    for_pieces(elements, lanes, lambda i, width: store(target, at + i, as_f32(load(source, start + i, width))))


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
