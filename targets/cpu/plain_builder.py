"""What plain kernels are built with: operands of any dtype by index, results of any dtype, and who does which unit.

A kernel is made for a `MergedOp`: an op with its axes merged where it treats them alike. A *form* says what a unit of
it is (an element, a row, a line along an axis, ...), which template has the numbers that may be chosen, and emits it.
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
from llmc.targets.cpu.cpu_template import CpuTemplate, arrays, few
from llmc.targets.cpu.plain_functions import convert, widened
from llmc.targets.cpu.sizes import dim_expression
from llmc.targets.cpu.vectors import divide, remainder, store
from llmc.targets.kernel import Param
from llmc.targets.machine import Machine
from llmc.targets.template import ANY_ROWS, Problem, Rows, knob

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr, PrimFunc
    from typing_extensions import Self

TIR_DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "uint16",  # its bits: what TVM makes of its own bfloat16 does not hold in a module of several functions
    **{dtype: dtype.replace("i", "int").replace("u", "uint") for dtype in INTEGERS},
    "bool": "uint8",
}

Index = Sequence["Expr"]
Operand = tuple[str, tuple[Param, ...]]
"""The IR dtype and shape of an operand or of the result."""


def wide(dtype: str) -> str:
    """The TIR dtype that values of an IR dtype are computed in: halves in f32."""
    return "float32" if dtype in ("f16", "bf16") else TIR_DTYPES[dtype]


@dataclass(frozen=True)
class MergedOp:
    """What a plain kernel computes: an op's name, typed operands and result with merged axes, and attributes."""

    op: str
    operands: tuple[tuple[str, Shape], ...]
    dtype: str
    shape: Shape
    attributes: Mapping[str, object]


@dataclass(frozen=True)
class PlainProblem(Problem):
    """(x0, x1, ..., out, symbols in name order, begin, end). What a unit is, the op's form says."""

    op: str
    operands: tuple[Operand, ...]
    result: Operand
    attributes: tuple[tuple[str, Param], ...]
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class PlainTemplate(CpuTemplate[PlainProblem], name="plain"):
    """least: elements of work that are worth a thread."""

    least: int = knob(1024, 2048, 4096, 8192, 16384, code=False)

    @classmethod
    def default(cls, problem: PlainProblem, machine: Machine, rows: Rows = ANY_ROWS) -> Self:
        return cls(least=4096)

    def units_worth(self, work: int | Dim) -> int:
        """The fewest units that are worth a thread. work: what the form says of one of them."""
        return few(work if isinstance(work, int) else None, self.least)

    def build(self, problem: PlainProblem, machine: Machine) -> PrimFunc:
        def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
            k = Plain(self, problem, handles, sizes)
            FORMS[problem.op].emit(k, sizes["begin"], sizes["end"])

        pointers = [(f"x{i}", TIR_DTYPES[dtype]) for i, (dtype, _) in enumerate(problem.operands)]
        pointers.append(("out", TIR_DTYPES[problem.result[0]]))
        return b.plain_function(pointers, list(problem.symbols), body)


class PlainElements(PlainTemplate, name="plain"):
    """Of elements, rows, and lines that are done one after another: nothing is held that has a size."""


@dataclass(frozen=True)
class PlainStrips(PlainTemplate, name="plain"):
    """columns: elements next to each other that are accumulated at a time."""

    columns: int = knob(16, 32, 64, 128, 256)

    @classmethod
    def default(cls, problem: PlainProblem, machine: Machine, rows: Rows = ANY_ROWS) -> PlainStrips:
        return cls(least=4096, columns=64)

    def units_worth(self, work: int | Dim) -> int:
        return super().units_worth(work * self.columns)

    def stack_bytes(self, problem: PlainProblem, machine: Machine) -> int:
        return arrays(8 * self.columns)


@dataclass(frozen=True)
class PlainSums(PlainTemplate, name="plain"):
    """lanes: running totals of a row."""

    lanes: int = knob(1, 4, 8, 16, 32, 64, exact=False)

    @classmethod
    def default(cls, problem: PlainProblem, machine: Machine, rows: Rows = ANY_ROWS) -> PlainSums:
        return cls(least=4096, lanes=16)

    def stack_bytes(self, problem: PlainProblem, machine: Machine) -> int:
        return arrays(8 * self.lanes)


@dataclass(frozen=True)
class PlainRanges(PlainTemplate, name="plain"):
    """least_rows: rows that are worth a thread whatever their length, since a range of them looks through all that may
    be for it."""

    least_rows: int = knob(64, 128, 256, 512, 1024, code=False)

    @classmethod
    def default(cls, problem: PlainProblem, machine: Machine, rows: Rows = ANY_ROWS) -> PlainRanges:
        return cls(least=4096, least_rows=256)

    def units_worth(self, work: int | Dim) -> int:
        return max(self.least_rows, super().units_worth(work))


