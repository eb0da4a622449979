"""Between which bounds a value's elements lie, whatever the inputs are: interval arithmetic over a graph.

A range holds for every element that can occur. `_RULES` says what ops do to ranges; the result of an op without a rule
has the range of its whole dtype, and so has an integer result that may overflow, as integers wrap around. Floats are
rounded and may be NaN; only ops whose kernels are exact to a rounding have rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, bounds, known_at_most, product
from llmc.compiler.ir.evaluate import LoadParam
from llmc.compiler.ir.op import Op, Param, Value
from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES, Array, Tensor
from llmc.errors import DimError, LlmcError

Bound = int | Dim  # a size may bound an index: below S + 1

_EPSILON = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}
_LARGEST = {"f64": 1.7976931348623157e308, "f32": 3.4028234663852886e38, "f16": 65504.0, "bf16": 3.3895313892515355e38}
# What is rounded to a number below these loses more than an epsilon of itself, up to all of it.
_SMALLEST = {"f64": 2.0**-1022, "f32": 2.0**-126, "f16": 2.0**-14, "bf16": 2.0**-126}
_FAR = 1 << 80  # stands for no bound: beyond every dtype
_LOADED = 1 << 22  # elements of a stored table of integers that is looked through, at most


@dataclass(frozen=True)
class Range:
    """The elements of an integer or bool value: low <= element <= high."""

    low: Bound
    high: Bound

    @property
    def least(self) -> int | None:
        """The lower bound as a number; None where the sizes in it have no bounds."""
        return _extreme(self.low, 0)

    @property
    def most(self) -> int | None:
        """The upper bound as a number; None where the sizes in it have no bounds."""
        return _extreme(self.high, 1)

    def within(self, first: Bound, last: Bound) -> bool:
        """Whether every element lies from `first` to `last`, both included."""
        return _at_most(first, self.low) is True and _at_most(self.high, last) is True


@dataclass(frozen=True)
class FloatRange:
    """The elements of a float value: low <= element <= high, or not a number where `nan`."""

    low: float
    high: float
    nan: bool = False


AnyRange = Range | FloatRange
_BOOL = Range(0, 1)
_ANY_FLOAT = FloatRange(-math.inf, math.inf, True)


class Ranges:
    """The ranges of a graph's values, each computed when first asked for.

    given: what is known of some values, such as inputs that the runtime checks. load: reads weights, so that stored
    tables of integers are known; without it their elements may have any value.
    """

    def __init__(self, given: Mapping[Value, Range], load: LoadParam | None = None) -> None:
        self._found: dict[Value, AnyRange] = dict(given)
        self._load = load

    def of(self, value: Value) -> AnyRange:
        """The range of a value's elements."""
        stack = [value]
        while stack:
            current = stack[-1]
            if current in self._found:
                stack.pop()
                continue
            missing = [operand for operand in _asked(current) if operand not in self._found]
            if missing:
                stack.extend(missing)
                continue
            self._found[current] = self._compute(current)
            stack.pop()
        return self._found[value]

    def integers(self, value: Value) -> Range:
        """The range of an integer value."""
        found = self.of(value)
        return found if isinstance(found, Range) else full(value)

    def _compute(self, value: Value) -> AnyRange:
        if isinstance(value, Param):
            return self._stored(value)
        return self.apply(value, {}) if isinstance(value, Op) else anything(value)

    def apply(self, op: Op, instead: Mapping[Value, AnyRange]) -> AnyRange:
        """The range of an op's result, with other ranges for some of its operands."""
        rule = _rule(op)
        if rule is None or not isinstance(op.type, Tensor):
            return anything(op)
        operands = [instead.get(operand, self._found[operand]) for operand in _asked(op)]
        found = rule(self, op, *operands) if isinstance(op, e.Where) else rule(op, *operands)
        return _fitting(found, op)

    def _stored(self, param: Param) -> AnyRange:
        kind = param.tensor
        size = product(kind.shape)
        readable = kind.dtype not in FLOATS and kind.encoding is None and isinstance(size, int) and size <= _LOADED
        if self._load is None or not readable:
            return anything(param)
        try:
            return of_array(self._load(param.name))
        except LlmcError:
            return anything(param)


def anything(value: Value) -> AnyRange:
    """The range of all numbers of a value's dtype."""
    if not isinstance(value.type, Tensor) or value.dtype in FLOATS:
        return _ANY_FLOAT
    return full(value)


