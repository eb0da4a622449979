"""Plain kernels: any tensor op, one result element at a time. Slow, obvious, and there for everything.

The limit is index arithmetic, not bytes: what matters for speed has a kernel of its own. Elementwise ops whose operands
have the result's shape (or are single numbers) are indexed flat, which LLVM vectorises. Transcendental functions are
libm's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from llmc.compiler.encodings.grouped import storage_bytes
from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, Symbol, product, symbols_of
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.types import itemsize
from llmc.targets.kernel import Call, Kernel, Param, kernel
from llmc.targets.lowering import Context, Lowered, Rules
from llmc.targets.machine import Machine
from llmc.targets.x86 import linear_builder as b
from llmc.targets.x86.plain_functions import ACTIVATIONS, ELEMENTWISE, libm, tir, truth
from llmc.targets.x86.sizes import dim_expression, dim_param

if TYPE_CHECKING:
    from tvm.tirx import Expr, PrimFunc

RULES = Rules()

TIR_DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "uint8",
}

Index = Sequence["Expr"]
Load = Callable[[int, Index], "Expr"]


def _broadcast_index(index: Index, shape: Sequence[Param]) -> list[Expr]:
    """The operand's element for a result element: right-aligned, axes of size 1 stay at 0."""
    tail = list(index)[len(index) - len(shape) :]
    return [b.index(0) if dim == 1 else i for i, dim in zip(tail, shape, strict=True)]


Operand = tuple[str, tuple[Param, ...]]
"""The IR dtype and shape of an operand or of the result."""


class _Plain:
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
        self.out = b.view(handles["out"], [b.MANY], TIR_DTYPES[self.dtype])

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

    def axis(self, rank: int) -> int:
        """The attribute `axis`, not negative."""
        return self.integer("axis") % rank

    def extent(self, operand: int, axis: int) -> Expr:
        return dim_expression(self.operands[operand][1][axis], self.sizes)

    def rank(self, operand: int) -> int:
        return len(self.operands[operand][1])

    def load(self, operand: int, index: Index) -> Expr:
        """An operand's element by index; halves come as f32."""
        _, shape = self.operands[operand]
        flat: Expr = b.index(0)
        for i, dim in zip(index, shape, strict=True):
            flat = flat * dim_expression(dim, self.sizes) + i
        return self.load_flat(operand, flat)

    def load_flat(self, operand: int, flat: Expr) -> Expr:
        value = self.buffers[operand][flat]
        return value.astype("float32") if self.operands[operand][0] in ("f16", "bf16") else value

    def store(self, unit: Expr, value: Expr) -> None:
        if self.dtype == "bool" and str(value.ty.dtype) != "bool":
            value = truth(value)
        b.store(self.out, [unit], value.astype(TIR_DTYPES[self.dtype]))

    def unravel(self, unit: Expr) -> list[Expr]:
        """A flat result index as one index an axis."""
        index: list[Expr] = []
        for extent in reversed(self.extents[1:]):
            index.append(unit % extent)
            unit = unit // extent
        return [unit, *reversed(index)] if self.extents else []


Body = Callable[[_Plain, "Expr"], None]
_BODIES: dict[str, Body] = {}


def _body(*kinds: type[Op]) -> Callable[[Body], Body]:
    def register(function: Body) -> Body:
        for kind in kinds:
            _BODIES[kind.name] = function
        return function

    return register


def _elementwise(kind: type[Op], function: Callable[..., Expr]) -> Body:
    def body(k: _Plain, unit: Expr) -> None:
        flat = all(shape == k.shape or all(d == 1 for d in shape) for _, shape in k.operands)
        values = []
        index = [] if flat else k.unravel(unit)
        for operand, (_, shape) in enumerate(k.operands):
            if flat:
                values.append(k.load_flat(operand, unit if shape == k.shape else b.index(0)))
            else:
                values.append(k.load(operand, _broadcast_index(index, shape)))
        k.store(unit, function(*values))

    _BODIES[kind.name] = body
    return body


for _kind, _function in ELEMENTWISE.items():
    _elementwise(_kind, _function)


