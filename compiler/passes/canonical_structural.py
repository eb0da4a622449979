"""Canonical forms of ops that move elements: the other half of the rules of `canonicalize`."""

from __future__ import annotations

from collections.abc import Callable

from llmc.compiler.ir.dims import Dim, known_at_most, product
from llmc.compiler.ir.elementwise import Cast, Constant, constant
from llmc.compiler.ir.llm import LayerNorm, RMSNorm
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import (
    Argmax,
    Broadcast,
    Concat,
    Cumsum,
    Gather,
    GatherElements,
    Pad,
    Reduce,
    Reshape,
    Slice,
    Softmax,
    Transpose,
)
from llmc.compiler.passes.rewriting import number_of, widens
from llmc.errors import DimError

Rule = Callable[[Op], Value | None]


def reshape_to_same(op: Op) -> Value | None:
    """reshape(x) to x's own shape -> x"""
    assert isinstance(op, Reshape)
    return op.x if op.to == op.x.shape else None


def reshape_of_reshape(op: Op) -> Value | None:
    """reshape(reshape(x)) -> reshape(x)"""
    assert isinstance(op, Reshape)
    return Reshape(op.x.x, op.to) if isinstance(op.x, Reshape) else None


def reshape_of_reduction(op: Op) -> Value | None:
    """A reshape that puts back or takes away a reduction's ones -> the reduction with or without `keep`"""
    assert isinstance(op, Reshape)
    if not isinstance(op.x, Reduce):
        return None
    other = op.x.replace(keep=not op.x.keep)
    return other if other.shape == op.to else None


def reshape_of_constant(op: Op) -> Value | None:
    """reshape(constant) -> constant; the same for a transpose"""
    assert isinstance(op, (Reshape, Transpose))
    if not isinstance(op.x, Constant):
        return None
    return constant(op.evaluate(op.x.value.array), op.dtype)


def transpose_of_nothing(op: Op) -> Value | None:
    """A transpose that keeps the order -> x; one that moves only axes of size 1 -> reshape(x)"""
    assert isinstance(op, Transpose)
    if op.permutation == tuple(range(op.rank)):
        return op.x
    moved = [axis for axis in op.permutation if op.x.shape[axis] != 1]
    return Reshape(op.x, op.shape) if moved == sorted(moved) else None


def transpose_of_transpose(op: Op) -> Value | None:
    """transpose(transpose(x)) -> transpose(x)"""
    assert isinstance(op, Transpose)
    if not isinstance(op.x, Transpose):
        return None
    return Transpose(op.x.x, tuple(op.x.permutation[axis] for axis in op.permutation))


def broadcast_of_nothing(op: Op) -> Value | None:
    """A broadcast that repeats nothing -> x or reshape(x)"""
    assert isinstance(op, Broadcast)
    if op.to == op.x.shape:
        return op.x
    return Reshape(op.x, op.to) if product(op.x.shape) == product(op.to) else None


def broadcast_of_broadcast(op: Op) -> Value | None:
    """broadcast(broadcast(x)) -> broadcast(x), also over a reshape to more leading ones"""
    assert isinstance(op, Broadcast)
    if isinstance(op.x, Broadcast):
        return Broadcast(op.x.x, op.to)
    if isinstance(op.x, Reshape) and op.x.to == (1,) * (op.x.rank - op.x.x.rank) + op.x.x.shape:
        return Broadcast(op.x.x, op.to)
    return None


def slice_of_everything(op: Op) -> Value | None:
    """slice of a whole axis -> x"""
    assert isinstance(op, Slice)
    whole = op.start == 0 and op.step == 1 and op.stop == op.x.shape[op.axis]
    return op.x if whole else None


def slice_of_slice(op: Op) -> Value | None:
    """slice(slice(x)) along one axis -> slice(x), where the inner one takes neighbours"""
    assert isinstance(op, Slice)
    inner = op.x
    if not isinstance(inner, Slice) or inner.axis % op.rank != op.axis % op.rank or inner.step != 1:
        return None
    return _settled(lambda: Slice(inner.x, op.axis, inner.start + op.start, inner.start + op.stop, op.step))


def _settled(make: Callable[[], Value]) -> Value | None:
    """What `make` gives, or None when a size comparison in it cannot be settled."""
    try:
        return make()
    except DimError:
        return None


def slice_of_concat(op: Op) -> Value | None:
    """A slice that lies in one piece of a concat -> a slice of that piece"""
    assert isinstance(op, Slice)
    if not isinstance(op.x, Concat) or op.x.axis % op.rank != op.axis % op.rank:
        return None
    offset: int | Dim = 0
    for piece in op.x.xs:
        size = piece.shape[op.axis]
        end = offset + size
        try:
            inside = known_at_most(offset, op.start) and known_at_most(op.stop, end)
        except DimError:
            inside = False
        if inside:
            start, stop = op.start - offset, op.stop - offset
            return _settled(lambda piece=piece, a=start, b=stop: Slice(piece, op.axis, a, b, op.step))  # type: ignore[misc]
        offset = end
    return None


def concat_of_one(op: Op) -> Value | None:
    """concat(x) -> x, and pieces of size 0 go"""
    assert isinstance(op, Concat)
    if len(op.xs) == 1:
        return op.xs[0]
    kept = tuple(piece for piece in op.xs if piece.shape[op.axis] != 0)
    return Concat(kept, op.axis) if kept and len(kept) < len(op.xs) else None


