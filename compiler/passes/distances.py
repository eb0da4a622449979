"""Masks and biases that depend on how far a key is from its query only: shown by structure, then known everywhere.

`by_distance` rewrites a function of a query and a key (see `pair_functions`) into one of their distance, op by op:
differences and comparisons of places are followed exactly, with the rounding and the range of the dtype they are
computed in; stored tables are compared along all their diagonals. The result is evaluated at every distance below the
context, or built as a table over them, whose weights need not be known (see `distance_tables`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from llmc.compiler.ir.elementwise import Add, And, Cast, Compare, Constant, Div, Mul, Neg, Or, Sub, Where, constant
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Reshape, Slice, Transpose
from llmc.compiler.ir.types import FLOATS, INTEGERS, NUMPY_DTYPES, Array, precise
from llmc.compiler.passes.masks import FURTHEST_SHIFT, HIDDEN, ByDistance, Unrecognised
from llmc.compiler.passes.pair_functions import PairReader
from llmc.compiler.passes.points import ZERO, Applied, Known, Linear, Place, Point, Table, ends
from llmc.errors import IRError

_MANTISSA = {"f64": 53, "f32": 24, "f16": 11, "bf16": 8}
_SLOPE_ROUNDING = 2.0**-21  # of a source's own f32 arithmetic
_WHOLE = 2.0**53  # whole numbers below this one are what they are in f64, and no other is rounded to one of them
_TINY = float(np.finfo(np.float64).tiny)
_UNLIKE = "its mask is not decided by the distance of key and query alone"
_MOVES = (Reshape, Transpose, Broadcast)


@dataclass(frozen=True)
class Affine:
    """query * q + key * k + length * S + constant, exactly."""

    query: Fraction
    key: Fraction
    length: Fraction
    constant: Fraction

    def __add__(self, other: Affine) -> Affine:
        return Affine(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def times(self, factor: Fraction) -> Affine:
        return Affine(*(part * factor for part in self.parts))

    @property
    def parts(self) -> tuple[Fraction, Fraction, Fraction, Fraction]:
        return self.query, self.key, self.length, self.constant

    @property
    def is_number(self) -> bool:
        return not (self.query or self.key or self.length)

    @property
    def is_by_distance(self) -> bool:
        return not self.length and self.query == -self.key

    def ends(self, most: int) -> tuple[Fraction, Fraction]:
        """The least and the greatest it can be, for lengths 1 to `most`."""
        return ends(*self.parts, most)

    def is_exact(self, dtype: str, most: int) -> bool:
        """Whether a dtype holds each of its values."""
        low, high = self.ends(most)
        if dtype in INTEGERS:
            limits = np.iinfo(NUMPY_DTYPES[dtype])
            return all(p.denominator == 1 for p in self.parts) and int(limits.min) <= low and high <= int(limits.max)
        if dtype not in FLOATS:
            return False
        if any(p.denominator & (p.denominator - 1) for p in self.parts):
            return False
        # All values are multiples of the greatest power of two that divides each part.
        units = [Fraction(p.numerator & -p.numerator, p.denominator) for p in self.parts if p]
        return not units or max(abs(low), abs(high)) <= min(units) * 2 ** _MANTISSA[dtype]


@dataclass(eq=False)
class Distances:
    """What the points of one reader are as functions of distance; each question is answered once."""

    reader: PairReader
    _affine: dict[Point, Affine | None] = field(default_factory=dict)
    _by_distance: dict[Point, Point | Unrecognised] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """Tokens of a sequence, at most."""
        return self.reader.most

    # Places, followed exactly

    def affine(self, point: Point) -> Affine | None:
        """The point as a linear function of places, where its dtype holds each value exactly; None: it is not."""
        if point not in self._affine:
            found = self._followed(point) if math.prod(point.shape) == 1 else None
            if found is None and math.prod(point.shape) == 1 and len(point.variables) == 1:
                found = self._affine_by_numbers(point)
            self._affine[point] = found if found is not None and found.is_exact(point.dtype, self.most) else None
        return self._affine[point]

    def _followed(self, point: Point) -> Affine | None:
        if isinstance(point, Linear):
            return Affine(*(Fraction(getattr(point.place, n)) for n in ("query", "key", "length", "constant")))
        if isinstance(point, Known):
            try:
                number = self.reader.evaluate(point, ZERO, ZERO).reshape(())
            except IRError:
                return None
            if not math.isfinite(number):
                return None
            return Affine(*(Fraction(0),) * 3, Fraction(int(number) if point.dtype in INTEGERS else float(number)))
        if not isinstance(point, Applied):
            return None
        parts = [self.affine(x) for x in point.xs]
        if any(part is None for part in parts):
            return None
        first, second = (parts[0], parts[-1])
        assert first is not None and second is not None
        op = point.op
        if isinstance(op, (Cast, *_MOVES)):
            return first
        if isinstance(op, Neg):
            return first.times(Fraction(-1))
        if isinstance(op, (Add, Sub)):
            return first + second.times(Fraction(1 if isinstance(op, Add) else -1))
        if isinstance(op, Mul) and (first.is_number or second.is_number):
            return first.times(second.constant) if second.is_number else second.times(first.constant)
        if isinstance(op, Div) and point.dtype in FLOATS and second.is_number and second.constant:
            return first.times(1 / second.constant)
        return None

    def _affine_by_numbers(self, point: Point) -> Affine | None:
        """A function of one place that is seen to be linear at every place below the context."""
        if point.dtype == "bool":
            return None
        try:
            found = self._vector(point).astype(np.float64).reshape(-1)
        except IRError:
            return None
        step = found[1] - found[0] if len(found) > 1 else 0.0
        if not np.isfinite(found).all() or not np.array_equal(found, found[0] + step * np.arange(self.most)):
            return None
        if point.dtype in INTEGERS and np.abs(found).max() >= _WHOLE:
            return None
        (name,) = point.variables
        parts = {n: Fraction(step) if n == name else Fraction(0) for n in ("query", "key", "length")}
        first = Fraction(found[0]) - parts["length"]  # lengths are counted from 1
        return Affine(parts["query"], parts["key"], parts["length"], first)

    def _vector(self, point: Point) -> Array:
        """[most, *shape]: a function of one of query, key and length, or of a place before the end, at every one."""
        at = np.arange(self.most)[:, None]
        sizes = at + 1 if point.variables == {"length"} else None
        found = self.reader.evaluate(point, at, at, sizes)[:, 0]
        return np.broadcast_to(found, (self.most, *point.shape))

    def _of_one(self, point: Point) -> frozenset[str]:
        """What a point is a function of: query, key or length alone, or query or key counted from the end."""
        for name in ("query", "key"):
            if point.variables == {name, "length"} and self._is_from_the_end(point, name):
                return frozenset((name,))  # so many before the end: the longest sequence shows them all
        return point.variables

    def _is_from_the_end(self, point: Point, name: str) -> bool:
        """Whether a point is a function of a place less the length."""
        affine = self.affine(point)
        if affine is not None:
            return affine.length == -(affine.query if name == "query" else affine.key)
        return all(p.length == -getattr(p, name) for p in point.places) and all(
            self._is_from_the_end(x, name) for x in point.inputs
        )

    # Functions of distance

    def by_distance(self, point: Point) -> Point:
        """The point over distances: its query is at 0 and its key at key - query. Unrecognised: it is no such thing."""
        found = self.found_by_distance(point)
        if isinstance(found, Unrecognised):
            raise found
        return found

    def found_by_distance(self, point: Point) -> Point | Unrecognised:
        """`by_distance`, or the reason why not."""
        if point not in self._by_distance:
            try:
                self._by_distance[point] = self._rewritten(point)
            except Unrecognised as reason:
                self._by_distance[point] = reason
        return self._by_distance[point]

    def _rewritten(self, point: Point) -> Point:
        if not point.variables:
            return point
        affine = self.affine(point)
        if affine is not None and affine.is_by_distance and all(p.denominator == 1 for p in affine.parts):
            return self._linear(affine, point.dtype, len(point.shape))
        same = self._same_everywhere(point)
        if same is not None:
            return same
        if isinstance(point, Applied):
            compared = self._compared(point)
            if compared is not None:
                return compared
            return self.reader.applied(_op(point), tuple(self.by_distance(x) for x in point.xs), point.shape)
        if isinstance(point, Table):
            return self._diagonals(point)
        raise Unrecognised(_UNLIKE)

    def _linear(self, affine: Affine, dtype: str, rank: int) -> Point:
        place = Place(key=int(affine.key), constant=int(affine.constant))
        return self.reader.linear(place, dtype, rank)

    def _same_everywhere(self, point: Point) -> Point | None:
        """A function of one place that is the same at each, as a constant."""
        if len(self._of_one(point)) != 1:
            return None
        try:
            found = self._vector(point)
        except IRError:
            return None
        if not (found == found[:1]).all():
            return None
        made = Constant(constant(found[0].astype(np.float64) if point.dtype in FLOATS else found[0], point.dtype).value,
                        point.dtype)  # fmt: skip
        return self.reader.known(made, (None,) * made.rank)

    def _compared(self, point: Applied) -> Point | None:
        """A comparison of two places: always so, never, or by their distance."""
        if not isinstance(point.op, Compare) or isinstance(point.op, (And, Or)):
            return None
        left, right = (self.affine(x) for x in point.xs)
        if left is None or right is None:
            return None
        rank = len(point.shape)
        difference = left + right.times(Fraction(-1))
        low, high = difference.ends(self.most)
        holds = type(point.op).function
        signs = {bool(holds(sign, 0)) for sign, there in ((-1, low < 0), (0, low <= 0 <= high), (1, high > 0)) if there}
        if len(signs) == 1:
            return self.reader.number(signs.pop(), "bool", rank)
        if not difference.is_by_distance:
            return None
        whole = difference.times(Fraction(math.lcm(*(part.denominator for part in difference.parts))))
        zero = self.reader.number(0, "i64", rank)
        return self.reader.applied(point.op, (self._linear(whole, "i64", rank), zero), point.shape)

    def _diagonals(self, point: Table) -> Point:
        """A stored table whose diagonals are each one number, all along, as a table of them."""
        assert point.value is not None
        axes = [axis for axis, place in enumerate(point.index) if place is not None]
        places = [place for place in point.index if place is not None]
        kinds = [(place.query, place.key, place.length) for place in places]
        if sorted(kinds) != [(0, 1, 0), (1, 0, 0)]:
            raise Unrecognised("its mask looks up a table by one place, not by a distance")
        rows, columns = (axes[i] for i in ((0, 1) if kinds[0][0] else (1, 0)))
        starts = {axis: place.constant for axis, place in zip(axes, places, strict=True)}
        array = np.moveaxis(self._stored(point), (rows, columns), (0, 1))
        for axis, kept in ((rows, array.shape[0]), (columns, array.shape[1])):
            if starts[axis] + self.most > kept:
                raise Unrecognised(f"its mask is stored for {kept} tokens, not for {self.most}")
        array = array[starts[rows] :, starts[columns] :][: self.most, : self.most]
        if not np.array_equal(array[1:, 1:], array[:-1, :-1]):
            raise Unrecognised("its stored mask is not decided by the distance of key and query")
        last = self.most - 1
        index = tuple(Place(key=1, constant=last) if axis == columns else None for axis in range(point.value.rank))
        if not all(isinstance(dim, int) for dim in point.value.shape):
            line = np.concatenate([array[-1:], array[:1, 1:]], axis=1)
            known = np.moveaxis(line, (0, 1), (rows, columns))
            return self.reader.known(constant(known, point.dtype), index)
        square: Value = point.value
        for axis in (rows, columns):
            square = Slice(square, axis, starts[axis], starts[axis] + self.most)
        # The last query sees distances from 1 - most to 0, the first one those from 0 on.
        below = Slice(square, rows, last, last + 1)
        above = Slice(Slice(square, rows, 0, 1), columns, 1, self.most)
        return self.reader.known(Concat((below, above), columns), index)

    def _stored(self, point: Table) -> Array:
        try:
            return self.reader.array(point.value)
        except IRError as error:
            raise Unrecognised(f"its mask cannot be evaluated: {error}") from None

    # Up to one number a row

    def up_to_rows(self, point: Point, times: float = 1.0) -> Point:
        """A bias over distances, but for what it adds to all keys of a query, which softmax does not see.

        So slope * key place (ALiBi) is slope * distance, to f32's rounding. times: what the bias is times in the end.
        """
        if self._of_one(point) in ({"query"}, {"length"}):
            if float(np.abs(self._numbers(point)).max()) * times <= FURTHEST_SHIFT:
                return self.reader.number(0.0, point.dtype, len(point.shape))
            return self.by_distance(point)
        if self._of_one(point) == {"key"} and point.dtype in FLOATS:
            sloped = self._sloped(point, times)
            if sloped is not None:
                return sloped
        if isinstance(point, Applied):
            op, xs = point.op, point.xs
            if isinstance(op, (Add, Sub)) or (isinstance(op, (*_MOVES, Cast)) and point.dtype in FLOATS
                                              and xs[0].dtype in FLOATS):  # fmt: skip
                return self.reader.applied(op, tuple(self.up_to_rows(x, times) for x in xs), point.shape)
            if isinstance(op, (Mul, Div)) and not xs[1].variables:
                more = np.abs(self._known_numbers(xs[1]))
                times = times * float(more.max()) if isinstance(op, Mul) else times / max(float(more.min()), _TINY)
                return self.reader.applied(op, (self.up_to_rows(xs[0], times), xs[1]), point.shape)
            if isinstance(op, Mul) and not xs[0].variables:
                times *= float(np.abs(self._known_numbers(xs[0])).max())
                return self.reader.applied(op, (xs[0], self.up_to_rows(xs[1], times)), point.shape)
            if isinstance(op, Where):
                return self._selected(point, times)
        return self.by_distance(point)

    def _selected(self, point: Applied, times: float) -> Point:
        """A choice between a bias and a number that hides: that number hides as well where the rows are shifted."""
        whole = self.found_by_distance(point)
        if isinstance(whole, Point):
            return whole
        condition, *branches = point.xs
        shifted = [x for x in branches if x.variables]
        if len(shifted) != 1:
            raise whole  # rows of two branches would be shifted by two numbers
        furthest = self._furthest(shifted[0])
        built = []
        for branch in branches:
            if branch is shifted[0]:
                built.append(self.up_to_rows(branch, times))
                continue
            raised = self._known_numbers(branch) + furthest
            if not (raised <= 2 * HIDDEN).all():
                raise whole
            made = constant(raised, branch.dtype)
            built.append(self.reader.known(made, (None,) * made.rank))
        return self.reader.applied(_op(point), (self.by_distance(condition), *built), point.shape)

    def _known_numbers(self, point: Point) -> Array:
        try:
            return self.reader.evaluate(point, ZERO, ZERO).reshape(point.shape).astype(np.float64)
        except IRError as error:
            raise Unrecognised(f"its mask cannot be evaluated: {error}") from None

    def _furthest(self, point: Point) -> float:
        """How far from 0 a function of one place goes; Unrecognised: it is a function of more."""
        if len(self._of_one(point)) != 1:
            raise Unrecognised(_UNLIKE)
        return float(np.abs(self._numbers(point)).max())

    def _numbers(self, point: Point) -> Array:
        try:
            return self._vector(point).astype(np.float64)
        except IRError as error:
            raise Unrecognised(f"its mask cannot be evaluated: {error}") from None

    def _sloped(self, point: Point, times: float) -> Point | None:
        """What adds a slope a place of the key, at every place, as slope * distance."""
        own = self._numbers(point)
        with precise():
            exact = self._numbers(point)
        if not float(np.abs(exact[0]).max()) * times <= FURTHEST_SHIFT:
            return None
        last = max(1, self.most - 1)
        slopes = (exact[-1] - exact[0]) / last
        line = np.arange(self.most).reshape(-1, *(1,) * len(point.shape)) * slopes
        far = np.abs(slopes) * last + np.abs(exact[0])
        for found, limit in ((exact, 1e-9 * far), (own, _SLOPE_ROUNDING * far)):
            if not np.isfinite(found).all() or (np.abs(found - exact[0] - line) > limit).any():
                return None
        factor = self.reader.known(constant(slopes, "f64"), (None,) * slopes.ndim)
        places = self.reader.linear(Place(key=1), "f64", len(point.shape))
        sloped = self.reader.applied(Mul(constant(0.0, "f64"), constant(0.0, "f64")), (factor, places))
        return self.reader.applied(Cast(constant(0.0, "f64"), point.dtype), (sloped,))

    # All distances

    def numbers(self, point: Point) -> ByDistance:
        """A function of distance at each of them; Unrecognised where it needs weights that cannot be read now."""
        distances = np.arange(1 - self.most, self.most)
        return ByDistance(distances, self._over(point, distances, False), self._over(point, distances, True))

    def _over(self, point: Point, distances: Array, exact: bool) -> Array:
        try:
            if exact:
                with precise():
                    found = self.reader.evaluate(point, ZERO, distances[:, None])
            else:
                found = self.reader.evaluate(point, ZERO, distances[:, None])
        except IRError as error:
            raise Unrecognised(f"its mask cannot be evaluated: {error}") from None
        full = np.broadcast_to(found, (len(distances), 1, *point.shape)).reshape(len(distances), -1)
        return full.T.astype(np.float64)


def _op(point: Applied) -> Op:
    assert point.op is not None
    return point.op