@_body(e.Activation)
def _activation(k: _Plain, unit: Expr) -> None:
    k.store(unit, ACTIVATIONS[str(k.attributes["kind"])](k.load_flat(0, unit)))


@_body(s.Iota)
def _iota(k: _Plain, unit: Expr) -> None:
    k.store(unit, unit)


@_body(s.Transpose)
def _transpose(k: _Plain, unit: Expr) -> None:
    index = k.unravel(unit)
    source: list[Expr] = [b.index(0)] * len(index)
    for position, axis in enumerate(k.integers("permutation")):
        source[axis] = index[position]
    k.store(unit, k.load(0, source))


@_body(s.Broadcast)
def _broadcast(k: _Plain, unit: Expr) -> None:
    k.store(unit, k.load(0, _broadcast_index(k.unravel(unit), k.operands[0][1])))


@_body(s.Slice)
def _slice(k: _Plain, unit: Expr) -> None:
    index = k.unravel(unit)
    axis = k.axis(len(index))
    start = dim_expression(k.attributes["start"], k.sizes)
    index[axis] = start + index[axis] * k.integer("step")
    k.store(unit, k.load(0, index))


@_body(s.Concat)
def _concat(k: _Plain, unit: Expr) -> None:
    index = [b.let(i) for i in k.unravel(unit)]
    axis = k.axis(len(index))
    start: Expr = b.index(0)
    for operand in range(len(k.operands)):
        size = k.extent(operand, axis)
        source = [*index[:axis], index[axis] - start, *index[axis + 1 :]]
        with b.when(tir("And")(index[axis] >= start, index[axis] < start + size)):
            k.store(unit, k.load(operand, source))
        start = start + size


@_body(s.Pad)
def _pad(k: _Plain, unit: Expr) -> None:
    from tvm import tirx

    index = k.unravel(unit)
    source = [b.let(i - before) for i, before in zip(index, k.integers("low"), strict=True)]
    inside = tirx.const(True, "bool")
    for axis, i in enumerate(source):
        inside = tirx.And(inside, tirx.And(i >= 0, i < k.extent(0, axis)))

    def padding() -> None:
        k.store(unit, tirx.const(k.attributes["value"], TIR_DTYPES[k.dtype]))

    b.either(inside, lambda: k.store(unit, k.load(0, source)), padding)


@_body(s.Gather)
def _gather(k: _Plain, unit: Expr) -> None:
    index = k.unravel(unit)
    axis = k.axis(k.rank(0))
    chosen = b.let(k.load(1, index[axis : axis + k.rank(1)]).astype("int64"))
    wrapped = tir("Select")(chosen < 0, chosen + k.extent(0, axis), chosen)
    k.store(unit, k.load(0, [*index[:axis], wrapped, *index[axis + k.rank(1) :]]))


@_body(s.GatherElements)
def _gather_elements(k: _Plain, unit: Expr) -> None:
    index = k.unravel(unit)
    axis = k.axis(k.rank(0))
    chosen = b.let(k.load(1, index).astype("int64"))
    index[axis] = tir("Select")(chosen < 0, chosen + k.extent(0, axis), chosen)
    k.store(unit, k.load(0, index))


def _accumulate(
    k: _Plain, start: float, step: Callable[[Expr, Index], Expr], extents: Sequence[Expr], dtype: str
) -> Expr:
    """A scalar folded over nested loops: total = step(total, loop indices)."""
    from tvm import tirx

    total = b.scratch(1, dtype)
    b.store(total, [0], tirx.const(start, dtype))

    def nest(remaining: Sequence[Expr], index: list[Expr]) -> None:
        if not remaining:
            b.store(total, [0], step(total[b.index(0)], index))
            return
        with b.loop(remaining[0]) as i:
            nest(remaining[1:], [*index, i])

    nest(list(extents), [])
    return total[b.index(0)]


def _wide(dtype: str) -> str:
    return "float32" if dtype in ("f16", "bf16") else TIR_DTYPES[dtype]


@_body(s.Cumsum)
def _cumsum(k: _Plain, unit: Expr) -> None:
    index = [b.let(i) for i in k.unravel(unit)]
    axis = k.axis(len(index))

    def step(total: Expr, at: Index) -> Expr:
        return total + k.load(0, [*index[:axis], at[0], *index[axis + 1 :]])

    k.store(unit, _accumulate(k, 0, step, [index[axis] + 1], _wide(k.dtype)))