def full(value: Value) -> Range:
    """Every integer of a value's dtype."""
    if value.dtype == "bool":
        return _BOOL
    limits = np.iinfo(NUMPY_DTYPES[value.dtype])
    return Range(int(limits.min), int(limits.max))


def of_array(array: Array) -> AnyRange:
    """The range of known elements."""
    if array.dtype.kind in "iub":
        return Range(int(array.min()), int(array.max())) if array.size else Range(0, 0)
    wide = array.astype(np.float64)
    numbers = wide[~np.isnan(wide)]
    if not numbers.size:
        return FloatRange(0.0, 0.0, bool(wide.size))
    return FloatRange(float(numbers.min()), float(numbers.max()), numbers.size < wide.size)


def _extreme(bound: Bound, end: int) -> int | None:
    try:
        return bounds(bound)[end]
    except DimError:
        return None


def _at_most(a: Bound, b: Bound) -> bool | None:
    """Whether a <= b for all sizes; None where that depends on them."""
    try:
        return known_at_most(a, b)
    except DimError:
        return None


def _lower(*items: Bound) -> Bound:
    """A bound that is at most each of these."""
    best = items[0]
    for item in items[1:]:
        if _at_most(best, item):
            continue
        if _at_most(item, best):
            best = item
            continue
        numbers = [_extreme(bound, 0) for bound in (best, item)]
        best = min(number if number is not None else -_FAR for number in numbers)
    return best


def _upper(*items: Bound) -> Bound:
    """A bound that is at least each of these."""
    best = items[0]
    for item in items[1:]:
        if _at_most(item, best):
            continue
        if _at_most(best, item):
            best = item
            continue
        numbers = [_extreme(bound, 1) for bound in (best, item)]
        best = max(number if number is not None else _FAR for number in numbers)
    return best


def _numbers(item: Range) -> tuple[int, int]:
    """The bounds as numbers; far beyond every dtype where there are none."""
    least, most = item.least, item.most
    return (-_FAR if least is None else least), (_FAR if most is None else most)


def _fitting(found: AnyRange, op: Op) -> AnyRange:
    """A range of exact results as one of results in the op's dtype: integers wrap, floats are rounded."""
    if isinstance(found, FloatRange):
        largest = _LARGEST[op.dtype]
        low = -math.inf if found.low < -largest else found.low
        return FloatRange(low, math.inf if found.high > largest else found.high, found.nan)
    everything = full(op)
    return found if found.within(everything.low, everything.high) else everything


def _rounded(low: float, high: float, nan: bool, dtype: str) -> FloatRange:
    """Bounds of results that were rounded once to a dtype."""

    def slack(end: float) -> float:
        return max(abs(end), _SMALLEST[dtype]) * _EPSILON[dtype] if math.isfinite(end) else 0.0

    return FloatRange(low - slack(low), high + slack(high), nan)


