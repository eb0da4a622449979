"""Functions of one query and one key, as trees of points, and their numbers for any pairs.

A `Point` is a value for a query at one place, a key at another and a sequence of some length: a leaf that a place
decides, or an op of points. `Points` evaluates them in numpy, each op by its own meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from graphlib import TopologicalSorter
from typing import TypeVar

import numpy as np

from llmc.compiler.ir.elementwise import Activation, Binary, Cast, Compare, Unary, Where
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, CheckedIndex, Concat, Gather, Reduce, Reshape, Slice, Transpose
from llmc.compiler.ir.types import Array, is_precise, numpy_dtype
from llmc.compiler.passes.probe import Probe
from llmc.errors import IRError

ELEMENTWISE = (Unary, Binary, Compare, Where, Cast, Activation, CheckedIndex)
ZERO = np.zeros((1, 1), np.int64)


Number = TypeVar("Number", int, Fraction)


def ends(query: Number, key: Number, length: Number, constant: Number, most: int) -> tuple[Number, Number]:
    """The least and the greatest that query * q + key * k + length * S + constant is for 0 <= q, k < S <= `most`.

    It is linear, so at corners.
    """
    corners = [
        query * q + key * k + length * size + constant
        for size in (1, most)
        for q in (0, size - 1)
        for k in (0, size - 1)
    ]
    return min(corners), max(corners)


@dataclass(frozen=True)
class Place:
    """query * q + key * k + length * S + constant, for a query at q and a key at k of S tokens."""

    query: int = 0
    key: int = 0
    length: int = 0
    constant: int = 0

    def moved(self, by: int | Place) -> Place:
        """The place that many further on."""
        other = by if isinstance(by, Place) else Place(constant=by)
        return Place(
            self.query + other.query,
            self.key + other.key,
            self.length + other.length,
            self.constant + other.constant,
        )

    def times(self, factor: int) -> Place:
        """All four numbers times a factor."""
        return Place(self.query * factor, self.key * factor, self.length * factor, self.constant * factor)

    @property
    def variables(self) -> frozenset[str]:
        """Which of the three decide it."""
        return frozenset(name for name in ("query", "key", "length") if getattr(self, name))

    def ends(self, most: int) -> tuple[int, int]:
        """The least and the greatest it can be: lengths 1 to `most`, a query and a key below the length."""
        return ends(self.query, self.key, self.length, self.constant, most)


@dataclass(frozen=True, eq=False)
class Point:
    """A value for one query and one key. `shape`: its axes, those that count queries or keys being of size 1."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def inputs(self) -> tuple[Point, ...]:
        """The points that it is computed from."""
        return ()

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that decide it, besides its inputs."""
        return ()

    @cached_property
    def variables(self) -> frozenset[str]:
        """Which of query, key and length decide it."""
        parts = [*(p.variables for p in self.inputs), *(p.variables for p in self.places)]
        return frozenset().union(*parts)


@dataclass(frozen=True, eq=False)
class Linear(Point):
    """A place as a number."""

    place: Place = Place()

    @property
    def places(self) -> tuple[Place, ...]:
        return (self.place,)


@dataclass(frozen=True, eq=False)
class Known(Point):
    """A value that no place decides: a constant, or made of weights."""

    value: Value | None = None


@dataclass(frozen=True, eq=False)
class Table(Point):
    """A value known when compiling, at places along some of its axes (None: the axis is whole)."""

    value: Value | None = None
    index: tuple[Place | None, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(place for place in self.index if place is not None)


@dataclass(frozen=True, eq=False)
class Running(Point):
    """The running sum of `x`, a function of the query's place, up to and including a place."""

    x: Point | None = None
    place: Place = Place()

    @property
    def places(self) -> tuple[Place, ...]:
        return (self.place,)


@dataclass(frozen=True, eq=False)
class Applied(Point):
    """An op of points. Its `axes` are how it works on arrays whose first axes are pairs of a query and a key."""

    op: Op | None = None
    xs: tuple[Point, ...] = ()

    @property
    def inputs(self) -> tuple[Point, ...]:
        return self.xs


