"""Plain kernels: any tensor op in any dtype. Obvious, and there for everything.

Of memory and arithmetic they are far from the limits, but no op of n elements takes more than about n log n steps:
what matters for speed has a kernel of its own. Axes that an op treats alike are merged first, so that its innermost
loop is as long as can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.compiler.encodings.grouped import storage_bytes
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, Symbol, product, symbol, symbols_of
from llmc.compiler.ir.op import REGISTRY, Op, Value
from llmc.compiler.ir.types import itemsize
from llmc.targets.cpu import plain_moves, plain_reductions  # noqa: F401  (registers their forms)
from llmc.targets.cpu.plain_builder import FORMS, MergedOp, PlainProblem
from llmc.targets.cpu.plain_problems import problem_of
from llmc.targets.cpu.sizes import dim_param
from llmc.targets.kernel import Call, Kernel, Param
from llmc.targets.lowering import Context, Lowered, Rules
from llmc.targets.template import Chooser

RULES = Rules()


def _attribute(value: object) -> Param:
    if isinstance(value, Dim):
        return dim_param(value)
    if isinstance(value, tuple):
        return tuple(_attribute(item) for item in value)
    assert value is None or isinstance(value, (int, float, str))
    return value


def used_symbols(op: Op) -> tuple[int | Dim, ...]:
    """The symbols that a plain kernel of this op takes as sizes, in order."""
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


def _problem(merged: MergedOp, symbols: Sequence[str]) -> PlainProblem:
    return PlainProblem(
        op=merged.op,
        operands=tuple((dtype, tuple(dim_param(d) for d in shape)) for dtype, shape in merged.operands),
        result=(merged.dtype, tuple(dim_param(d) for d in merged.shape)),
        attributes=tuple((name, _attribute(value)) for name, value in merged.attributes.items()),
        symbols=tuple(symbols),
    )


@dataclass(frozen=True)
class PlainCall:
    """A plain kernel of an op at its shapes: how many units it has, and how many are worth a thread."""

    kernel: Kernel
    units: int | Dim
    grain: int


def plain_call(op: Op, chooser: Chooser) -> PlainCall | str:
    """The plain kernel of an op, or why there is none."""
    merged = problem_of(op)
    form, problem = FORMS[merged.op], _problem(merged, _used_symbols(op))
    chosen = chooser.choose(form.template(merged), problem)
    if isinstance(chosen, str):
        return chosen
    made = chosen.kernel(problem, chooser.machine)
    return PlainCall(made, form.units(merged, chosen), chosen.units_worth(form.work(merged)))


def _weights_read(op: Op, context: Context) -> int | Dim:
    """Bytes of weights that a plain kernel reads: of a table that it only looks into, as many as come out."""
    if isinstance(op, (s.Gather, s.GatherElements, s.Slice)):
        return product(op.shape) * itemsize(op.dtype) if context.known(op.operands[0]) else 0
    return sum(storage_bytes(value.tensor) for value in op.operands if context.known(value))


def _operations(op: Op) -> int | Dim:
    """Multiply-adds of a plain kernel, counted twice."""
    return product((*op.shape, op.operands[0].shape[-1])) * 2 if isinstance(op, s.Matmul) else 0


def plain_rule(op: Op, context: Context) -> Lowered | str:
    """One call of the op's plain kernel; none where the result has no elements."""
    if any(value.tensor.encoding is not None for value in (op, *op.operands)):
        return "plain kernels read no encoded tensors"
    if 0 in op.shape:
        return Lowered((), reason="nothing to compute")
    operands: tuple[Value, ...] = op.operands
    made = plain_call(op, context)
    if isinstance(made, str):
        return made
    call = Call(
        made.kernel,
        (*operands, "result", *used_symbols(op)),
        made.units,
        grain=made.grain,
        bytes_moved=_weights_read(op, context),
        operations=_operations(op),
    )
    return Lowered((call,), reason="a plain kernel")


_TENSOR_OPS = [kind for name, kind in REGISTRY.items() if name in FORMS]
RULES.lower(*_TENSOR_OPS, priority=0)(plain_rule)