def _corners(a: AnyRange, b: AnyRange, op: Op, function: Callable[[float, float], float]) -> AnyRange:
    """The range of a function that is monotone in each operand while the other one stands."""
    if isinstance(a, FloatRange) and isinstance(b, FloatRange):
        finite = all(map(math.isfinite, (a.low, a.high, b.low, b.high)))
        if not finite:
            return _ANY_FLOAT
        found = [function(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
        return _rounded(min(found), max(found), a.nan or b.nan, op.dtype)
    assert isinstance(a, Range) and isinstance(b, Range)
    whole = [int(function(x, y)) for x in _numbers(a) for y in _numbers(b)]
    return Range(min(whole), max(whole))


def _add(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    if isinstance(a, Range) and isinstance(b, Range):
        return Range(a.low + b.low, a.high + b.high)
    return _corners(a, b, op, lambda x, y: x + y)


def _sub(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    if isinstance(a, Range) and isinstance(b, Range):
        return Range(a.low - b.high, a.high - b.low)
    return _corners(a, b, op, lambda x, y: x - y)


def _mul(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    for x, factor in ((a, b), (b, a)):
        if isinstance(x, Range) and isinstance(factor, Range) and factor.low == factor.high:
            ends = (x.low * factor.low, x.high * factor.low)
            if isinstance(factor.low, int):
                return Range(*(ends if factor.low >= 0 else ends[::-1]))
    return _corners(a, b, op, lambda x, y: x * y)


def _positive(item: AnyRange) -> tuple[int, int] | None:
    """The bounds of a divisor; None where it may be 0 or less."""
    if not isinstance(item, Range) or (item.least or 0) < 1:
        return None
    return _numbers(item)


def _floor_divide(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    if _positive(b) is None:
        return anything(op)
    return _corners(a, b, op, lambda x, y: x // y)


def _divide(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    """Of integers: towards zero."""
    if _positive(b) is None:
        return anything(op)
    return _corners(a, b, op, lambda x, y: -(-x // y) if x < 0 else x // y)


def _mod(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    divisor = _positive(b)
    if divisor is None or not isinstance(a, Range) or not isinstance(b, Range):
        return anything(op)
    if a.within(0, divisor[0] - 1):
        return a
    return Range(0, b.high - 1)


def _fmod(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    divisor = _positive(b)
    if divisor is None or not isinstance(a, Range):
        return anything(op)
    low, high = _numbers(a)
    return Range(max(min(low, 0), 1 - divisor[1]), min(max(high, 0), divisor[1] - 1))


def _maximum(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    if isinstance(a, Range) and isinstance(b, Range):
        # Either lower bound holds; the one that is known to be the greater is kept.
        low = b.low if _at_most(a.low, b.low) else a.low
        return Range(low, _upper(a.high, b.high))
    assert isinstance(a, FloatRange) and isinstance(b, FloatRange)
    return FloatRange(max(a.low, b.low), max(a.high, b.high), a.nan or b.nan)


def _minimum(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    if isinstance(a, Range) and isinstance(b, Range):
        high = b.high if _at_most(b.high, a.high) else a.high
        return Range(_lower(a.low, b.low), high)
    assert isinstance(a, FloatRange) and isinstance(b, FloatRange)
    return FloatRange(min(a.low, b.low), min(a.high, b.high), a.nan or b.nan)


def _negated(op: Op, x: AnyRange) -> AnyRange:
    if isinstance(x, FloatRange):
        return FloatRange(-x.high, -x.low, x.nan)
    return Range(x.high * -1, x.low * -1)


def _absolute(op: Op, x: AnyRange) -> AnyRange:
    if isinstance(x, Range) and _at_most(0, x.low):
        return x
    low, high = (x.low, x.high) if isinstance(x, FloatRange) else _numbers(x)
    nearest = 0 if low <= 0 <= high else min(abs(low), abs(high))
    furthest = max(abs(low), abs(high))
    return FloatRange(nearest, furthest, x.nan) if isinstance(x, FloatRange) else Range(int(nearest), int(furthest))


def _relu(op: Op, x: AnyRange) -> AnyRange:
    if isinstance(x, FloatRange):
        return FloatRange(max(x.low, 0.0), max(x.high, 0.0), x.nan)
    return _maximum(op, x, Range(0, 0))


def _to_whole(function: Callable[[float], float]) -> Callable[[Op, AnyRange], AnyRange]:
    def rule(op: Op, x: AnyRange) -> AnyRange:
        if not isinstance(x, FloatRange):
            return x
        ends = [end if math.isinf(end) else float(function(end)) for end in (x.low, x.high)]
        return FloatRange(ends[0], ends[1], x.nan)

    return rule


def _same(op: Op, x: AnyRange, *_: AnyRange) -> AnyRange:
    return x


def _union(op: Op, *items: AnyRange) -> AnyRange:
    floats = [item for item in items if isinstance(item, FloatRange)]
    if floats:
        return FloatRange(min(x.low for x in floats), max(x.high for x in floats), any(x.nan for x in floats))
    whole = [item for item in items if isinstance(item, Range)]
    return Range(_lower(*(x.low for x in whole)), _upper(*(x.high for x in whole)))


def _pad(op: Op, x: AnyRange) -> AnyRange:
    assert isinstance(op, s.Pad)
    return _union(op, x, of_array(np.asarray(op.value, NUMPY_DTYPES[op.dtype])))


def _cast(op: Op, x: AnyRange) -> AnyRange:
    assert isinstance(op, e.Cast)
    if op.to == "bool":
        return _BOOL
    if op.to in FLOATS:
        if isinstance(x, FloatRange):
            own = op.x.dtype
            holds_all = _EPSILON[op.to] <= _EPSILON[own] and _SMALLEST[op.to] <= _SMALLEST[own]
            return x if holds_all else _rounded(x.low, x.high, x.nan, op.to)
        low, high = _numbers(x)
        exact = max(abs(low), abs(high)) <= 1 / _EPSILON[op.to]
        return FloatRange(low, high) if exact else _rounded(float(low), float(high), False, op.to)
    if isinstance(x, Range):
        return x
    # What is not a number, or no number of the dtype, becomes anything.
    if x.nan or not (math.isfinite(x.low) and math.isfinite(x.high)):
        return full(op)
    return Range(int(x.low), int(x.high))


def _bit_and(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    """Bits that are set in both: at most what either one is, where that one is not negative."""
    assert isinstance(a, Range) and isinstance(b, Range)
    limits = [item.most for item in (a, b) if _at_most(0, item.low)]
    known = [limit for limit in limits if limit is not None]
    return Range(0, min(known)) if known else full(op)


def _shift_right(op: Op, a: AnyRange, b: AnyRange) -> AnyRange:
    assert isinstance(a, Range)
    low, high = _numbers(a)
    return Range(min(low, 0), max(high, -1))


def _iota(op: Op) -> AnyRange:
    assert isinstance(op, s.Iota)
    if op.dtype in FLOATS:
        return _ANY_FLOAT
    return Range(0, op.size - 1)


def _slice(op: Op, x: AnyRange) -> AnyRange:
    """Of 0, 1, 2, ... a slice has the numbers from its start on: sources write a size as the last of them."""
    assert isinstance(op, s.Slice)
    if isinstance(op.x, s.Iota) and isinstance(x, Range):
        return Range(op.start, op.stop - 1)
    return x


def _sum(op: Op, x: AnyRange) -> AnyRange:
    """Of integers: as many as there are of them, or none."""
    assert isinstance(op, (s.Sum, s.Cumsum))
    axes = op.axes if isinstance(op, s.Sum) else (op.axis,)
    count = _extreme(product(tuple(op.x.shape[axis] for axis in axes)), 1)
    if not isinstance(x, Range) or count is None:
        return anything(op)
    low, high = _numbers(x)
    return Range(min(0, low * count), max(0, high * count))


def _extremes(op: Op, x: AnyRange) -> AnyRange:
    """The largest or smallest of some elements; of none it is an end of the dtype."""
    assert isinstance(op, s.Reduce)
    return x if _at_most(1, product(tuple(op.x.shape[axis] for axis in op.axes))) else anything(op)


def _place(op: Op) -> AnyRange:
    assert isinstance(op, (s.Argmax, s.TopK))
    return Range(0, op.x.shape[op.axis] - 1)


def _checked(op: Op, x: AnyRange, *sizes: AnyRange) -> AnyRange:
    assert isinstance(op, s.CheckedIndex)
    if op.sizes is None:
        return Range(0, op.size - 1)
    (of_each,) = sizes
    assert isinstance(of_each, Range)
    return Range(0, of_each.high - 1)


def _scatter(op: Op, x: AnyRange, updates: AnyRange) -> AnyRange:
    assert isinstance(op, s.Scatter)
    return _union(op, x, updates) if op.reduction in ("none", "max", "min") else anything(op)


def _where(ranges: Ranges, op: Op, condition: AnyRange, a: AnyRange, b: AnyRange, *_: AnyRange) -> AnyRange:
    """Both branches; where the condition compares with a number, each as it is where the condition sends it."""
    assert isinstance(op, e.Where)
    parts = []
    for branch, found, holds in ((op.a, a, True), (op.b, b, False)):
        narrowed = _narrowed(ranges, op.condition, holds)
        if narrowed is None:
            parts.append(found)
            continue
        value, own = narrowed
        if isinstance(own, Range) and _numbers(own)[0] > _numbers(own)[1]:
            continue  # never
        if branch is value:
            parts.append(own)
        elif isinstance(branch, (e.Unary, e.Binary, e.Cast)) and value in branch.operands:
            parts.append(ranges.apply(branch, {value: own}))
        else:
            parts.append(found)
    return _union(op, *parts) if parts else a


_SWAPPED: dict[type[e.Compare], type[e.Compare]] = {
    e.Less: e.Greater, e.LessEqual: e.GreaterEqual, e.Greater: e.Less, e.GreaterEqual: e.LessEqual
}  # fmt: skip
_OPPOSITE: dict[type[e.Compare], type[e.Compare]] = {
    e.Less: e.GreaterEqual, e.LessEqual: e.Greater, e.Greater: e.LessEqual, e.GreaterEqual: e.Less
}  # fmt: skip


def _narrowed(ranges: Ranges, condition: Value, holds: bool) -> tuple[Value, Range] | None:
    """(value, its range) where a comparison of integers with a known number holds, or fails."""
    while isinstance(condition, e.Not):
        condition, holds = condition.x, not holds
    if not isinstance(condition, e.Compare) or type(condition) not in _SWAPPED or condition.a.dtype in FLOATS:
        return None
    kind: type[e.Compare] = type(condition)
    value, limit = condition.a, ranges.integers(condition.b)
    if limit.low != limit.high:
        value, limit, kind = condition.b, ranges.integers(condition.a), _SWAPPED[kind]
    if limit.low != limit.high or not isinstance(limit.low, int):
        return None
    kind = kind if holds else _OPPOSITE[kind]
    low, high = _numbers(ranges.integers(value))
    number = limit.low
    if kind is e.Less:
        high = min(high, number - 1)
    elif kind is e.LessEqual:
        high = min(high, number)
    elif kind is e.Greater:
        low = max(low, number + 1)
    else:
        low = max(low, number)
    return value, Range(low, high)


def _constant(op: Op) -> AnyRange:
    assert isinstance(op, e.Constant)
    return of_array(op.evaluate())


_Rule = Callable[..., AnyRange]
_MOVES = (s.Reshape, s.Transpose, s.Broadcast)

# An op's rule, and the operands whose ranges it takes; the first class that an op is an instance of decides.
_RULES: tuple[tuple[type[Op] | tuple[type[Op], ...], _Rule, tuple[str, ...] | None], ...] = (
    (e.Constant, _constant, ()),
    ((e.Compare, e.Not), lambda op: _BOOL, ()),
    (e.Cast, _cast, None),
    (e.Add, _add, None),
    (e.Sub, _sub, None),
    (e.Mul, _mul, None),
    (e.Div, _divide, None),
    (e.FloorDivide, _floor_divide, None),
    (e.Mod, _mod, None),
    (e.Fmod, _fmod, None),
    (e.Maximum, _maximum, None),
    (e.Minimum, _minimum, None),
    (e.BitAnd, _bit_and, None),
    (e.ShiftRight, _shift_right, None),
    (e.Neg, _negated, None),
    (e.Abs, _absolute, None),
    (e.Relu, _relu, None),
    (e.Floor, _to_whole(math.floor), None),
    (e.Round, _to_whole(lambda x: np.round(x)), None),
    (e.Where, _where, None),
    (s.Iota, _iota, ()),
    (_MOVES, _same, None),
    (s.Slice, _slice, None),
    (s.Concat, _union, None),
    (s.Pad, _pad, None),
    ((s.Gather, s.GatherElements), _same, ("x",)),
    (s.Scatter, _scatter, ("x", "updates")),
    ((s.Sum, s.Cumsum), _sum, None),
    ((s.Max, s.Min), _extremes, None),
    ((s.Any, s.All), lambda op: _BOOL, ()),
    ((s.Argmax, s.TopK), _place, ()),
    (s.CheckedIndex, _checked, None),
)


def _entry(op: Op) -> tuple[_Rule, tuple[str, ...] | None] | None:
    for kinds, rule, fields in _RULES:
        if isinstance(op, kinds):
            return rule, fields
    return None


def _rule(op: Op) -> _Rule | None:
    entry = _entry(op)
    return entry[0] if entry is not None else None


def _asked(value: Value) -> tuple[Value, ...]:
    """The operands whose ranges decide the value's."""
    entry = _entry(value) if isinstance(value, Op) else None
    if entry is None or not isinstance(value, Op):
        return ()
    if entry[1] is None:
        condition = value.condition if isinstance(value, e.Where) else None
        while isinstance(condition, e.Not):
            condition = condition.x
        compared = condition.operands if isinstance(condition, e.Compare) else ()
        return (*value.operands, *compared)
    return tuple(getattr(value, field) for field in entry[1])
