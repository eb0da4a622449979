"""What plain kernels are built with: operands of any dtype by index, results of any dtype, and who does which unit.

A kernel is made for a `Problem`: an op with its axes merged where it treats them alike. A *form* says what a unit of a
problem is (an element, a row, a line along an axis, ...) and emits it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.types import INTEGERS, Shape
from llmc.targets.cpu import builder as b
from llmc.targets.cpu.plain_functions import convert, widened
from llmc.targets.cpu.sizes import dim_expression
from llmc.targets.cpu.vectors import divide, pin, remainder
from llmc.targets.kernel import Param

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr

TIR_DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "uint16",  # its bits: what TVM makes of its own bfloat16 does not hold in a module of several functions
    **{dtype: dtype.replace("i", "int").replace("u", "uint") for dtype in INTEGERS},
    "bool": "uint8",
}

COLUMNS = 64  # of a strip that is accumulated at a time, next to each other in memory

Index = Sequence["Expr"]
Operand = tuple[str, tuple[Param, ...]]
"""The IR dtype and shape of an operand or of the result."""


def wide(dtype: str) -> str:
    """The TIR dtype that values of an IR dtype are computed in: halves in f32."""
    return "float32" if dtype in ("f16", "bf16") else TIR_DTYPES[dtype]


@dataclass(frozen=True)
class Problem:
    """What a plain kernel computes: an op's name, typed operands and result with merged axes, and attributes."""

    op: str
    operands: tuple[tuple[str, Shape], ...]
    dtype: str
    shape: Shape
    attributes: Mapping[str, object]


@dataclass(frozen=True)
class Form:
    """How a problem is split: `units` in all, at least `grain` of which are worth a thread; `emit(k, begin, end)`."""

    units: Callable[[Problem], int | Dim]
    grain: Callable[[Problem], int]
    emit: Callable[[Plain, Expr, Expr], None]


class Plain:
    """One plain kernel while its body is built."""

    def __init__(
        self,
        operands: Sequence[Operand],
        result: Operand,
        attributes: Sequence[tuple[str, Param]],
        handles: Mapping[str, Expr],
        sizes: Mapping[str, Expr],
    ) -> None:
        self.attributes = dict(attributes)
        self.operands = list(operands)
        self.dtype, self.shape = result
        self.sizes = sizes
        self.extents = [dim_expression(dim, sizes) for dim in self.shape]
        self.buffers = [
            b.view(handles[f"x{i}"], [b.MANY], TIR_DTYPES[dtype]) for i, (dtype, _) in enumerate(self.operands)
        ]
        self.out: Buffer = b.view(handles["out"], [b.MANY], TIR_DTYPES[self.dtype])

    def integer(self, name: str) -> int:
        """An attribute that is an int."""
        value = self.attributes[name]
        assert isinstance(value, int)
        return value

    def integers(self, name: str) -> list[int]:
        """An attribute that is a tuple of ints."""
        values = self.attributes[name]
        assert isinstance(values, tuple)
        return [value for value in values if isinstance(value, int)]

    def size(self, name: str) -> Expr:
        """An attribute that is a size."""
        return dim_expression(self.attributes[name], self.sizes)

    def extent(self, operand: int, axis: int) -> Expr:
        """The size of an operand's axis."""
        return dim_expression(self.operands[operand][1][axis], self.sizes)

    def wide(self, operand: int = 0) -> str:
        """The TIR dtype in which an operand's elements come."""
        return wide(self.operands[operand][0])

    def load(self, operand: int, index: Index) -> Expr:
        """An operand's element by index; halves come as f32, bools as 0 and 1."""
        shape = self.operands[operand][1]
        value = self.buffers[operand][_flat(index, [dim_expression(dim, self.sizes) for dim in shape])]
        return widened(value, self.operands[operand][0])

    def load_broadcast(self, operand: int, index: Index) -> Expr:
        """The operand's element for a result element: right-aligned, axes of size 1 stay at 0."""
        shape = self.operands[operand][1]
        tail = list(index)[len(index) - len(shape) :]
        return self.load(operand, [b.index(0) if dim == 1 else i for i, dim in zip(tail, shape, strict=True)])

    def store(self, index: Index, value: Expr) -> None:
        """A result element by index, converted from the dtype that it was computed in."""
        b.store(self.out, [_flat(index, self.extents)], self.narrow(value))

    def stored(self, index: Index) -> Expr:
        """A result element that was stored before, as it is used in computations."""
        return widened(self.out[_flat(index, self.extents)], self.dtype)

    def narrow(self, value: Expr) -> Expr:
        """A value in the dtype of the result's memory."""
        return convert(value, self.dtype, TIR_DTYPES[self.dtype])

    def wrapped(self, chosen: Expr, size: Expr) -> Expr:
        """An index that data gives, in [0, size): negative ones count from the end, others stop at the ends."""
        from tvm import tirx

        at = b.let(chosen.astype("int64"))
        counted = b.let(tirx.Select(at < 0, at + size, at))
        return tirx.Max(tirx.Min(counted, size - 1), b.index(0))


def _flat(index: Index, extents: Sequence[Expr]) -> Expr:
    """The row-major place of an element."""
    flat: Expr = b.index(0)
    for i, extent in zip(index, extents, strict=True):
        flat = flat * extent + i
    return flat