_FOLDS: dict[str, tuple[float, Callable[[Expr, Expr], Expr]]] = {
    "t.sum": (0, lambda a, x: a + x),
    "t.mean": (0, lambda a, x: a + x),
    "t.max": (float("-inf"), lambda a, x: tir("Max")(a, x)),
    "t.min": (float("inf"), lambda a, x: tir("Min")(a, x)),
    "t.any": (0, lambda a, x: tir("Max")(a, x)),
    "t.all": (1, lambda a, x: tir("Min")(a, x)),
}


def _reduce(name: str) -> Body:
    def body(k: _Plain, unit: Expr) -> None:
        rank = k.rank(0)
        axes = sorted(axis % rank for axis in k.integers("axes"))
        index = [b.let(i) for i in k.unravel(unit)]
        kept = iter(index)
        outer: list[Expr | None] = []
        for axis in range(rank):
            if axis in axes:
                outer.append(None)
                if k.attributes["keep"]:
                    next(kept)
            else:
                outer.append(next(kept))
        start, fold = _FOLDS[name]
        dtype = _wide(k.operands[0][0])
        if start in (float("-inf"), float("inf")) and not dtype.startswith("float"):
            bits = int(dtype.lstrip("uint"))
            start = -(2 ** (bits - 1)) if start < 0 else 2 ** (bits - 1) - 1

        def step(total: Expr, at: Index) -> Expr:
            inner = iter(at)
            return fold(total, k.load(0, [next(inner) if i is None else i for i in outer]))

        total = _accumulate(k, start, step, [k.extent(0, axis) for axis in axes], dtype)
        if name == "t.mean":
            count: Expr = b.index(1)
            for axis in axes:
                count = count * k.extent(0, axis)
            total = total / count.astype(dtype)
        k.store(unit, total)

    return body


for _reduction in (s.Sum, s.Mean, s.Max, s.Min, s.Any, s.All):
    _BODIES[_reduction.name] = _reduce(_reduction.name)


@_body(s.Argmax)
def _argmax(k: _Plain, unit: Expr) -> None:
    from tvm import tirx

    axis = k.axis(k.rank(0))
    index = [b.let(i) for i in k.unravel(unit)]

    def at(i: Expr) -> Expr:
        return k.load(0, [*index[:axis], i, *index[axis:]])

    best = b.scratch(1, "int64")
    b.store(best, [0], tirx.const(0, "int64"))
    with b.loop(k.extent(0, axis)) as i, b.when(at(i) > at(best[b.index(0)])):
        b.store(best, [0], i)
    k.store(unit, best[b.index(0)])


@_body(s.Softmax)
def _softmax(k: _Plain, unit: Expr) -> None:
    axis = k.axis(k.rank(0))
    index = [b.let(i) for i in k.unravel(unit)]

    def at(i: Expr) -> Expr:
        return k.load(0, [*index[:axis], i, *index[axis + 1 :]])

    extent = k.extent(0, axis)
    dtype = _wide(k.operands[0][0])
    top = b.let(_accumulate(k, float("-inf"), lambda a, i: tir("Max")(a, at(i[0])), [extent], dtype))
    total = _accumulate(k, 0, lambda a, i: a + libm("exp")(at(i[0]) - top), [extent], dtype)
    k.store(unit, libm("exp")(at(index[axis]) - top) / total)


@_body(s.Matmul)
def _matmul(k: _Plain, unit: Expr) -> None:
    *leading, row, column = [b.let(i) for i in k.unravel(unit)]
    a_index = _broadcast_index(leading, k.operands[0][1][:-2])
    b_index = _broadcast_index(leading, k.operands[1][1][:-2])

    def step(total: Expr, i: Index) -> Expr:
        return total + k.load(0, [*a_index, row, i[0]]) * k.load(1, [*b_index, i[0], column])

    k.store(unit, _accumulate(k, 0, step, [k.extent(0, k.rank(0) - 1)], _wide(k.dtype)))


