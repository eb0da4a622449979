"""Ops as plain kernels see them: axes that an op treats alike are one, and what only moves bytes has no halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.op import Op
from llmc.compiler.ir.types import Shape, itemsize
from llmc.targets.cpu.plain_builder import MergedOp

_COPIES = (s.Transpose, s.Broadcast, s.Slice, s.Concat, s.Gather, s.GatherElements, e.Where)
# Attributes that say nothing but the shape or the dtype, which a problem has anyway.
_SHAPES = ("to", "size", "dtype_name", "stop", "keep", "k")


def problem_of(op: Op) -> MergedOp:
    """The problem of an op: same elements in the same order, in fewer axes where that is possible."""
    attributes = {name: value for name, value in op.attributes().items() if name not in _SHAPES}
    operands = tuple((_memory(op, x.dtype), x.shape) for x in op.operands)
    problem = MergedOp(op.name, operands, _memory(op, op.dtype), op.shape, attributes)
    for kinds, merge in _MERGES:
        if isinstance(op, kinds):
            return merge(problem)
    return problem


def _memory(op: Op, dtype: str) -> str:
    """The dtype that an op's kernel sees: copies move halves as integers, a bitcast everything."""
    if isinstance(op, e.Bitcast):
        return f"u{8 * itemsize(dtype)}"
    return "u16" if dtype in ("f16", "bf16") and isinstance(op, _COPIES) else dtype


def _grouped(keys: Sequence[object], sizes: Shape) -> list[tuple[list[int], int | Dim]]:
    """Runs of neighbouring axes with one key: their numbers, and the product of their sizes.

    Axes of size 1 are left out; one whose key is None is always there, and alone.
    """
    groups: list[tuple[list[int], int | Dim]] = []
    last: object = None
    for axis, (key, size) in enumerate(zip(keys, sizes, strict=True)):
        if size == 1 and key is not None:
            continue
        if groups and key is not None and key == last:
            groups[-1][0].append(axis)
            groups[-1] = (groups[-1][0], groups[-1][1] * size)
        else:
            groups.append(([axis], size))
        last = key
    return groups


def _broadcast(problem: MergedOp) -> MergedOp:
    """Elementwise ops: axes along which the same operands repeat are one."""
    rank = len(problem.shape)
    aligned = [(*(1,) * (rank - len(shape)), *shape) for _, shape in problem.operands]
    keys = [tuple(shape[axis] == 1 for shape in aligned) for axis in range(rank)]
    groups = _grouped(keys, problem.shape)
    shape = tuple(size for _, size in groups)
    operands = []
    for (dtype, _), own in zip(problem.operands, aligned, strict=True):
        merged = tuple(1 if own[axes[0]] == 1 else size for axes, size in groups)
        # A single number needs no axes.
        operands.append((dtype, () if all(size == 1 for size in merged) else merged))
    return MergedOp(problem.op, tuple(operands), problem.dtype, shape, problem.attributes)


def _transpose(problem: MergedOp) -> MergedOp:
    """Axes that stay neighbours are one."""
    ((dtype, shape),) = problem.operands
    permutation = problem.attributes["permutation"]
    assert isinstance(permutation, tuple)
    kept = [axis for axis in permutation if shape[axis] != 1]
    runs: list[list[int]] = []
    for axis in kept:
        between = range(runs[-1][-1] + 1, axis) if runs else ()
        if runs and axis > runs[-1][-1] and all(shape[other] == 1 for other in between):
            runs[-1].append(axis)
        else:
            runs.append([axis])
    sizes = [product(tuple(shape[axis] for axis in run)) for run in runs]
    order = sorted(range(len(runs)), key=lambda i: runs[i][0])
    return MergedOp(
        problem.op,
        ((dtype, tuple(sizes[i] for i in order)),),
        problem.dtype,
        tuple(sizes),
        {"permutation": tuple(order.index(i) for i in range(len(runs)))},
    )


def _around(shape: Shape, axis: int) -> Shape:
    """[outer, size, inner] around an axis."""
    return product(shape[:axis]), shape[axis], product(shape[axis + 1 :])


def _axis(problem: MergedOp) -> int:
    axis = problem.attributes["axis"]
    assert isinstance(axis, int)
    return axis % len(problem.operands[0][1])


def _without(problem: MergedOp, *names: str) -> dict[str, object]:
    return {name: value for name, value in problem.attributes.items() if name not in names}


