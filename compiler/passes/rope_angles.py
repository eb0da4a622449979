"""Angles of rotations in a text: one value [S, 2, pairs], shared by all rotations by the same angles.

What a rotation multiplies by is settled for every position below the context, in the graph's own dtypes: that its
angles are position times frequency (`llm.rope_angles`), and that cosines and sines which the graph computes or stores
twice are equal. What is neither position times frequency nor rows of a table stays as the graph computes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import Cast, Cos, Greater, Mul, Neg, Sin, Where, constant
from llmc.compiler.ir.graph import topological
from llmc.compiler.ir.llm import Embed, RopeAngles, static
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.structural import Concat, Gather, GatherElements, Reshape, Slice
from llmc.compiler.ir.types import FLOATS, Array, Tensor
from llmc.compiler.passes.element_numbers import ElementNumbers, Numbers, each_token_alone
from llmc.compiler.passes.lengths import LENGTHS, Regimes, Unsettled, regimes, settled
from llmc.compiler.passes.probe import Probe
from llmc.compiler.passes.rewriting import holds
from llmc.compiler.passes.rotations import Rotation
from llmc.errors import IRError

_CHUNK = 1 << 14  # positions that are evaluated at once
# An f32 angle and its position times frequency are a few roundings apart: of 1 / factor, of the frequency, of two
# products. The law itself is compared in f64.
_ROUNDINGS = 4 * 2.0**-23
_LAW = 1e-12
_FIRST = np.zeros(1, np.int64)

Floats = NDArray[np.float64]


class NoAngles(Exception):
    """A rotation whose angles are not known at every position; the text says why."""


@dataclass(frozen=True)
class Columns:
    """Some of what a rotation multiplies by, in its pairs' order: `scale` times columns `at` [pairs] of a factor."""

    factor: Value
    at: NDArray[np.int64]
    scale: float

    @property
    def pairs(self) -> int:
        return len(self.at)

    def numbers(self, numbers: ElementNumbers) -> Numbers:
        """The elements' numbers, [pairs]."""
        scale = numbers.of(constant(self.scale, "f64"))
        return numbers.times(numbers.of(self.factor).reshape(-1)[self.at], scale)


@dataclass(frozen=True)
class _Parts:
    """The columns of a rotation's coefficients (`rotations.Turn`)."""

    cos_a: Columns
    cos_b: Columns
    sin_a: Columns
    sin_b: Columns

    @property
    def all(self) -> tuple[Columns, ...]:
        return self.cos_a, self.cos_b, self.sin_a, self.sin_b


