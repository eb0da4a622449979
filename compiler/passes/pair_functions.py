"""Masks and biases [..., Q, K] as functions of one query and one key: `lift` follows a value to where it comes from.

A value that positions and sizes decide is a tree of `Point`s over three whole numbers: the query's place, the key's
place and the sequence's length. Such a tree is the value itself, for every length up to the context, so that what is
shown of it (see `distances`, `mask_solver`) or evaluated of it at every place holds for all of them. What cannot be
followed raises `Unrecognised` with the op's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llmc.compiler.ir.dims import Dim, product, substitute
from llmc.compiler.ir.elementwise import Cast, Constant, constant
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.structural import (
    Broadcast,
    Concat,
    Cumsum,
    Gather,
    Iota,
    Max,
    Min,
    Reduce,
    Reshape,
    Slice,
    Sum,
    Transpose,
)
from llmc.compiler.ir.types import INTEGERS, NUMPY_DTYPES, Shape
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.points import (
    ELEMENTWISE,
    ZERO,
    Applied,
    Known,
    Linear,
    Place,
    Point,
    Points,
    Running,
    Table,
)

MOST_PAIRS = 1 << 26  # pairs of a query and a key that a mask is evaluated for, at most


@dataclass(eq=False)
class PairReader(Points):
    """Lifts and evaluates the values of one graph whose sequences have `size` tokens, `most` of them at most.

    Equal trees are one object, so that what was found out about one holds for all layers that build it anew.
    """

    size: Dim = field(kw_only=True)
    _lifted: dict[tuple[int, tuple[Place | None, ...]], Point] = field(default_factory=dict)
    _same: dict[tuple[object, ...], Point] = field(default_factory=dict)

    def pair(self, value: Value) -> Point:
        """A value [..., Q, K], or one that broadcasts to it, where Q and K both count the sequence's tokens."""
        index = [Place(query=1) if i == 2 else Place(key=1) if i == 1 else None for i in range(value.rank, 0, -1)]
        return self.lift(value, tuple(index))

    def lift(self, value: Value, index: tuple[Place | None, ...]) -> Point:
        """The value at a place along each axis; None: an axis is whole, or the same all along."""
        index = tuple(None if dim == 1 else place for dim, place in zip(value.shape, index, strict=True))
        key = (id(value), index)
        if key not in self._lifted:
            self._kept.append(value)
            try:
                self._lifted[key] = self._lift(value, index)
            except Unrecognised as reason:
                self._lifted[key] = self._evaluated_whole(value, index, reason)
        return self._lifted[key]

    def _evaluated_whole(self, value: Value, index: tuple[Place | None, ...], reason: Unrecognised) -> Point:
        """A value that is not followed, as a table: for the longest sequence, where the length decides no element."""
        probe = self.probe
        if value not in probe.sources or probe.depends_on_tokens(value) or probe.depends_on_length(value):
            raise reason
        if math.prod(probe.shape(value, self.most)) > MOST_PAIRS:
            raise reason
        return self.known(value, index)

    def _lift(self, value: Value, index: tuple[Place | None, ...]) -> Point:
        if self.probe.is_constant(value) or isinstance(value, Constant):
            return self.known(value, index)
        if value is self.probe.positions:
            if index[-1] is None:
                raise Unrecognised("its mask takes the positions of all tokens at once")
            return self.linear(index[-1], value.dtype, value.rank)
        if not isinstance(value, Op):
            name = value.name if isinstance(value, Input) else str(value.type)
            raise Unrecognised(f"its mask depends on the input {name}")
        if not value.operands and not isinstance(value, Iota):
            return self.known(value, index)
        if isinstance(value, ELEMENTWISE) and value.bind({}) is value:  # no size decides what it does
            return self._elementwise(value, index)
        rule = _RULES.get(type(value)) or next((r for kind, r in _RULES.items() if isinstance(value, kind)), None)
        if rule is None:
            raise Unrecognised(f"its mask passes through {value.name}: {value.type}")
        return rule(self, value, index)

    # Leaves

    def _interned(self, point: Point, *key: object) -> Point:
        full = (type(point), point.shape, point.dtype, *key)
        return self._same.setdefault(full, point)

    def linear(self, place: Place, dtype: str, rank: int) -> Point:
        return self._interned(Linear((1,) * rank, dtype, place), place)

    def known(self, value: Value, index: tuple[Place | None, ...]) -> Point:
        shape = tuple(1 if place is not None else dim for place, dim in zip(index, value.shape, strict=True))
        sizes = tuple(dim for dim in shape if isinstance(dim, int))
        if len(sizes) != len(shape):
            raise Unrecognised(f"its mask depends on a value of all tokens, {value.type}")
        self._kept.append(value)
        name: object = value.value if isinstance(value, Constant) else id(value)
        if all(place is None for place in index):
            return self._interned(Known(sizes, value.dtype, value), name)
        return self._interned(Table(sizes, value.dtype, value, index), name, index)

    def number(self, value: float, dtype: str, rank: int) -> Point:
        """A point that is one number."""
        return self.known(constant(np.full((1,) * rank, value), dtype), (None,) * rank)

    # Ops

    def _elementwise(self, op: Op, index: tuple[Place | None, ...]) -> Point:
        points = tuple(self.lift(x, index[len(index) - x.rank :]) for x in op.operands)
        return self.applied(op, points)

    def applied(self, op: Op, points: tuple[Point, ...], shape: tuple[int, ...] | None = None) -> Point:
        """An op over points; `shape` where it is not theirs broadcast."""
        if shape is None:
            rank = max(len(p.shape) for p in points)
            shape = np.broadcast_shapes(*(p.shape for p in points), (1,) * rank)
        attributes = tuple(op.attributes().items())
        ranks = tuple(x.rank for x in op.operands)
        point = Applied(shape, op.dtype, op, points)
        return self._interned(point, type(op), attributes, ranks, *(id(p) for p in points))

    def _iota(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Iota)
        (place,) = index
        if place is None:
            raise Unrecognised(f"its mask depends on a value of all tokens, {op.type}")
        return self.linear(place, op.dtype, 1)

    def _slice(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Slice)
        axis = op.axis % op.rank
        place = index[axis]
        if place is None and op.shape[axis] != 1:
            if not isinstance(op.x.shape[axis], int) or isinstance(op.shape[axis], Dim):
                raise Unrecognised(f"its mask takes some tokens only: {op.name} : {op.type}")
            x = self.lift(op.x, index)
            return self.applied(op, (x,), _with(x.shape, axis, int(op.shape[axis])))  # type: ignore[arg-type]
        start = self._place_of(op.start)
        moved = (place or Place()).times(op.step).moved(start)
        return self.lift(op.x, (*index[:axis], moved, *index[axis + 1 :]))

    def _place_of(self, size: int | Dim) -> Place:
        """A size as a place: a multiple of the number of tokens plus a constant."""
        if isinstance(size, int):
            return Place(constant=size)
        (name,) = {symbol.name for symbol in self.size.symbols()} if len(self.size.symbols()) == 1 else ("",)
        zero, one = (substitute(size, {name: n}) for n in (0, 1))
        # A quotient of the size is linear at a few lengths only.
        if not (isinstance(zero, int) and isinstance(one, int) and size == self.size * (one - zero) + zero):
            raise Unrecognised(f"its mask depends on the size {size}")
        first = substitute(self.size, {name: 0}), substitute(self.size, {name: 1})
        if first != (0, 1):
            raise Unrecognised(f"its mask depends on the size {size}")
        return Place(length=one - zero, constant=zero)

    def _transpose(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Transpose)
        before: list[Place | None] = [None] * op.rank
        for axis, source in enumerate(op.permutation):
            before[source] = index[axis]
        x = self.lift(op.x, tuple(before))
        return self.applied(op, (x,), tuple(x.shape[source] for source in op.permutation))

    def _broadcast(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Broadcast)
        x = self.lift(op.x, index[op.rank - op.x.rank :])
        shape = tuple(
            dim if place is None and isinstance(dim, int) else 1 for dim, place in zip(op.shape, index, strict=True)
        )
        return self.applied(op, (x,), shape)

    def _reshape(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Reshape)
        before: list[Place | None] = [None] * op.x.rank
        for old, new in _groups(op.x.shape, op.shape):
            placed = [axis for axis in new if index[axis] is not None]
            long_old = [axis for axis in old if op.x.shape[axis] != 1]
            long_new = [axis for axis in new if op.shape[axis] != 1]
            symbolic = any(isinstance(op.x.shape[axis], Dim) for axis in long_old)
            if not placed and not symbolic:
                continue
            if [op.x.shape[a] for a in long_old] != [op.shape[a] for a in long_new]:
                raise Unrecognised(f"its mask merges or splits tokens: {op.name} of {op.x.type} to {op.type}")
            for source, axis in zip(long_old, long_new, strict=True):
                before[source] = index[axis]
        x = self.lift(op.x, tuple(before))
        shape = tuple(
            dim if place is None and isinstance(dim, int) else 1 for dim, place in zip(op.shape, index, strict=True)
        )
        return self.applied(op, (x,), shape)

    def _concat(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Concat)
        axis = op.axis % op.rank
        if index[axis] is not None:
            raise Unrecognised(f"its mask is put together along tokens: {op.name} : {op.type}")
        parts = tuple(self.lift(x, index) for x in op.xs)
        full = []
        for part, x in zip(parts, op.xs, strict=True):
            size = x.shape[axis]
            if not isinstance(size, int):
                raise Unrecognised(f"its mask is put together along tokens: {op.name} : {op.type}")
            wide = np.broadcast_shapes(*(_with(p.shape, axis, 1) for p in parts))
            full.append(self.applied(Broadcast(x, x.shape), (part,), _with(wide, axis, size)))
        return self.applied(op, tuple(full), _with(full[0].shape, axis, sum(p.shape[axis] for p in full)))

    def _reduce(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Reduce)
        axes = {axis % op.x.rank for axis in op.axes}
        kept = [axis for axis in range(op.x.rank) if op.keep or axis not in axes]
        before: list[Place | None] = [None] * op.x.rank
        for axis, place in zip(kept, index, strict=True):
            before[axis] = place  # none along a reduced axis: it is of size 1
        if any(isinstance(op.x.shape[axis], Dim) for axis in axes):
            return self._over_tokens(op, axes, before)
        x = self.lift(op.x, tuple(before))
        sizes = {axis: op.x.shape[axis] for axis in axes}
        full = tuple(sizes.get(axis, dim) for axis, dim in enumerate(x.shape))
        wide = self.applied(Broadcast(op.x, op.x.shape), (x,), full)  # type: ignore[arg-type]
        shape = tuple(1 if i in axes else dim for i, dim in enumerate(x.shape) if op.keep or i not in axes)
        return self.applied(op, (wide,), shape)

    def _over_tokens(self, op: Reduce, axes: set[int], before: list[Place | None]) -> Point:
        """A number of all tokens: how many there are, or the greatest or least place."""
        unclear = Unrecognised(f"its mask is reduced over tokens by {op.name} of {op.x.type}")
        ((axis, size), *others) = [(axis, op.x.shape[axis]) for axis in axes if op.x.shape[axis] != 1]
        if others or size != self.size or any(place is not None for place in before):
            raise unclear
        before[axis] = Place(query=1)
        x = self.lift(op.x, tuple(before))
        while isinstance(x, Applied) and isinstance(x.op, (Reshape, Broadcast, Transpose)):
            x = x.xs[0]
        if math.prod(x.shape) != 1 or op.dtype not in INTEGERS:
            raise unclear
        if isinstance(op, Sum) and not x.variables:
            return self.linear(Place(length=int(self.evaluate(x, ZERO, ZERO).reshape(()))), op.dtype, op.rank)
        if isinstance(op, (Max, Min)) and isinstance(x, Linear) and x.variables <= {"query"} and self._holds_places(x):
            step, first = x.place.query, x.place.constant
            if (step >= 0) == isinstance(op, Max):
                return self.linear(Place(length=step, constant=first - step), op.dtype, op.rank)
            return self.linear(Place(constant=first), op.dtype, op.rank)
        raise unclear

    def _holds_places(self, point: Linear) -> bool:
        """Whether the dtype holds all its places; they start from below 0 again in one that is too narrow."""
        if point.dtype not in INTEGERS:
            return False
        low, high = point.place.ends(self.most)
        limits = np.iinfo(NUMPY_DTYPES[point.dtype])
        return int(limits.min) <= low and high <= int(limits.max)

    def _cumsum(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Cumsum)
        axis = op.axis % op.rank
        place = index[axis]
        others = [i for i, p in enumerate(index) if p is not None and i != axis]
        if place is None or others:
            raise Unrecognised(f"its mask sums along an axis that is not one of tokens: {op.name} : {op.type}")
        x = self.lift(op.x, (*index[:axis], Place(query=1), *index[axis + 1 :]))
        if x.variables - {"query"}:
            raise Unrecognised(f"its mask depends on the length by {op.name} : {op.type}")
        if not x.variables and op.dtype in INTEGERS and math.prod(x.shape) == 1:
            step = int(self.evaluate(x, ZERO, ZERO).reshape(()))
            return self.linear(place.moved(1).times(step), op.dtype, op.rank)
        self._kept.append(op)
        return self._interned(Running(x.shape, op.dtype, x, place), id(x), place)

    def _gather(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Gather)
        axis = op.axis % op.x.rank
        after = axis + op.indices.rank
        rows = self.lift(op.indices, index[axis:after])
        if not self.probe.is_constant(op.x):
            return self._taken(op, axis, rows, (index[:axis], index[after:]))
        if any(place is not None for place in (*index[:axis], *index[after:])):
            raise Unrecognised(f"its mask looks up a table {op.x.type} by two axes of tokens")
        table = self.lift(op.x, (None,) * op.x.rank)
        shape = (*table.shape[:axis], *rows.shape, *table.shape[axis + 1 :])
        return self.applied(op, (table, rows), shape)

    def _taken(
        self, op: Gather, axis: int, rows: Point, around: tuple[tuple[Place | None, ...], tuple[Place | None, ...]]
    ) -> Point:
        """What is taken of values of all tokens at places: that of one token, or what all of them have."""
        before, after = around
        here, there = (self.lift(op.x, (*before, place, *after)) for place in (Place(query=1), Place(key=1)))
        x = here
        if here is not there:
            moves = (Reshape, Broadcast, Transpose, Cast)
            # A narrower dtype may not hold every place.
            while isinstance(rows, Applied) and isinstance(rows.op, moves) and rows.dtype in ("i32", "i64"):
                rows = rows.xs[0]
            # A negative place would be counted from the end.
            if not isinstance(rows, Linear) or not self._holds_places(rows) or rows.place.ends(self.most)[0] < 0:
                raise Unrecognised(f"its mask looks up {op.x.type}, which is no table known when compiling")
            x = self.lift(op.x, (*before, rows.place, *after))
        if math.prod(rows.shape) != 1:
            raise Unrecognised(f"its mask looks up several rows of {op.x.type} for each pair")
        shape = (*x.shape[:axis], *(1,) * op.indices.rank, *x.shape[axis + 1 :])
        return self.applied(Reshape(op.x, op.x.shape), (x,), shape)

    def _embed(self, op: Value, index: tuple[Place | None, ...]) -> Point:
        assert isinstance(op, Embed)
        return self.lift(op.decompose(), index)


Rule = Callable[[PairReader, Value, tuple[Place | None, ...]], Point]
_RULES: dict[type[Op], Rule] = {
    Iota: PairReader._iota,
    Slice: PairReader._slice,
    Transpose: PairReader._transpose,
    Broadcast: PairReader._broadcast,
    Reshape: PairReader._reshape,
    Concat: PairReader._concat,
    Reduce: PairReader._reduce,
    Cumsum: PairReader._cumsum,
    Gather: PairReader._gather,
    Embed: PairReader._embed,
}


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes of as many elements in the least groups that hold as many; Unrecognised where unclear."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        while (a := product(tuple(old[x] for x in left))) != (b := product(tuple(new[x] for x in right))):
            short_left = isinstance(a, int) and (not isinstance(b, int) or a < b)
            if short_left and i < len(old):
                left.append(i)
                i += 1
            elif j < len(new) and not short_left:
                right.append(j)
                j += 1
            elif i < len(old):
                left.append(i)
                i += 1
            else:
                raise Unrecognised(f"its mask is reshaped from {list(old)} to {list(new)} across tokens")
        found.append((left, right))
    return found