@dataclass(eq=False)
class Points:
    """Evaluates points of one graph, whose sequences have `most` tokens at most."""

    probe: Probe
    most: int
    _arrays: dict[tuple[int, bool], Array] = field(default_factory=dict)
    _kept: list[object] = field(default_factory=list)  # what is known by its id stays alive

    def evaluate(self, point: Point, queries: Array, keys: Array, sizes: Array | None = None) -> Array:
        """The point for queries, keys and lengths i64[A, B] (or what broadcasts to it): [A, B, *shape], or with axes
        of size 1 for A and B where they do not matter. IRError where a table ends or a weight cannot be read."""
        known: dict[Point, Array] = {}
        lengths = np.full((1, 1), self.most) if sizes is None else sizes
        for each in _ordered(point):
            with np.errstate(all="ignore"):
                try:
                    known[each] = self._evaluated(each, known, {"query": queries, "key": keys, "length": lengths})
                except (ValueError, IndexError) as error:
                    raise IRError(f"its mask does not evaluate: {error}") from error
        return known[point]

    def _evaluated(self, point: Point, known: dict[Point, Array], at: dict[str, Array]) -> Array:
        if isinstance(point, Linear):
            place = _where(point.place, at)
            return place.astype(numpy_dtype(point.dtype)).reshape(*place.shape, *point.shape)
        if isinstance(point, Known):
            return self.array(point.value)[None, None]
        if isinstance(point, Table):
            return self._looked_up(point, at)
        if isinstance(point, Running):
            assert point.x is not None
            vector = self.evaluate(point.x, np.arange(self.most)[:, None], ZERO)[:, 0]
            vector = np.broadcast_to(vector, (self.most, *vector.shape[1:]))
            return np.cumsum(vector, axis=0, dtype=vector.dtype)[_where(point.place, at)]
        assert isinstance(point, Applied) and point.op is not None
        return _apply(point, [known[x] for x in point.xs])

    def _looked_up(self, point: Table, at: dict[str, Array]) -> Array:
        assert point.value is not None
        array = self.array(point.value)
        axes = [axis for axis, place in enumerate(point.index) if place is not None]
        places = [_where(place, at) for place in point.index if place is not None]
        for axis, place in zip(axes, places, strict=True):
            if place.min() < 0 or place.max() >= array.shape[axis]:
                raise IRError(f"its mask has {array.shape[axis]} rows, and row {place.max()} is looked up")
        front = np.moveaxis(array, axes, range(len(axes)))[tuple(places)]
        return front.reshape(*front.shape[:2], *point.shape)

    def array(self, value: Value | None) -> Array:
        """A value known when compiling; IRError where it needs weights that cannot be read now."""
        assert value is not None
        key = (id(value), is_precise())
        if key not in self._arrays:
            self._kept.append(value)
            self._arrays[key] = self.probe.evaluate([value], self.most, exact=is_precise())[0]
        return self._arrays[key]


def _where(place: Place, at: dict[str, Array]) -> Array:
    parts = [at[name] * getattr(place, name) for name in ("query", "key", "length") if getattr(place, name)]
    total: Array = np.full((1, 1), place.constant, np.int64)
    for part in parts:
        total = total + part
    return total


def _apply(point: Applied, arrays: list[Array]) -> Array:
    """An op on arrays [A, B, *shape of each operand]."""
    op = point.op
    if isinstance(op, ELEMENTWISE):
        rank = len(point.shape)
        return np.asarray(op.evaluate(*(a.reshape(*a.shape[:2], *(1,) * (rank + 2 - a.ndim), *a.shape[2:])
                                        for a in arrays)))  # fmt: skip
    lead = np.broadcast_shapes(*(a.shape[:2] for a in arrays))
    if isinstance(op, Reshape):
        return arrays[0].reshape(*lead, *point.shape)
    if isinstance(op, Transpose):
        return arrays[0].transpose(0, 1, *(2 + axis for axis in op.permutation))
    if isinstance(op, Broadcast):
        (x,) = arrays
        padded = x.reshape(*lead, *(1,) * (len(point.shape) + 2 - x.ndim), *x.shape[2:])
        return np.broadcast_to(padded, (*lead, *point.shape))
    if isinstance(op, Slice):
        index = [slice(None)] * arrays[0].ndim
        index[2 + op.axis % op.rank] = slice(op.start, op.stop, op.step)
        return arrays[0][tuple(index)]
    if isinstance(op, Concat):
        full = [np.broadcast_to(a, (*lead, *a.shape[2:])) for a in arrays]
        return np.concatenate(full, axis=2 + op.axis % op.rank)
    if isinstance(op, Reduce):
        axes = tuple(2 + axis % op.x.rank for axis in op.axes)
        return _reduced(op, arrays[0], axes)
    assert isinstance(op, Gather)
    table, rows = arrays
    axis = op.axis % op.x.rank
    size = table.shape[2 + axis]
    if rows.size and (rows.min() < -size or rows.max() >= size):
        raise IRError(f"its mask looks up row {int(rows.max())} of {size}")
    taken = np.take(table[0, 0], rows, axis=axis)  # [..., A, B, *rows, ...]
    return np.moveaxis(taken, (axis, axis + 1), (0, 1))


def _reduced(op: Reduce, x: Array, axes: tuple[int, ...]) -> Array:
    wide = x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x
    return np.asarray(type(op).function(wide, axis=axes, keepdims=op.keep), x.dtype)


def _ordered(root: Point) -> list[Point]:
    """All that a point is computed from, and itself, inputs first."""
    found = {root: root.inputs}
    stack = [root]
    while stack:
        for x in stack.pop().inputs:
            if x not in found:
                found[x] = x.inputs
                stack.append(x)
    return list(TopologicalSorter(found).static_order())