def plain(
    machine: Machine,
    *,
    op: str,
    operands: tuple[Operand, ...],
    result: Operand,
    attributes: tuple[tuple[str, Param], ...],
    symbols: tuple[str, ...],
) -> PrimFunc:
    """(x0, x1, ..., out, symbols in name order, begin, end). One unit: one element of the result."""

    def body(handles: Mapping[str, Expr], sizes: Mapping[str, Expr]) -> None:
        emit = _BODIES[op]
        with b.loop(sizes["end"] - sizes["begin"]) as i:
            emit(_Plain(operands, result, attributes, handles, sizes), b.let(sizes["begin"] + i))

    pointers = [(f"x{i}", TIR_DTYPES[dtype]) for i, (dtype, _) in enumerate(operands)]
    return b.plain_function([*pointers, ("out", TIR_DTYPES[result[0]])], list(symbols), body)


def _attribute(value: object) -> Param:
    if isinstance(value, Dim):
        return dim_param(value)
    if isinstance(value, tuple):
        return tuple(_attribute(item) for item in value)
    assert value is None or isinstance(value, (int, float, str))
    return value


def used_symbols(op: Op) -> tuple[int | Dim, ...]:
    """The symbols that a plain kernel of this op takes as sizes, in order."""
    from llmc.compiler.ir.dims import symbol

    return tuple(symbol(name) for name in _used_symbols(op))


def _used_symbols(op: Op) -> list[str]:
    found: set[Symbol] = set()
    for value in (op, *op.operands):
        for dim in value.shape:
            found |= symbols_of(dim)
    for attribute in op.attributes().values():
        for item in attribute if isinstance(attribute, tuple) else (attribute,):
            if isinstance(item, Dim):
                found |= item.symbols()
    return sorted(symbol.name for symbol in found)


def plain_kernel(op: Op, machine: Machine) -> Kernel:
    """The plain kernel of an op at its shapes."""
    # Shapes are already in the result's type, and sizes are passed: attributes that only say the shape are left out.
    attributes = {k: v for k, v in op.attributes().items() if k not in ("to", "size", "dtype_name")}
    return kernel(
        plain,
        machine.key,
        op=op.name,
        operands=tuple((x.dtype, tuple(dim_param(d) for d in x.shape)) for x in op.operands),
        result=(op.dtype, tuple(dim_param(d) for d in op.shape)),
        attributes=tuple((k, _attribute(v)) for k, v in attributes.items()),
        symbols=tuple(_used_symbols(op)),
    )


def _weights_read(op: Op, context: Context) -> int | Dim:
    """Bytes of weights that a plain kernel reads: of a table that it only looks into, as many as come out."""
    if isinstance(op, (s.Gather, s.GatherElements, s.Slice)):
        return product(op.shape) * itemsize(op.dtype) if context.known(op.operands[0]) else 0
    return sum(storage_bytes(value.tensor) for value in op.operands if context.known(value))


def _operations(op: Op) -> int | Dim:
    """Multiply-adds of a plain kernel, counted twice."""
    return product((*op.shape, op.operands[0].shape[-1])) * 2 if isinstance(op, s.Matmul) else 0


def plain_rule(op: Op, context: Context) -> Lowered | str:
    """One call of the op's plain kernel over all result elements."""
    if any(value.tensor.encoding is not None for value in (op, *op.operands)):
        return "plain kernels read no encoded tensors"
    operands: tuple[Value, ...] = op.operands
    arguments = (*operands, "result", *used_symbols(op))
    made = plain_kernel(op, context.machine)
    read, operations = _weights_read(op, context), _operations(op)
    call = Call(made, arguments, product(op.shape), grain=256, bytes_moved=read, operations=operations)
    return Lowered((call,), reason="one element at a time")


RULES.lower(*ELEMENTWISE, e.Activation, *(s.__dict__[name] for name in (
    "Iota", "Transpose", "Broadcast", "Slice", "Concat", "Pad", "Gather", "GatherElements", "Cumsum", "Sum", "Mean",
    "Max", "Min", "Any", "All", "Argmax", "Softmax", "Matmul",
)), priority=0)(plain_rule)  # fmt: skip