def elements_template(merged: MergedOp) -> type[PlainTemplate]:
    """The template of forms whose units hold nothing."""
    return PlainElements


@dataclass(frozen=True)
class Form:
    """How an op is split. units: how many there are. work: elements that one of them reads. emit: emit(k, begin, end).
    template: whose knobs it has; `units` and `emit` are given them."""

    units: Callable[[MergedOp, PlainTemplate], int | Dim]
    work: Callable[[MergedOp], int | Dim]
    emit: Callable[[Plain, Expr, Expr], None]
    template: Callable[[MergedOp], type[PlainTemplate]] = elements_template


class Plain:
    """One plain kernel while its body is built."""

    def __init__(
        self, template: PlainTemplate, problem: PlainProblem, handles: Mapping[str, Expr], sizes: Mapping[str, Expr]
    ) -> None:
        self.template = template
        self.attributes = {**dict(problem.attributes), "op": problem.op}
        self.operands = list(problem.operands)
        self.dtype, self.shape = problem.result
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
        store(self.out, _flat(index, self.extents), self.narrow(value))

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
        index.append(b.let(remainder(unit, extent)))
        unit = b.let(divide(unit, extent))
    return [unit, *reversed(index)] if extents else []


FORMS: dict[str, Form] = {}
Element = Callable[[Plain, Index], "Expr"]


def register(form: Form, *kinds: type[Op]) -> None:
    """Make a form the one of these ops."""
    for kind in kinds:
        FORMS[kind.name] = form


def elements(*kinds: type[Op]) -> Callable[[Element], Element]:
    """Register a function that gives one element; it is called in a loop over the last axis, which LLVM vectorises."""

    def decorate(function: Element) -> Element:
        def emit(k: Plain, begin: Expr, end: Expr) -> None:
            with b.loop(end - begin) as step:
                if len(k.shape) <= 1:
                    at = begin + step
                    store(k.out, at, k.narrow(function(k, [at][: len(k.shape)])))
                    return
                row = b.let(begin + step)
                outer = unravel(row, k.extents[:-1])
                with b.loop(k.extents[-1]) as column:
                    store(k.out, row * k.extents[-1] + column, k.narrow(function(k, [*outer, column])))

        def units(merged: MergedOp, template: PlainTemplate) -> int | Dim:
            return product(merged.shape[: max(1, len(merged.shape) - 1)])

        def work(merged: MergedOp) -> int | Dim:
            return 1 if len(merged.shape) <= 1 else merged.shape[-1]

        register(Form(units, work, emit), *kinds)
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
                outer, inner = unravel(b.let(begin + step), [k.extents[0], k.extents[2]])
                function(k, lambda place: [outer, place, inner])

        def units(merged: MergedOp, template: PlainTemplate) -> int | Dim:
            return merged.shape[0] * merged.shape[2]

        register(Form(units, lambda merged: merged.operands[0][1][1], emit), *kinds)
        return function

    return decorate


Strip = Callable[[Plain, list["Expr"], Callable[[Callable[["Expr"], None]], None], "Expr"], None]


def columns_of(template: PlainTemplate) -> int:
    """The columns of a strip."""
    assert isinstance(template, PlainStrips)
    return template.columns


def strips(work: Callable[[MergedOp], int | Dim]) -> Callable[[Strip], Form]:
    """A form of up to `PlainStrips.columns` neighbouring elements of the last axis a unit: f(k, outer, each, start).

    `each(body)` emits a loop over the places in the strip, which begins at column `start`. work: elements that are read
    for each.
    """

    def decorate(function: Strip) -> Form:
        def emit(k: Plain, begin: Expr, end: Expr) -> None:
            from tvm import tirx

            columns, strip_columns = k.extents[-1], columns_of(k.template)
            count = divide(columns + (strip_columns - 1), strip_columns)
            with b.loop(end - begin) as step:
                *outer, strip = unravel(b.let(begin + step), [*k.extents[:-1], count])
                start = b.let(strip * strip_columns)
                width = b.let(tirx.Min(columns - start, b.index(strip_columns)))

                def each(body: Callable[[Expr], None]) -> None:
                    with b.loop(width) as place:
                        body(place)

                function(k, outer, each, start)

        def units(merged: MergedOp, template: PlainTemplate) -> int | Dim:
            columns = columns_of(template)
            return product(merged.shape[:-1]) * ((merged.shape[-1] + (columns - 1)) // columns)

        return Form(units, work, emit, lambda merged: PlainStrips)

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
