"""Values that depend on a sequence's length, at every length up to the context: constant, or of a few regimes.

Rotary frequencies may change as a sequence grows: at once beyond the trained length (longrope), in steps (Qwen's
dynamic NTK), or with every token (dynamic NTK). The numbers that the length alone decides are evaluated for all
lengths, in the graph's own dtypes. Where they take few values, in runs of consecutive lengths, each run is a regime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import Dim, FloorDiv, product, symbols_of
from llmc.compiler.ir.elementwise import Activation, Binary, Cast, Compare, Unary, Where, constant
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.llm import static
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import (
    All,
    Any,
    Broadcast,
    Concat,
    Gather,
    Matmul,
    Max,
    Mean,
    Min,
    Prod,
    Reduce,
    Reshape,
    Slice,
    Sum,
    Transpose,
)
from llmc.compiler.ir.types import Array, numpy_dtype, precise
from llmc.compiler.passes.probe import LENGTH, Probe, read_weight

LENGTHS = "lengths"  # the input that says of each token how long the sequence is that it is computed for
OF_LENGTH = "as a sequence grows"  # stands in what is refused because every length has numbers of its own
MOST_REGIMES = 8
_CHUNK = 1 << 15  # lengths that are evaluated at once
_ELEMENTWISE = (Unary, Binary, Compare, Activation, Cast, Where)
_RUNNING: dict[type[Op], Callable[..., Array]] = {
    Max: np.maximum.accumulate,
    Min: np.minimum.accumulate,
    Sum: np.add.accumulate,
    Mean: np.add.accumulate,
    Prod: np.multiply.accumulate,
    Any: np.logical_or.accumulate,
    All: np.logical_and.accumulate,
}


class Unsettled(Exception):
    """Raised for values that depend on the length in other ways than by a few regimes; the text says which."""


@dataclass(frozen=True)
class Regimes:
    """Runs of lengths within which the length changes nothing.

    last: the greatest length of each regime but the last one. values: for each regime, every number that the length
    decides, as a constant. One regime: the length decides nothing.
    """

    last: tuple[int, ...]
    values: tuple[Mapping[Value, Value], ...]


def regimes(probe: Probe, roots: Sequence[Value]) -> Regimes:
    """How the length decides the roots, which depend on positions, lengths and weights.

    Unsettled where it does so other than by a few numbers (not one a token), or in more than MOST_REGIMES regimes.
    """
    if any(probe.decided_by_other_sizes(root) for root in roots):
        raise Unsettled("its angles depend on sizes beside the number of tokens")
    numbers = _numbers_of_length(probe, roots)
    longest = probe.longest
    if longest is None:
        raise Unsettled("its angles depend on the sequence's length, and the longest sequence is not known")
    last: list[int] = []
    found: list[list[Array]] = []
    for begin in range(1, longest + 1, _CHUNK):
        lengths = np.arange(begin, min(begin + _CHUNK, longest + 1))
        tables = _by_length(probe, numbers, lengths)
        flat = [np.ascontiguousarray(table.reshape(len(lengths), -1)) for table in tables]
        changes = np.zeros(len(lengths), bool)
        for table in flat:
            changes[1:] |= (table[1:] != table[:-1]).any(axis=1)
        changes[0] = not found or any(
            not np.array_equal(t[0], f.reshape(-1)) for t, f in zip(flat, found[-1], strict=True)
        )
        for index in np.flatnonzero(changes).tolist():
            if found:
                last.append(begin + index - 1)
            found.append([table[index] for table in tables])
            if len(found) > MOST_REGIMES:
                kept = f"; --max-context {last[0]} keeps to the first" if last[0] > 1 else ""
                raise Unsettled(
                    f"the rotary angles of all tokens change over {MOST_REGIMES - 1} times {OF_LENGTH}{kept}"
                )
    ends = (*last, longest)
    laws = [_law(probe, numbers, own, before, end) for own, before, end in zip(found, (0, *last), ends, strict=True)]
    values = tuple(
        {number: constant(value, number.dtype) for number, value in zip(numbers, own, strict=True)} for own in laws
    )
    return Regimes(tuple(last), values)


def _law(probe: Probe, numbers: Sequence[Value], own: list[Array], before: int, end: int) -> list[Array]:
    """The numbers of one regime in f64, where that has the same regime: what they stand for, before rounding."""
    with precise():
        ends = _by_length(probe, numbers, np.array([min(before + 1, end), end]))
    exact = [array[0] for array in ends]
    same = all(np.array_equal(array[0], array[1]) for array in ends)
    near = all(
        np.allclose(one, other, rtol=2.0**-20, atol=0) if one.dtype.kind == "f" else np.array_equal(one, other)
        for one, other in zip(exact, own, strict=True)
    )
    return exact if same and near else own


def _numbers_of_length(probe: Probe, roots: Sequence[Value]) -> list[Value]:
    """The values that the length alone decides and that others are computed from: nothing else depends on it."""
    found: dict[Value, None] = {}
    seen: set[Value] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        if value in seen or not probe.depends_on_length(value):
            continue
        seen.add(value)
        if probe.sources[value] == {LENGTH} and not probe.has_size(value):
            found[value] = None
            continue
        assert isinstance(value, Op)
        if not any(probe.depends_on_length(operand) for operand in value.operands):
            raise Unsettled("its angles depend on how far a token is from the sequence's end")
        stack.extend(value.operands)
    return list(found)


def _by_length(probe: Probe, roots: Sequence[Value], lengths: NDArray[np.int64]) -> list[Array]:
    """The roots, which the length alone decides, for every one of these lengths: each [lengths, *shape]."""
    found: dict[Value, Array] = {}
    for op in topological(roots):
        if not isinstance(op, Op) or probe.sources[op] != {LENGTH} or probe.has_size(op):
            continue
        if any(probe.depends_on_length(operand) for operand in op.operands):
            found[op] = _together(probe, op, found, len(lengths))
        else:
            found[op] = _first(probe, op, lengths)
    return [found[root] for root in roots]


def _sizes(dim: int | Dim, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """A size, which the number of tokens decides, for each length."""
    if isinstance(dim, int):
        return np.full(len(lengths), dim, np.int64)
    total = np.zeros(len(lengths), np.int64)
    for monomial, coefficient in dim.terms:
        part = np.full(len(lengths), coefficient, np.int64)
        for atom, power in monomial:
            value = _sizes(atom.numerator, lengths) // atom.divisor if isinstance(atom, FloorDiv) else lengths
            part *= value**power
        total += part
    return total


def _first(probe: Probe, op: Op, lengths: NDArray[np.int64]) -> Array:
    """What makes a length of positions: one of a row of them, or a running reduction; for each length."""
    (x, *_) = op.operands
    axes = [axis for axis in range(x.rank) if symbols_of(x.shape[axis])] if len(op.operands) == 1 else []
    if len(axes) == 1 and isinstance(op, Slice) and op.axis % x.rank == axes[0] and op.stop == op.start + 1:
        row = np.moveaxis(probe.evaluate([x], int(lengths[-1]), exact=False)[0], axes[0], 0)
        return np.expand_dims(row[_sizes(op.start, lengths)], axes[0] + 1)
    running = _RUNNING.get(type(op))
    if len(axes) == 1 and x.shape[axes[0]] == probe.size and isinstance(op, Reduce) and running is not None:
        whole = np.moveaxis(probe.evaluate([x], int(lengths[-1]), exact=False)[0], axes[0], 0)
        rest = tuple(axis for axis in (a % x.rank for a in op.axes) if axis != axes[0])
        # Over other axes first, then over one token more each time; of a mean, the sum.
        kind = Sum if isinstance(op, Mean) else type(op)
        if rest:
            within = tuple(axis + 1 if axis < axes[0] else axis for axis in rest)
            whole = np.asarray(kind.function(whole, axis=within, keepdims=True))
        total = np.asarray(running(whole, axis=0))[lengths - 1]
        if isinstance(op, Mean):
            count = lengths * static(product(tuple(x.shape[axis] for axis in rest)))
            total = total / count.reshape(-1, *[1] * (total.ndim - 1))
        shape = tuple(static(dim) for dim in op.shape)
        return np.asarray(total.reshape(len(lengths), *shape), numpy_dtype(op.dtype))
    raise Unsettled(f"its angles depend on the sequence's length through {op.name}, which is not followed")


def _together(probe: Probe, op: Op, found: dict[Value, Array], count: int) -> Array:
    """An op for all lengths at once: operands and result have one more axis in front."""

    def many(value: Value, rank: int | None = None) -> Array:
        """[lengths, ones as needed for `rank`, *shape]; of what no length decides, as it is."""
        if value not in found:
            return np.asarray(probe.evaluate([value], 1, exact=False)[0])
        array = found[value]
        return array if rank is None else array.reshape(count, *[1] * (rank - value.rank), *array.shape[1:])

    if any(value not in found and (probe.sources.get(value) or probe.has_size(value)) for value in op.operands):
        raise Unsettled(f"its angles depend on positions and on the sequence's length at once, in {op.name}")
    shape = tuple(static(dim) for dim in op.shape)
    if isinstance(op, _ELEMENTWISE):
        return np.asarray(op.evaluate(*(many(value, op.rank) for value in op.operands)))
    if isinstance(op, Reshape):
        return many(op.x).reshape(count, *shape)
    if isinstance(op, Broadcast):
        return np.broadcast_to(many(op.x, op.rank), (count, *shape))
    if isinstance(op, Transpose):
        return many(op.x).transpose(0, *(axis + 1 for axis in op.permutation))
    if isinstance(op, Slice):
        return _sliced(op, many(op.x))
    if isinstance(op, Concat):
        parts = [np.broadcast_to(many(v, v.rank), (count, *(static(dim) for dim in v.shape))) for v in op.xs]
        return np.concatenate(parts, axis=op.axis % op.rank + 1)
    if isinstance(op, Gather) and op.x not in found and op.axis % op.x.rank == 0:
        return np.asarray(op.evaluate(many(op.x), many(op.indices)))
    if isinstance(op, Matmul):
        return np.asarray(op.evaluate(many(op.a, op.rank), many(op.b, op.rank)))
    raise Unsettled(f"its angles depend on the sequence's length through {op.name}, which is not followed")


def _sliced(op: Slice, array: Array) -> Array:
    index: list[slice] = [slice(None)] * array.ndim
    index[op.axis % op.rank + 1] = slice(int(op.start), int(op.stop), op.step)  # type: ignore[arg-type]
    return array[tuple(index)]


def settled(value: Value, numbers: Mapping[Value, Value]) -> Value:
    """The value with its numbers of one regime in place of those that the length decides."""
    new: dict[Value, Value] = dict(numbers)
    for old in topological([value], new):
        if isinstance(old, Op):
            new[old] = old.map_operands(lambda operand: new.get(operand, operand))
    return new.get(value, value)


def length_regimes(graph: Graph, max_context: int) -> tuple[int, ...]:
    """The greatest length of each regime but the last one of a graph after all passes, by what it makes of `lengths`.

    Every value that comes of this input alone, [T, ...] for lengths [T], is evaluated for every length.
    """
    source = next((value for value in graph.inputs if value.name == LENGTHS), None)
    if source is None:
        return ()
    made: set[Value] = {source}
    last: set[int] = set()
    size = max(1, max_context)
    names = {symbol.name: size for dim in source.shape for symbol in symbols_of(dim)}
    for op in graph.ops:
        if not any(operand in made for operand in op.operands):
            continue
        if all(operand in made or operand in graph.constants for operand in op.operands):
            made.add(op)
    ends = [op for op in made if isinstance(op, Op) and any(user not in made for user in graph.users.get(op, ()))]
    lengths = np.arange(1, size + 1, dtype=np.int32).reshape([size if isinstance(d, Dim) else d for d in source.shape])
    for op in ends:
        found = evaluate_values([op], {source: lengths}, read_weight, names)["0"]
        rows = np.asarray(found).reshape(size, -1)
        last.update((np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1).tolist())
    return tuple(sorted(last))