class Angles:
    """The angles of one graph's rotations. lengths: the new input that they use, None where they need none."""

    def __init__(self, probe: Probe, numbers: ElementNumbers) -> None:
        assert probe.positions is not None and probe.size is not None
        self.probe, self.numbers, self.size = probe, numbers, probe.size
        self.positions = Reshape(probe.positions, (probe.size,))
        self.lengths: Input | None = None
        self._known: dict[object, Value] = {}
        self._reasons: dict[object, str] = {}
        self._regimes: dict[tuple[Value, ...], Regimes] = {}

    def of(self, rotation: Rotation) -> Value:
        """The angles of one rotation; NoAngles where the graph has none for every position and length."""
        turn = rotation.turn
        key = tuple(part[0].tobytes() for part in (turn.cos_a, turn.cos_b, turn.sin_a, turn.sin_b))
        if key in self._reasons:
            raise NoAngles(self._reasons[key])
        if key not in self._known:
            parts = _Parts(*(self._columns(part[0], rotation.factors)
                             for part in (turn.cos_a, turn.cos_b, turn.sin_a, turn.sin_b)))  # fmt: skip
            try:
                self._known[key] = self._by_length(parts)
            except (IRError, Unsettled) as error:
                self._reasons[key] = str(error)
                raise NoAngles(str(error)) from None
        return self._known[key]

    def _columns(self, wanted: Numbers, factors: Sequence[Value]) -> Columns:
        """Where coefficients [pairs] are among the factors' columns, all with one scale."""
        for factor in factors:
            if product(factor.shape) != self.size * product(factor.shape[-1:]):
                continue
            own = self.numbers.of(factor).reshape(-1)
            column = {abs(number): at for at, number in enumerate(own.tolist())}
            found = [self._column(number, column) for number in wanted.tolist()]
            if None in found:
                continue
            at = np.array([item[0] for item in found if item is not None])
            scales = {item[1] for item in found if item is not None} if (own[at] > 0).all() else {0.0}
            if (own[at] < 0).all():
                scales = {-item[1] for item in found if item is not None}
            if len(scales) == 1 and scales != {0.0}:
                return Columns(factor, at, scales.pop())
        raise NoAngles("what it multiplies by is not one value by position")

    def _column(self, number: int, column: dict[int, int]) -> tuple[int, float] | None:
        """(column, scale) of an element: one of a factor's own up to its sign, or that times a number."""
        return next(((column[n], scale) for scale, n in self.numbers.unscaled(number) if n in column), None)

    def _by_length(self, parts: _Parts) -> Value:
        """Angles that the sequence's length may decide: those of each of its regimes, chosen by token."""
        factors = tuple(dict.fromkeys(part.factor for part in parts.all))
        if any(self.probe.decided_by_other_sizes(factor) for factor in factors):
            raise Unsettled("its angles depend on sizes beside the number of tokens")
        if not any(self.probe.depends_on_length(factor) for factor in factors):
            return self._of_parts(parts)
        if factors not in self._regimes:
            self._regimes[factors] = regimes(self.probe, factors)
        found = self._regimes[factors]
        of_regimes: list[Value] = []
        for numbers in found.values:
            own = {factor: settled(factor, numbers) for factor in factors}
            of_regimes.append(self._of_parts(_Parts(*(replace(part, factor=own[part.factor]) for part in parts.all))))
        chosen, *later = of_regimes
        if later and self.lengths is None:
            self.lengths = Input(LENGTHS, Tensor((1, self.size), "i32"))
        for last, angles in zip(found.last, later, strict=True):
            assert self.lengths is not None
            longer = Greater(Reshape(self.lengths, (self.size, 1, 1)), constant(last, "i32"))
            chosen = Where(longer, angles, chosen)
        return chosen

    def _of_parts(self, parts: _Parts) -> Value:
        numbers = [part.numbers(self.numbers) for part in parts.all]
        key = ("settled", *(part.tobytes() for part in numbers))
        if key not in self._known:
            if not np.array_equal(numbers[0], numbers[1]):
                self._require_equal(parts.cos_a, parts.cos_b)
            if not np.array_equal(numbers[2], numbers[3]):
                self._require_equal(parts.sin_a, parts.sin_b)
            cos, sin = parts.cos_a, parts.sin_a
            self._known[key] = self._by_frequency(cos, sin) or self._from_table(cos, sin) or self._packed(cos, sin)
        return self._known[key]

    # Values at every position

    def _rows(self, columns: Sequence[Columns], exact: bool) -> Iterator[tuple[NDArray[np.int64], list[Array]]]:
        """(positions, the columns [positions, pairs] there) for every position that a token may have, some at a time.

        That is up to the context; or up to the end of a table of fewer rows, beyond which the graph has no values (and
        `check_tables` no tokens).
        """
        longest = self.probe.longest
        if longest is None:
            raise IRError("the longest sequence is not known")
        roots = [part.factor for part in columns]
        if any(isinstance(value, Param) for value in topological(roots)):
            raise IRError("weights decide what it multiplies by")
        # What counts or shifts tokens is evaluated for the whole sequence.
        alone = all(each_token_alone(op) for op in topological(roots) if isinstance(op, Op))
        begin, step = 0, _CHUNK if alone else longest
        while begin < longest:
            at = np.arange(begin, min(begin + step, longest))
            try:
                found = self.probe.evaluate(roots, len(at), at.tolist(), exact=exact)
            except IRError:
                if step > 1 and alone:  # where the table ends is found by halving
                    step //= 2
                    continue
                if begin == 0:
                    raise
                return
            yield (
                at,
                [
                    value.reshape(len(at), -1)[:, part.at] * value.dtype.type(part.scale)
                    for value, part in zip(found, columns, strict=True)
                ],
            )
            begin += len(at)

    def _require_equal(self, a: Columns, b: Columns) -> None:
        """NoAngles unless two columns are equal at every position."""
        for at, (one, other) in self._rows([a, b], exact=False):
            if not np.array_equal(one, other):
                where = int(at[np.argwhere(one != other)[0, 0]])
                raise NoAngles(f"it is no rotation at position {where}: two channels of a pair differ in their angle")

    # The forms that angles can take

    def _by_frequency(self, cos: Columns, sin: Columns) -> Value | None:
        """Position times frequency, at every position, times one scale."""
        cosines, sines = (
            [self._angle_of(number, part.factor.dtype) for number in part.numbers(self.numbers).tolist()]
            for part in (cos, sin)
        )
        first = cosines[0]
        if first is None or None in cosines or any(t[:2] != (Cos, first[1]) for t in cosines if t is not None):
            return None
        angles = [cosine[2] for cosine in cosines if cosine is not None]
        if sines != [(Sin, first[1], angle) for angle in angles]:
            return None
        among = self._angles_among((cos.factor, sin.factor), angles)
        frequencies = None if among is None else self._frequencies(among)
        return None if frequencies is None else RopeAngles(self.positions, constant(frequencies, "f32"), first[1])

    def _angle_of(self, number: int, least: str) -> tuple[object, float, int] | None:
        """(Cos or Sin, scale, number of the angle) of an element that is scale * cos(angle) or scale * sin(angle).

        It may have been rounded to what holds the dtype `least`, in which the rotation multiplies.
        """
        for scale, inner in self.numbers.unscaled(number):
            element = self.numbers.element(inner)
            if element is None:
                return None
            if element.op is Cast and element.attributes[0] in FLOATS and holds(str(element.attributes[0]), least):
                found = self._angle_of(element.operands[0], least)
                return None if found is None else (found[0], scale * found[1], found[2])
            if element.op in (Cos, Sin):
                return element.op, scale, element.operands[0]
        return None

    def _angles_among(self, roots: Sequence[Value], wanted: list[int]) -> Columns | None:
        """The value that cosines are taken of, and the columns of it with these numbers."""
        for op in topological(roots):
            if not isinstance(op, Cos) or op.x.dtype not in ("f32", "f64"):
                continue
            if product(op.x.shape) != self.size * product(op.x.shape[-1:]):
                continue
            column = {number: at for at, number in enumerate(self.numbers.of(op.x).reshape(-1).tolist())}
            if all(number in column for number in wanted):
                return Columns(op.x, np.array([column[number] for number in wanted]), 1.0)
        return None

    def _frequencies(self, angles: Columns) -> Floats | None:
        """[pairs] where the angle is position times these as f32, at every position; None where it is not.

        The law is compared in f64 to _LAW, relatively; in the graph's own dtypes it may be off by a few roundings.
        """
        try:
            _, (first,) = next(self._rows([angles], exact=True))
            if len(first) < 2:
                return None
            law = np.asarray(first[1], np.float64)
            rounded = np.asarray(law.astype(np.float32), np.float64)  # as kernels have it
            for at, (rows,) in self._rows([angles], exact=True):
                if (np.abs(rows - at[:, None] * law) > _LAW * np.abs(rows)).any():
                    return None
            for at, (rows,) in self._rows([angles], exact=False):
                if (np.abs(rows - at[:, None] * rounded) > _ROUNDINGS * np.abs(rows)).any():
                    return None
        except IRError:
            return None
        return law

    def _from_table(self, cos: Columns, sin: Columns) -> Value | None:
        """Rows of a compile-time table by position: the table's columns put in order, looked up once a step."""
        for lookup in topological((cos.factor, sin.factor)):
            rows = self._row_of(lookup)
            if rows is None:
                continue
            assert isinstance(lookup, (Gather, GatherElements))
            columns = [self._table_columns(lookup, part) for part in (cos, sin)]
            if any(part is None for part in columns):
                continue
            table = lookup.x if lookup.x.rank == 2 else Reshape(lookup.x, lookup.x.shape[-2:])
            parts = tuple(taken(table, 1, part) for part in columns if part is not None)
            packed: Value = Embed(Concat(parts, 1), rows, "f32")
            return Reshape(packed, (self.size, 2, cos.pairs))
        return None

    def _row_of(self, lookup: Value) -> Value | None:
        """The index [S] of a lookup of whole rows in a compile-time table [..., rows, columns]."""
        if not isinstance(lookup, (Gather, GatherElements)) or not self.probe.is_constant(lookup.x):
            return None
        rank = lookup.x.rank
        if rank < 2 or product(lookup.x.shape[:-2]) != 1 or lookup.axis % rank != rank - 2:
            return None
        index = lookup.indices
        width = 1 if isinstance(lookup, Gather) else static(index.shape[-1])
        if product(index.shape) != self.size * width or len(np.unique(self.numbers.of(index))) != 1:
            return None
        if all(
            np.array_equal(rows[:, 0], at) for at, (rows,) in self._rows([Columns(index, _FIRST, 1.0)], exact=False)
        ):
            return self.positions
        return Reshape(Slice(Reshape(index, (self.size, width)), 1, 0, 1), (self.size,))

    def _table_columns(self, lookup: Value, part: Columns) -> NDArray[np.int64] | None:
        column = {number: at for at, number in enumerate(self.numbers.of(lookup).reshape(-1).tolist())}
        found = [column.get(number) for number in part.numbers(self.numbers).tolist()]
        return None if None in found else np.array(found)

    def _packed(self, cos: Columns, sin: Columns) -> Value:
        """The rotation's own factors, their columns put in order side by side."""
        parts: list[Value] = []
        for part in (cos, sin):
            width = part.factor.shape[-1]
            value: Value = Reshape(part.factor, (self.size, width))
            value = taken(value if value.dtype == "f32" else Cast(value, "f32"), 1, part.at)
            if part.scale == -1:
                value = Neg(value)
            elif part.scale != 1:
                value = Mul(value, constant(part.scale, "f32"))
            parts.append(Reshape(value, (self.size, 1, part.pairs)))
        return Concat(tuple(parts), 1)


def taken(value: Value, axis: int, at: NDArray[np.int64]) -> Value:
    """Elements `at` along an axis; a slice where they are equally far apart."""
    size = value.shape[axis]
    if np.array_equal(at, np.arange(len(at))) and size == len(at):
        return value
    step = int(at[1] - at[0]) if len(at) > 1 else 1
    if step > 0 and np.array_equal(at, at[0] + step * np.arange(len(at))):
        return Slice(value, axis, int(at[0]), int(at[-1]) + 1, step)
    return Gather(value, constant(at, "i64"), axis)