def unravel(unit: Expr, extents: Sequence[Expr]) -> list[Expr]:
    """A row-major place as one index an axis."""
    index: list[Expr] = []
    for extent in reversed(extents[1:]):
        index.append(pin(remainder(unit, extent)))
        unit = pin(divide(unit, extent))
    return [unit, *reversed(index)] if extents else []


FORMS: dict[str, Form] = {}
Element = Callable[[Plain, Index], "Expr"]


def register(form: Form, *kinds: type[Op]) -> None:
    """Make a form the one of these ops."""
    for kind in kinds:
        FORMS[kind.name] = form


def few(work: int | Dim) -> int:
    """A grain for units of `work` elements each."""
    return max(1, 4096 // max(1, work)) if isinstance(work, int) else 4


def elements(*kinds: type[Op]) -> Callable[[Element], Element]:
    """Register a function that gives one element; it is called in a loop over the last axis, which LLVM vectorises."""

    def decorate(function: Element) -> Element:
        def emit(k: Plain, begin: Expr, end: Expr) -> None:
            with b.loop(end - begin) as step:
                if len(k.shape) <= 1:
                    at = begin + step
                    b.store(k.out, [at], k.narrow(function(k, [at][: len(k.shape)])))
                    return
                row = pin(begin + step)
                outer = unravel(row, k.extents[:-1])
                with b.loop(k.extents[-1]) as column:
                    b.store(k.out, [row * k.extents[-1] + column], k.narrow(function(k, [*outer, column])))

        def units(problem: Problem) -> int | Dim:
            return product(problem.shape[: max(1, len(problem.shape) - 1)])

        def grain(problem: Problem) -> int:
            return few(1 if len(problem.shape) <= 1 else problem.shape[-1])

        register(Form(units, grain, emit), *kinds)
        return function

    return decorate


Line = Callable[[Plain, Callable[["Expr"], list["Expr"]]], None]


def lines(*kinds: type[Op]) -> Callable[[Line], Line]:
    """Register a function that does a line along the middle axis of [outer, size, inner] at a time.

    It is given a function from the place in the line to the index, of the operand and of the result alike.
    """

    def decorate(function: Line) -> Line:
        def emit(k: Plain, begin: Expr, end: Expr) -> None:
            with b.loop(end - begin) as step:
                outer, inner = unravel(pin(begin + step), [k.extents[0], k.extents[2]])
                function(k, lambda place: [outer, place, inner])

        def units(problem: Problem) -> int | Dim:
            return problem.shape[0] * problem.shape[2]

        register(Form(units, lambda problem: few(problem.operands[0][1][1]), emit), *kinds)
        return function

    return decorate


Strip = Callable[[Plain, list["Expr"], Callable[[Callable[["Expr"], None]], None], "Expr"], None]


def strips(work: Callable[[Problem], int | Dim]) -> Callable[[Strip], Form]:
    """A form of up to `COLUMNS` neighbouring elements of the last axis a unit: f(k, outer, each, start).

    `each(body)` emits a loop over the places in the strip, which begins at column `start`. work: what a unit costs.
    """

    def decorate(function: Strip) -> Form:
        def emit(k: Plain, begin: Expr, end: Expr) -> None:
            from tvm import tirx

            columns = k.extents[-1]
            count = divide(columns + (COLUMNS - 1), COLUMNS)
            with b.loop(end - begin) as step:
                *outer, strip = unravel(pin(begin + step), [*k.extents[:-1], count])
                start = pin(strip * COLUMNS)
                width = pin(tirx.Min(columns - start, b.index(COLUMNS)))

                def each(body: Callable[[Expr], None]) -> None:
                    with b.loop(width) as place:
                        body(place)

                function(k, outer, each, start)

        def units(problem: Problem) -> int | Dim:
            return product(problem.shape[:-1]) * ((problem.shape[-1] + (COLUMNS - 1)) // COLUMNS)

        return Form(units, lambda problem: few(work(problem)), emit)

    return decorate


def nest(extents: Sequence[Expr], body: Callable[[list[Expr]], None], index: Sequence[Expr] = ()) -> None:
    """Loops inside one another; body(indices)."""
    if not extents:
        body(list(index))
        return
    with b.loop(extents[0]) as i:
        nest(extents[1:], body, [*index, i])


@contextmanager
def repeat(condition: Expr) -> Iterator[None]:
    """`while (condition)`."""
    from tvm.script.ir_builder import tirx as I

    with I.While(condition):
        yield


def lowest(dtype: str) -> Expr:
    """The least value of a TIR dtype, minus infinity for floats."""
    from tvm import tirx

    return tirx.const(float("-inf"), dtype) if dtype.startswith("float") else tirx.min_value(dtype)


def highest(dtype: str) -> Expr:
    """The greatest value of a TIR dtype, infinity for floats."""
    from tvm import tirx

    if dtype == "uint64":  # beyond what a constant of TIR holds
        return tirx.reinterpret("uint64", tirx.const(-1, "int64"))
    return tirx.const(float("inf"), dtype) if dtype.startswith("float") else tirx.max_value(dtype)