def _tight(shape: Shape) -> Shape:
    """[outer, size, inner] as [outer, size] where inner is 1."""
    return shape[:-1] if shape[-1] == 1 else shape


def _line(problem: MergedOp) -> MergedOp:
    """Ops along one axis: [outer, size, inner]."""
    axis = _axis(problem)
    operands = tuple((dtype, _around(shape, axis)) for dtype, shape in problem.operands)
    rest = _without(problem, "axis")
    if len(problem.shape) < len(problem.operands[0][1]):  # the axis vanishes
        outer, _, inner = operands[0][1]
        return MergedOp(problem.op, operands, problem.dtype, (outer, inner), rest)
    return MergedOp(problem.op, operands, problem.dtype, _around(problem.shape, axis), rest)


def _slice(problem: MergedOp) -> MergedOp:
    line = _line(problem)
    ((dtype, shape),) = line.operands
    return MergedOp(line.op, ((dtype, _tight(shape)),), line.dtype, _tight(line.shape), line.attributes)


def _gather(problem: MergedOp) -> MergedOp:
    (dtype, shape), (index_dtype, indices) = problem.operands
    outer, size, inner = _around(shape, _axis(problem))
    count = product(indices)
    operands = ((dtype, _tight((outer, size, inner))), (index_dtype, (count,)))
    return MergedOp(problem.op, operands, problem.dtype, _tight((outer, count, inner)), {})


def _gather_elements(problem: MergedOp) -> MergedOp:
    return MergedOp(problem.op, problem.operands, problem.dtype, problem.shape, {"axis": _axis(problem)})


def _concat(problem: MergedOp) -> MergedOp:
    axis = _axis(problem)

    def flat(shape: Shape) -> Shape:
        return product(shape[:axis]), product(shape[axis:])

    operands = tuple((dtype, flat(shape)) for dtype, shape in problem.operands)
    return MergedOp(problem.op, operands, problem.dtype, flat(problem.shape), {})


def _pad(problem: MergedOp) -> MergedOp:
    ((dtype, shape),) = problem.operands
    low = problem.attributes["low"]
    assert isinstance(low, tuple)
    keys = ["same" if a == b else None for a, b in zip(shape, problem.shape, strict=True)]
    groups = _grouped(keys, problem.shape)
    operand = tuple(product(tuple(shape[axis] for axis in axes)) for axes, _ in groups)
    return MergedOp(
        problem.op,
        ((dtype, operand),),
        problem.dtype,
        tuple(size for _, size in groups),
        {"low": tuple(low[axes[0]] for axes, _ in groups), "value": problem.attributes["value"]},
    )


def _reduce(problem: MergedOp) -> MergedOp:
    """Neighbouring axes that go are one, as are those that stay."""
    ((dtype, shape),) = problem.operands
    axes = problem.attributes["axes"]
    assert isinstance(axes, tuple)
    gone = {axis % len(shape) for axis in axes}
    groups = _grouped([axis in gone for axis in range(len(shape))], shape)
    operand = tuple(size for _, size in groups)
    reduced = tuple(i for i, (axes, _) in enumerate(groups) if axes[0] in gone)
    if not reduced:  # over axes of one element, or over none
        operand, reduced = (*operand, 1), (len(operand),)
    result = tuple(size for i, size in enumerate(operand) if i not in reduced)
    return MergedOp(problem.op, ((dtype, operand),), problem.dtype, result, {"axes": reduced})


def _scatter(problem: MergedOp) -> MergedOp:
    (dtype, shape), indices, (_, updates) = problem.operands
    rows, inner = shape[0], product(shape[1:])
    operands = ((dtype, (rows, inner)), indices, (dtype, (updates[0], inner)))
    return MergedOp(problem.op, operands, problem.dtype, (rows, inner), problem.attributes)


_ELEMENTWISE = (e.Unary, e.Binary, e.Where, e.Cast, e.Bitcast, e.Activation, s.Broadcast)
_MERGES: tuple[tuple[type[Op] | tuple[type[Op], ...], Callable[[MergedOp], MergedOp]], ...] = (
    (_ELEMENTWISE, _broadcast),
    (s.Transpose, _transpose),
    (s.Slice, _slice),
    (s.Gather, _gather),
    (s.GatherElements, _gather_elements),
    (s.Concat, _concat),
    (s.Pad, _pad),
    (s.Reduce, _reduce),
    ((s.Cumsum, s.Softmax, s.Argmax, s.TopK), _line),
    (s.Scatter, _scatter),
)
