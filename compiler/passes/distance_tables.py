"""Tables of what is added to scores by distance (Raffel et al. 2020): built of ops, so that weights may be in them.

A function of distance (see `distances`) is built as a value whose first axis counts distances, op by op.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import (
    Activation,
    Add,
    Binary,
    Cast,
    Compare,
    Maximum,
    Mul,
    Unary,
    Where,
    constant,
)
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Gather, Iota, Pad, Reduce, Reshape, Slice, Transpose
from llmc.compiler.passes.distances import Distances
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.pair_functions import PairReader
from llmc.compiler.passes.points import ELEMENTWISE, Applied, Known, Linear, Place, Point, Table
from llmc.compiler.passes.probe import NOT_TOKENS, Probe

_LEAST = -1e28  # of a table: what is hidden there stays above what kernels hide by, so that no row of a query is empty
_MOST_ELEMENTS = 1 << 26  # of a table of distances, for the longest sequence: a quarter of a GiB in f32


def table_of(distances: Distances, point: Point, heads: int) -> Value:
    """f32[heads, 2 * span - 1] by key - query + span - 1, of constants and weights; span covers whole pages."""
    columns = 2 * distances.most - 1
    if heads * columns > _MOST_ELEMENTS:
        raise Unrecognised(
            f"its table of distances for {distances.most} tokens is too large: compile with a smaller --max-context"
        )
    built = _Builder(distances.reader, distances.most).build(point)
    rows = math.prod(point.shape)
    flat: Value = Reshape(Broadcast(built, (columns, *built.shape[1:])), (columns, rows))
    flat = Transpose(flat, (1, 0))
    flat = flat if flat.dtype == "f32" else Cast(flat, "f32")
    flat = Maximum(flat, constant(_LEAST, "f32"))
    if rows != heads:
        flat = Broadcast(flat, (heads, columns))
    spare = -distances.most % PAGE  # kernels look at whole pages
    return Pad(flat, (0, spare), (0, spare)) if spare else flat


def distance_table(probe: Probe, bias: Value, heads: int) -> Value:
    """f32[heads, 2 * span - 1]: what a bias [..., heads or 1, S, S] of a text adds, by key - query + span - 1.

    Unrecognised says what is in the way. The table comes of weights and constants only: it is computed when compiling.
    """
    if not probe.sources.get(bias, frozenset(("ids",))) <= NOT_TOKENS:
        raise Unrecognised("token ids decide what it adds to scores")
    if probe.size is None or probe.longest is None:
        raise Unrecognised("it adds a bias by position, and the longest sequence is not known")
    if product(bias.shape[:-2]) not in (1, heads):
        raise Unrecognised(f"it adds a bias {bias.type} to scores of {heads} heads")
    reader = PairReader(probe, probe.longest, size=probe.size)
    distances = Distances(reader)
    return table_of(distances, distances.by_distance(reader.pair(bias)), heads)


@dataclass(eq=False)
class _Builder:
    """Builds functions of distance as values [2 * most - 1 (or 1), *shape], the distance first."""

    reader: PairReader
    most: int
    _built: dict[Point, Value] = field(default_factory=dict)

    def build(self, point: Point) -> Value:
        if point not in self._built:
            self._built[point] = self._build(point)
        return self._built[point]

    def _line(self, place: Place, dtype: str) -> Value:
        """[2 * most - 1]: a place at every distance."""
        line: Value = Add(Iota(2 * self.most - 1), constant(1 - self.most))
        line = Add(Mul(line, constant(place.key)), constant(place.constant))
        return line if dtype == "i64" else Cast(line, dtype)

    def _build(self, point: Point) -> Value:
        if isinstance(point, Linear):
            line = self._line(point.place, point.dtype)
            return Reshape(line, (line.shape[0], *point.shape))
        if isinstance(point, Known):
            assert point.value is not None
            return Reshape(point.value, (1, *point.shape))
        if isinstance(point, Table):
            assert point.value is not None
            ((axis, place),) = [(axis, place) for axis, place in enumerate(point.index) if place is not None]
            taken = Gather(point.value, self._line(place, "i64"), axis)
            front = Transpose(taken, (axis, *(i for i in range(taken.rank) if i != axis)))
            return Reshape(front, (front.shape[0], *point.shape))
        assert isinstance(point, Applied) and point.op is not None
        return self._op(point.op, [self.build(x) for x in point.xs], point.shape)

    def _op(self, op: Op, xs: list[Value], shape: tuple[int, ...]) -> Value:
        if isinstance(op, ELEMENTWISE):
            rank = len(shape) + 1
            padded = [x if x.rank == rank else Reshape(x, (x.shape[0], *(1,) * (rank - x.rank), *x.shape[1:]))
                      for x in xs]  # fmt: skip
            return _elementwise(op, padded)
        lead = max((x.shape[0] for x in xs), key=int)  # type: ignore[arg-type]
        if isinstance(op, Reshape):
            return Reshape(xs[0], (lead, *shape))
        if isinstance(op, Broadcast):
            padded_shape = (lead, *(1,) * (len(shape) + 1 - xs[0].rank), *xs[0].shape[1:])
            return Broadcast(Reshape(xs[0], padded_shape), (lead, *shape))
        if isinstance(op, Transpose):
            return Transpose(xs[0], (0, *(1 + axis for axis in op.permutation)))
        if isinstance(op, Slice):
            return Slice(xs[0], 1 + op.axis % op.rank, op.start, op.stop, op.step)
        if isinstance(op, Concat):
            return Concat(tuple(Broadcast(x, (lead, *x.shape[1:])) for x in xs), 1 + op.axis % op.rank)
        if isinstance(op, Reduce):
            return type(op)(xs[0], tuple(1 + axis % op.x.rank for axis in op.axes), op.keep)
        assert isinstance(op, Gather)
        axis = op.axis % op.x.rank
        taken = Gather(Reshape(xs[0], xs[0].shape[1:]), xs[1], axis)
        return Transpose(taken, (axis, *(i for i in range(taken.rank) if i != axis)))


def _elementwise(op: Op, xs: list[Value]) -> Value:
    """The same op over other operands."""
    if isinstance(op, Cast):
        return Cast(xs[0], op.to)
    if isinstance(op, Activation):
        return Activation(xs[0], op.kind)
    if isinstance(op, Where):
        return Where(*xs)
    if isinstance(op, Unary):
        return type(op)(xs[0])
    assert isinstance(op, (Binary, Compare))
    return type(op)(*xs)