def concat_of_concat(op: Op) -> Value | None:
    """concat(concat(a, b), c) along one axis -> concat(a, b, c)"""
    assert isinstance(op, Concat)
    pieces: list[Value] = []
    for piece in op.xs:
        nested = isinstance(piece, Concat) and piece.axis % op.rank == op.axis % op.rank
        pieces.extend(piece.xs if nested and isinstance(piece, Concat) else (piece,))
    return Concat(tuple(pieces), op.axis) if len(pieces) > len(op.xs) else None


def concat_of_slices(op: Op) -> Value | None:
    """concat(x[a:b], x[b:c]) -> x[a:c]"""
    assert isinstance(op, Concat)
    pieces: list[Value] = []
    for piece in op.xs:
        last = pieces[-1] if pieces else None
        if _adjacent(last, piece, op.axis % op.rank):
            assert isinstance(last, Slice) and isinstance(piece, Slice)
            pieces[-1] = Slice(last.x, last.axis, last.start, piece.stop)
        else:
            pieces.append(piece)
    return Concat(tuple(pieces), op.axis) if len(pieces) < len(op.xs) else None


def _adjacent(a: Value | None, b: Value, axis: int) -> bool:
    return (
        isinstance(a, Slice)
        and isinstance(b, Slice)
        and a.x is b.x
        and a.axis % a.rank == b.axis % b.rank == axis
        and a.step == b.step == 1
        and a.stop == b.start
    )


def gather_of_one(op: Op) -> Value | None:
    """gather at one known index -> a slice; gather at neighbouring known indices -> a slice"""
    assert isinstance(op, Gather)
    axis = op.axis % op.x.rank
    size = op.x.shape[axis]
    if number_of(op.indices) is not None and product(op.indices.shape) == 1:
        found = number_of(op.indices)
        assert found is not None
        first = int(found)
        # A negative index counts from the end, which a symbolic size supports as well.
        start = first if first >= 0 else size + first
        cut = _settled(lambda: Slice(op.x, axis, start, start + 1))
        return None if cut is None else Reshape(cut, op.shape)
    if not isinstance(op.indices, Constant) or op.indices.rank != 1:
        return None
    indices = op.indices.value.array.tolist()
    if not indices or indices[0] < 0 or indices != list(range(indices[0], indices[0] + len(indices))):
        return None
    return _settled(lambda: Slice(op.x, axis, indices[0], indices[0] + len(indices)))


def pad_by_nothing(op: Op) -> Value | None:
    """pad by 0 on every side -> x"""
    assert isinstance(op, Pad)
    return None if any(op.low) or any(op.high) else op.x


def move_before_widening(op: Op) -> Value | None:
    """Moving the elements of a losslessly widened value -> widening the moved elements: fewer bytes move"""
    assert isinstance(op, (Reshape, Transpose, Slice, Gather))
    if not isinstance(op.x, Cast) or not widens(op.x):
        return None
    return Cast(op.replace(x=op.x.x), op.x.to)


def concat_before_widening(op: Op) -> Value | None:
    """concat of values that are all widened from one dtype -> the concat, widened"""
    assert isinstance(op, Concat)
    casts = [piece for piece in op.xs if isinstance(piece, Cast) and widens(piece)]
    if len(casts) < len(op.xs) or len({cast.x.dtype for cast in casts}) != 1:
        return None
    return Cast(Concat(tuple(cast.x for cast in casts), op.axis), casts[0].to)


def norm_before_transpose(op: Op) -> Value | None:
    """norm(transpose(x)), last axis in place -> transpose(norm(x)), so that transposes meet and cancel"""
    assert isinstance(op, (RMSNorm, LayerNorm))
    if not isinstance(op.x, Transpose) or op.x.permutation[-1] != op.rank - 1:
        return None
    return Transpose(op.replace(x=op.x.x), op.x.permutation)


def axis_from_the_front(op: Op) -> Value | None:
    """A negative axis counted from the front"""
    assert isinstance(op, (Slice, Concat, Gather, GatherElements, Cumsum, Softmax, Argmax))
    if op.axis >= 0:
        return None
    rank = op.xs[0].rank if isinstance(op, Concat) else op.x.rank
    return op.replace(axis=op.axis % rank)


STRUCTURAL_RULES: tuple[tuple[type[Op], Rule], ...] = (
    *((kind, axis_from_the_front) for kind in (Slice, Concat, Gather, GatherElements, Cumsum, Softmax, Argmax)),
    (Reshape, reshape_to_same),
    (Reshape, reshape_of_reshape),
    (Reshape, reshape_of_reduction),
    (Reshape, reshape_of_constant),
    (Transpose, reshape_of_constant),
    (Transpose, transpose_of_nothing),
    (Transpose, transpose_of_transpose),
    (Broadcast, broadcast_of_nothing),
    (Broadcast, broadcast_of_broadcast),
    (Slice, slice_of_everything),
    (Slice, slice_of_slice),
    (Slice, slice_of_concat),
    (Concat, concat_of_one),
    (Concat, concat_of_concat),
    (Concat, concat_of_slices),
    (Concat, concat_before_widening),
    (Gather, gather_of_one),
    (Pad, pad_by_nothing),
    (RMSNorm, norm_before_transpose),
    (LayerNorm, norm_before_transpose),
    *((kind, move_before_widening) for kind in (Reshape, Transpose, Slice, Gather)),
)
