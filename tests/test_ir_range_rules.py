"""Each op's rule for ranges against all that can occur, one value after another: as tight as it says, never less."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import concrete, symbol
from llmc.compiler.ir.evaluate import evaluate_values
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.ranges import FloatRange, Range, Ranges, of_array
from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES, Tensor
from llmc.errors import LlmcError

ENDS = ((-3, 4), (0, 5), (2, 2), (-7, -1), (1, 6), (-1, 0), (0, 0), (-4, -4))
POSITIVE = ((1, 1), (1, 6), (2, 3), (5, 5))
N, M, U, Z = symbol("n", 1, 5), symbol("m", 1, 9), symbol("u", 0), symbol("z", 0, 4)


def no_params(name: str) -> np.ndarray:
    raise AssertionError(name)


def occurring(value: Value, given: dict[Value, np.ndarray], **sizes: int) -> np.ndarray:
    return np.asarray(evaluate_values([value], given, no_params, sizes)["0"])


def operands(ends: tuple[tuple[int, int], ...], dtype: str) -> tuple[dict[Value, Range], dict[Value, np.ndarray]]:
    """Inputs of a range each, and all pairs of elements in them."""
    given, arrays = {}, {}
    for place, (low, high) in enumerate(ends):
        shape = [1] * len(ends)
        shape[place] = high - low + 1
        value = Input(f"x{place}", Tensor(tuple(shape), dtype))
        given[value] = Range(low, high)
        arrays[value] = np.arange(low, high + 1).astype(NUMPY_DTYPES[dtype]).reshape(shape)
    return given, arrays


# What numbers near 1 differ by, and the least number that is not 0.
STEPS = {
    "f64": (2.0**-52, 2.0**-1074), "f32": (2.0**-23, 2.0**-149), "f16": (2.0**-10, 2.0**-24),
    "bf16": (2.0**-7, 2.0**-133),
}  # fmt: skip

# Where both operands are between numbers, these rules give exactly the least and the greatest result.
EXACT = (e.Add, e.Sub, e.Mul, e.Maximum, e.Minimum)
DIVISIONS = (e.FloorDivide, e.Div)


@pytest.mark.parametrize("kind", EXACT + DIVISIONS, ids=lambda kind: kind.name)
def test_two_operands_give_no_more_than_occurs(kind: type[e.Binary]) -> None:
    for ends in itertools.product(ENDS, POSITIVE if kind in DIVISIONS else ENDS):
        given, arrays = operands(ends, "i32")
        made = kind(*given)
        found = occurring(made, arrays)
        assert Ranges(given).of(made) == Range(int(found.min()), int(found.max())), ends


@pytest.mark.parametrize("kind", [e.Neg, e.Abs, e.Relu], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", ["i32", "f32"])
def test_one_operand_gives_no_more_than_occurs(kind: type[e.Unary], dtype: str) -> None:
    for ends in ENDS:
        given, arrays = operands((ends,), "i32")
        (x,) = given
        made = kind(e.Cast(x, dtype))
        found = occurring(made, arrays)
        expected = Range(int(found.min()), int(found.max()))
        assert Ranges(given).of(made) == (FloatRange(expected.low, expected.high) if dtype == "f32" else expected)
    if dtype == "f32":
        for numbers in ([-0.5, 2.0], [-2.0, 0.5], [0.25, 0.5], [-0.5, -0.25]):
            made = kind(e.constant(numbers, dtype))
            low = 0.0 if kind is e.Abs and numbers[0] < 0 < numbers[1] else occurring(made, {}).min()
            assert Ranges({}).of(made) == FloatRange(low, occurring(made, {}).max())


@pytest.mark.parametrize("kind", [e.Mod, e.Fmod], ids=lambda kind: kind.name)
def test_a_rest_is_less_than_its_divisor(kind: type[e.Binary]) -> None:
    for ends in itertools.product(ENDS, POSITIVE):
        given, arrays = operands(ends, "i32")
        made = kind(*given)
        found, ranges = occurring(made, arrays), Ranges(given).integers(made)
        assert ranges.within(min(0, 1 - ends[1][1]), ends[1][1] - 1)
        assert Range(int(found.min()), int(found.max())).within(ranges.low, ranges.high)
        if kind is e.Mod:
            assert ranges.within(0, ends[1][1] - 1)
        elif ends[0][0] >= 0:
            assert ranges.within(0, min(ends[0][1], ends[1][1] - 1))
        elif ends[0][1] <= 0:
            assert ranges.within(max(ends[0][0], 1 - ends[1][1]), 0)
    tame, _ = operands(((0, 3), (4, 6)), "i32")
    assert Ranges(tame).of(kind(*tame)) == Range(0, 3)
    assert Ranges(tame).of(kind(*reversed(tame))) == Range(-(2**31), 2**31 - 1)  # by what may be 0


@pytest.mark.parametrize("kind", [e.FloorDivide, e.Div, e.Mod, e.Fmod], ids=lambda kind: kind.name)
@pytest.mark.parametrize("divisor", [(0, 3), (-2, -1), (-1, 1)])
def test_a_divisor_that_may_be_0_or_less_proves_nothing(kind: type[e.Binary], divisor: tuple[int, int]) -> None:
    given, _ = operands(((0, 3), divisor), "i32")
    assert Ranges(given).of(kind(*given)) == Range(-(2**31), 2**31 - 1)


@pytest.mark.parametrize("kind", [e.BitAnd, e.ShiftRight], ids=lambda kind: kind.name)
def test_bits_stay_inside(kind: type[e.Binary]) -> None:
    for ends in itertools.product(ENDS, ENDS):
        given, arrays = operands(ends, "i32")
        made = kind(*given)
        found, ranges = occurring(made, arrays), Ranges(given).integers(made)
        assert Range(int(found.min()), int(found.max())).within(ranges.low, ranges.high), ends
        if kind is e.ShiftRight:  # towards 0 or -1
            assert ranges == Range(min(ends[0][0], 0), max(ends[0][1], -1)), ends
            continue
        whole = [high for low, high in ends if low >= 0]
        assert ranges == (Range(0, min(whole)) if whole else Range(-(2**31), 2**31 - 1)), ends


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_within_a_rounding(kind: type[e.Binary], dtype: str) -> None:
    for ends in itertools.product(ENDS, ENDS):
        given, arrays = operands(ends, "i32")
        made = kind(*(e.Cast(x, dtype) for x in given))
        found, ranges = occurring(made, arrays).astype(np.float64), Ranges(given).of(made)
        assert isinstance(ranges, FloatRange) and not ranges.nan
        assert ranges.low <= found.min() and found.max() <= ranges.high
        step, least = STEPS[dtype]
        # One rounding, of a number or of what is too small for one: nothing else.
        assert ranges.low >= found.min() - max(step * abs(found.min()), least), ends
        assert ranges.high <= found.max() + max(step * abs(found.max()), least), ends


@pytest.mark.parametrize("kind", [e.Add, e.Sub, e.Mul], ids=lambda kind: kind.name)
@pytest.mark.parametrize("place", [0, 1])
def test_a_float_that_may_be_infinite_proves_nothing(kind: type[e.Binary], place: int) -> None:
    given, _ = operands(((0, 3), (0, 3)), "f32")
    a, b = (e.Cast(e.Cast(x, "i32"), "f32") for x in given)
    wild = e.Maximum(Input("w", Tensor((1, 1), "f32")), e.constant(0.0, "f32"))
    tame = {a.x: Range(0, 3), b.x: Range(0, 3)}
    made = kind(wild, a) if place else kind(a, wild)
    assert Ranges(tame).of(made) == FloatRange(-math.inf, math.inf, True)


@pytest.mark.parametrize("kind", [e.Maximum, e.Minimum, e.Add], ids=lambda kind: kind.name)
@pytest.mark.parametrize("place", [0, 1])
def test_what_may_be_not_a_number_stays_so(kind: type[e.Binary], place: int) -> None:
    """NaN comes through, from either side; what is known to be a number stays one."""
    none = e.constant([1.0, math.nan], "f32")
    number = e.constant([2.0, 3.0], "f32")
    pair = (none, number) if place else (number, none)
    found = Ranges({}).of(kind(*pair))
    assert isinstance(found, FloatRange) and found.nan
    for after in (e.Floor, e.Relu, e.Abs, e.Neg):
        again = Ranges({}).of(after(kind(*pair)))
        assert isinstance(again, FloatRange) and again.nan
    clean = Ranges({}).of(kind(number, number))
    assert isinstance(clean, FloatRange) and not clean.nan


def test_a_joined_value_is_in_the_union() -> None:
    for ends in itertools.permutations(((0, 5), (-1, 6), (-3, 4))):
        given, _ = operands(tuple((low, high) for low, high in ends), "i32")
        flat = {Input(x.name, Tensor((3,), "i32")): kind for x, kind in given.items()}
        joined = s.Concat(tuple(flat), 0)
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        assert Ranges(flat).of(joined) == Range(low, high)
        floats = s.Concat(tuple(e.Cast(x, "f32") for x in flat), 0)
        assert Ranges(flat).of(floats) == FloatRange(low, high)


def test_padding_joins_its_value() -> None:
    given, _ = operands(((2, 3),), "i32")
    (x,) = given
    for number in (0.1, -0.1):  # no float16
        half = s.Pad(e.Cast(x, "f16"), (1,), (0,), number)
        found = occurring(half, {x: np.array([2, 3], np.int32)}).astype(np.float64)
        assert Ranges(given).of(half) == FloatRange(found.min(), found.max())
    assert Ranges(given).of(s.Pad(e.Cast(x, "f16"), (1,), (0,), math.nan)).nan
    assert Ranges(given).of(s.Pad(x, (1,), (0,), -4.0)) == Range(-4, 3)
    assert Ranges(given).of(s.Pad(x, (1,), (0,), 7.0)) == Range(2, 7)
    assert Ranges(given).of(s.Pad(e.Cast(x, "f32"), (1,), (0,), 7.5)) == FloatRange(2, 7.5)


@pytest.mark.parametrize("function", [math.floor, round], ids=["floor", "round"])
def test_whole_numbers_of_floats(function: object) -> None:
    kind = e.Floor if function is math.floor else e.Round
    found = Ranges({}).of(kind(e.constant([-2.5, 0.5, 3.7], "f32")))
    assert found == FloatRange(-3.0 if kind is e.Floor else -2.0, 3.0 if kind is e.Floor else 4.0)
    wild = e.Maximum(Input("w", Tensor((3,), "f32")), e.constant(0.5, "f32"))
    assert Ranges({}).of(kind(wild)) == FloatRange(0.0, math.inf, True)


CASTS = [
    # Exact where every integer between is; else rounded outwards, and infinite beyond the greatest number.
    ((-3, 2048), "f16", (-3 - 2**-8, 2050)),
    ((-3, 1024), "f16", (-3, 1024)),
    ((-1024, 5), "f16", (-1024, 5)),
    ((0, 70000), "f16", (-(2**-24), math.inf)),
    ((-70000, 0), "f16", (-math.inf, 2**-24)),
    ((0, 2**23), "f32", (0, 2**23)),
    ((0, 2**31 - 1), "f32", (-(2**-149), 2**31 + 2**9)),
    ((-(2**31), 128), "bf16", (-(2**31) - 2**25, 130)),
    ((-128, 128), "bf16", (-128, 128)),
    ((-(2**31), 2**31 - 1), "f64", (-(2**31), 2**31 - 1)),
]


@pytest.mark.parametrize(("ends", "dtype", "widest"), CASTS)
def test_integers_as_floats(ends: tuple[int, int], dtype: str, widest: tuple[float, float]) -> None:
    x = Input("x", Tensor((2,), "i32"))
    made = e.Cast(x, dtype)
    found = Ranges({x: Range(*ends)}).of(made)
    assert isinstance(found, FloatRange) and not found.nan
    values = occurring(made, {x: np.array(ends, np.int32)}).astype(np.float64)
    assert widest[0] <= found.low <= values.min() and values.max() <= found.high <= widest[1]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["i64", "u64"])
def test_the_greatest_integers_as_floats(kind: str, dtype: str) -> None:
    limits = np.iinfo(NUMPY_DTYPES[kind])
    for ends in ((limits.min, limits.max), (limits.max - 1, limits.max), (0, limits.max // 3)):
        x = Input("x", Tensor((2,), kind))
        made = e.Cast(x, dtype)
        found = Ranges({x: Range(int(ends[0]), int(ends[1]))}).of(made)
        assert isinstance(found, FloatRange) and not found.nan
        low, high = occurring(made, {x: np.array(ends, NUMPY_DTYPES[kind])}).astype(np.float64).tolist()
        step, least = STEPS[dtype]
        for bound, value in ((found.low, low), (-found.high, -high)):
            assert math.isinf(value) or value - 2 * step * abs(value) - least <= bound
            assert bound <= value


@pytest.mark.parametrize(("wide", "narrow"), [("f64", "f32"), ("f32", "f16"), ("f32", "bf16"), ("f16", "bf16")])
def test_floats_as_narrower_floats(wide: str, narrow: str) -> None:
    numbers = e.constant([-1.0009765625, 1.0009765625 + 2**-14], wide)
    found = Ranges({}).of(e.Cast(numbers, narrow))
    values = occurring(e.Cast(numbers, narrow), {}).astype(np.float64)
    assert isinstance(found, FloatRange) and not found.nan
    assert found.low <= values.min() and values.max() <= found.high
    step, _ = STEPS[narrow]
    exact = occurring(numbers, {}).astype(np.float64)
    assert found.low >= exact.min() * (1 + step) - 1e-9 and found.high <= exact.max() * (1 + step) + 1e-9
    # What is rounded away from 0 is inside too.
    outward = e.constant([-1 - 0.75 * step, 1 + 0.75 * step], wide)
    wider = Ranges({}).of(e.Cast(outward, narrow))
    assert isinstance(wider, FloatRange) and wider.low <= -1 - step and 1 + step <= wider.high
    assert occurring(e.Cast(outward, narrow), {}).astype(np.float64).tolist() == [-1 - step, 1 + step]
    # A wider dtype holds them as they are.
    again = Ranges({}).of(e.Cast(e.Cast(numbers, narrow), "f64"))
    assert again == found


def test_what_is_too_small_for_a_dtype_may_become_0() -> None:
    for wide, narrow, small in (("f32", "f16", 1e-8), ("bf16", "f16", 1e-8), ("f64", "f32", 1e-46)):
        for numbers in ([small, 1.0], [-1.0, -small]):
            found = Ranges({}).of(e.Cast(e.constant(numbers, wide), narrow))
            assert isinstance(found, FloatRange) and found.low <= 0.0 <= found.high
    half = e.constant([1e-4], "f16")
    found = Ranges({}).of(e.Mul(half, half))
    assert isinstance(found, FloatRange) and found.low <= 0.0 <= found.high


def test_an_infinite_number_stays_infinite_in_another_dtype() -> None:
    for number in (math.inf, -math.inf):
        for dtype in ("f16", "bf16", "f64"):
            made = e.Cast(e.constant([number], "f32"), dtype)
            assert Ranges({}).of(made) == Ranges({}).of(e.Floor(made)) == FloatRange(number, number)
            assert Ranges({}).of(e.Cast(made, "i8")) == Range(-128, 127)


def test_floats_as_integers_are_cut_off() -> None:
    for numbers, expected in (([-2.7, 3.9], Range(-2, 3)), ([0.5, 0.9], Range(0, 0))):
        assert Ranges({}).of(e.Cast(e.constant(numbers, "f32"), "i32")) == expected
    for odd in (math.nan, math.inf, -math.inf):
        found = Ranges({}).of(e.Cast(e.constant([0.5, odd], "f32"), "i8"))
        assert found == Range(-128, 127)
    assert Ranges({}).of(e.Cast(e.constant([200.0], "f32"), "i8")) == Range(-128, 127)
    assert Ranges({}).of(e.Cast(e.constant([-3.0, 0.0], "f32"), "bool")) == Range(0, 1)
    assert Ranges({}).of(e.Cast(e.constant([5, 7], "i32"), "bool")) == Range(0, 1)


def test_sums_count_their_elements() -> None:
    for low, high in ENDS:
        x = Input("x", Tensor((N, 3), "i32"))
        ranges = Ranges({x: Range(low, high)})
        # Of any part of a running sum, so of none as well.
        assert ranges.of(s.Sum(x, (1,))) == Range(min(0, 3 * low), max(0, 3 * high))
        assert ranges.of(s.Sum(x, (0, 1))) == Range(min(0, 15 * low), max(0, 15 * high))
        assert ranges.of(s.Cumsum(x, 0)) == Range(min(0, 5 * low), max(0, 5 * high))
    unbounded = Input("x", Tensor((U,), "i32"))
    assert Ranges({unbounded: Range(0, 1)}).of(s.Sum(unbounded, (0,))) == Range(-(2**31), 2**31 - 1)
    for count in (1, 3):
        assert Ranges({}).of(s.Sum(Input("x", Tensor((count,), "bool")), (0,))) == Range(0, 1)
    assert Ranges({}).of(s.Sum(Input("x", Tensor((3,), "f32")), (0,))) == FloatRange(-math.inf, math.inf, True)


def test_the_greatest_of_none_is_an_end_of_the_dtype() -> None:
    for kind in (s.Max, s.Min):
        for size, expected in (
            (N, Range(2, 3)),
            (2, Range(2, 3)),
            (U, Range(-128, 127)),
            (0, Range(-128, 127)),
            (Z, Range(-128, 127)),
        ):
            x = Input("x", Tensor((4, size), "i8"))
            assert Ranges({x: Range(2, 3)}).of(kind(x, (1,))) == expected
            assert Ranges({x: Range(2, 3)}).of(kind(x, (0,))) == Range(2, 3)


def test_places_are_below_the_size_of_their_axis() -> None:
    x = Input("x", Tensor((N, 7), "f32"))
    ranges = Ranges({})
    assert ranges.of(s.Argmax(x, 0)) == Range(0, N - 1) and ranges.of(s.Argmax(x, -1)) == Range(0, 6)
    assert ranges.of(s.TopK(x, 2, 1)) == Range(0, 6)
    assert ranges.of(s.Iota(N, "i32")) == Range(0, N - 1)
    assert ranges.of(s.Iota(N, "f32")) == FloatRange(-math.inf, math.inf, True)


def test_checked_places_are_below_the_sizes_that_they_were_checked_with() -> None:
    x, sizes = Input("x", Tensor((N,), "i64")), Input("sizes", Tensor((N,), "i32"))
    assert Ranges({}).of(s.CheckedIndex(x, None, 12)) == Range(0, 11)
    for most in (8, 9):
        assert Ranges({sizes: Range(2, most)}).of(s.CheckedIndex(x, sizes)) == Range(0, most - 1)


def test_a_slice_of_a_count_begins_at_its_start() -> None:
    ranges = Ranges({})
    assert ranges.of(s.Slice(s.Iota(9), 0, 2, 5)) == Range(2, 4)
    assert ranges.of(s.Slice(s.Iota(N + 3), 0, N, N + 3, 2)) == Range(N, N + 2)
    # A part that the dtype holds of a count that it does not hold.
    assert ranges.of(s.Slice(s.Iota(300, "i8"), 0, 2, 128)) == Range(2, 127)
    assert ranges.of(s.Slice(s.Iota(300, "i8"), 0, 2, 129)) == Range(-128, 127)
    assert ranges.of(s.Slice(s.Iota(9, "f32"), 0, 2, 5)) == FloatRange(-math.inf, math.inf, True)
    x = Input("x", Tensor((9,), "i64"))
    assert Ranges({x: Range(0, 3)}).of(s.Slice(x, 0, 2, 5)) == Range(0, 3)
    assert ranges.of(s.Slice(e.Neg(s.Iota(9)), 0, 2, 5)) == Range(-8, 0)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scattered_rows_are_in_the_union_unless_they_are_combined(reduction: str) -> None:
    x, updates, at = (Input(n, Tensor((3,), "i32")) for n in ("x", "updates", "at"))
    found = Ranges({x: Range(0, 3), updates: Range(-2, 1)}).of(s.Scatter(x, at, updates, reduction))
    assert found == (Range(-2, 3) if reduction in ("none", "max", "min") else Range(-(2**31), 2**31 - 1))


def test_a_table_is_as_its_elements() -> None:
    ids = Input("ids", Tensor((3,), "i32"))
    wild = Input("wild", Tensor((3,), "i32"))
    table = e.constant([[4, 9, 5]], "i32")
    assert Ranges({ids: Range(0, 2)}).of(s.Gather(table, wild, 1)) == Range(4, 9)
    for move in (s.Reshape(ids, (1, 3)), s.Transpose(ids, (0,)), s.Broadcast(ids, (2, 3))):
        assert Ranges({ids: Range(0, 2)}).of(move) == Range(0, 2)


def test_bounds_between_sizes() -> None:
    """The greater of two sizes where one is known to be; else a number that no size passes."""
    n, m, more = s.Iota(N), s.Iota(M), s.Iota(N + 3)
    one = [s.Reshape(s.Argmax(x, 0), (1,)) for x in (n, m, more)]
    ranges = Ranges({})
    assert ranges.of(e.Maximum(one[0], one[2])) == ranges.of(e.Maximum(one[2], one[0])) == Range(0, N + 2)
    assert ranges.of(e.Minimum(one[0], one[2])) == ranges.of(e.Minimum(one[2], one[0])) == Range(0, N - 1)
    for pair in ((0, 1), (1, 0)):
        a, b = (one[i] for i in pair)
        assert ranges.of(e.Maximum(a, b)) == Range(0, 8)
        assert ranges.of(s.Concat((a, b), 0)) == Range(0, 8)
        # Either upper bound holds.
        found = ranges.integers(e.Minimum(a, b))
        assert found.high in (N - 1, M - 1) and found.low == 0
        lowest = ranges.of(e.Minimum(e.Neg(a), e.Neg(b)))
        assert lowest == Range(-8, 0)
        highest = ranges.integers(e.Maximum(e.Neg(a), e.Neg(b)))
        assert highest.low in (N * -1 + 1, M * -1 + 1) and highest.high == 0
    for value in (e.Neg(one[2]), e.Sub(one[0], one[2])):
        found = ranges.integers(value)
        for n_size in (1, 5):
            assert concrete(found.low, {"n": n_size}) == -(n_size + 2)
            assert concrete(found.high, {"n": n_size}) == (0 if isinstance(value, e.Neg) else n_size - 1)
    assert ranges.of(e.Add(one[0], one[2])) == Range(0, 2 * N + 1)
    assert ranges.of(e.Mul(one[0], e.constant(3, "i64"))) == Range(0, 3 * N - 3)
    assert ranges.of(e.Mul(e.constant(-3, "i64"), one[0])) == Range(-3 * N + 3, 0)


def test_sizes_without_bounds_have_no_numbers() -> None:
    place, negative = Range(0, U), Range(U * -1, 5)
    assert place.least == 0 and place.most is None
    assert Range(N, N + 3).least == 1 and Range(N, N + 3).most == 8
    assert Range(-5, U).least == -5 and negative.least is None and negative.most == 5
    assert place.within(0, U) and not place.within(1, U) and not place.within(0, 99)
    # What has no bound may leave its dtype.
    size = Input("x", Tensor((U + 1,), "f32"))
    assert Ranges({}).of(s.Argmax(size, 0)) == Range(-(2**63), 2**63 - 1)
    wide = Input("wide", Tensor((1,), "i64"))
    for given, made in (
        (place, e.Maximum(wide, e.constant(3, "i64"))),
        (negative, e.Minimum(wide, e.constant(3, "i64"))),
        (place, e.FloorDivide(wide, e.constant(2, "i64"))),
        (negative, e.FloorDivide(wide, e.constant(2, "i64"))),
        (negative, e.Where(e.Less(wide, e.constant(3, "i64")), wide, e.constant(0, "i64"))),
        (negative, s.Concat((wide, e.constant([-3, 4], "i64")), 0)),
        (place, s.Concat((wide, e.constant([-3, 9], "i64")), 0)),
    ):
        assert Ranges({wide: given}).of(made) == Range(-(2**63), 2**63 - 1)
    assert Ranges({wide: negative}).of(e.Fmod(wide, e.constant(3, "i64"))) == Range(-2, 2)


CONDITIONS = (e.Less, e.LessEqual, e.Greater, e.GreaterEqual)


@pytest.mark.parametrize("kind", CONDITIONS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("negations", [0, 1, 2])
def test_a_comparison_narrows_its_branches(kind: type[e.Compare], turned: bool, negations: int) -> None:
    """Each branch, and what a branch computes of the value, holds exactly what the condition lets through."""
    for limit in range(-5, 7):
        x = Input("x", Tensor((8,), "i32"))
        number = e.constant(limit, "i32")
        condition: Value = kind(number, x) if turned else kind(x, number)
        for _ in range(negations):
            condition = e.Not(condition)
        arrays = {x: np.arange(-3, 5).astype(np.int32)}
        shifted = e.Add(x, e.constant(10, "i32"))
        for made in (e.Where(condition, x, shifted), e.Where(condition, shifted, x)):
            found = occurring(made, arrays)
            assert Ranges({x: Range(-3, 4)}).of(made) == Range(int(found.min()), int(found.max())), limit


@pytest.mark.parametrize("kind", [e.Equal, e.NotEqual], ids=lambda kind: kind.name)
def test_other_comparisons_narrow_nothing(kind: type[e.Compare]) -> None:
    x, y = Input("x", Tensor((8,), "i32")), Input("y", Tensor((8,), "i32"))
    ranges = Ranges({x: Range(-3, 4), y: Range(0, 9)})
    assert ranges.of(e.Where(kind(x, e.constant(0, "i32")), x, e.constant(0, "i32"))) == Range(-3, 4)
    assert ranges.of(e.Where(e.Less(x, y), x, y)) == Range(-3, 9)
    # A size is no number; and what moves elements takes them from where the condition does not hold.
    wide, sized = Input("wide", Tensor((8,), "i64")), s.Argmax(Input("z", Tensor((8, N), "f32")), 1)
    ranges = Ranges({x: Range(-3, 4), y: Range(0, 9), wide: Range(0, 12)})
    assert ranges.of(e.Where(e.Less(wide, sized), wide, sized)) == Range(0, 12)
    for moved in (s.Gather(x, y, 0), s.GatherElements(x, y, 0)):
        assert ranges.of(e.Where(e.Less(x, e.constant(2, "i32")), moved, e.constant(0, "i32"))) == Range(-3, 4)
    a, b = e.Cast(x, "f32"), e.constant(0.0, "f32")
    assert ranges.of(e.Where(e.Less(a, b), x, e.constant(0, "i32"))) == Range(-3, 4)


def test_stored_integers_are_read_where_they_can_be() -> None:
    ids = Param("ids", Tensor((3,), "i32"))

    def load(name: str) -> np.ndarray:
        assert name == "ids"
        return np.array([4, -1, 7], np.int32)

    def fails(name: str) -> np.ndarray:
        raise LlmcError("gone")

    everything = Range(-(2**31), 2**31 - 1)
    assert Ranges({}, load).of(ids) == Range(-1, 7)
    assert Ranges({}).of(ids) == everything and Ranges({}, fails).of(ids) == everything
    # Weights and large tables are not read.
    for kind in (Tensor((3,), "f32"), Tensor((1 << 11, (1 << 11) + 1), "i8"), Tensor((N,), "i8")):
        found = Ranges({}, fails).of(Param("other", kind))
        assert found == (FloatRange(-math.inf, math.inf, True) if kind.dtype == "f32" else Range(-128, 127))

    def must_not(name: str) -> np.ndarray:
        raise AssertionError(name)

    for kind in (Tensor((3,), "f32"), Tensor((1 << 11, (1 << 11) + 1), "i8"), Tensor((N,), "i8")):
        Ranges({}, must_not).of(Param("other", kind))
    assert Ranges({}, lambda _: np.ones((1 << 11, 1 << 11), np.int8)).of(
        Param("most", Tensor((1 << 11, 1 << 11), "i8"))
    ) == Range(1, 1)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([3, -4], np.int8), Range(-4, 3)),
        (np.array([2**63 + 1], np.uint64), Range(2**63 + 1, 2**63 + 1)),
        (np.array([True]), Range(1, 1)),
        (np.array([], np.int32), Range(0, 0)),
        (np.array([1.5, -2.0], np.float16), FloatRange(-2.0, 1.5)),
        (np.array([1.5, math.nan, -2.0]), FloatRange(-2.0, 1.5, True)),
        (np.array([math.nan]), FloatRange(0.0, 0.0, True)),
        (np.array([], np.float32), FloatRange(0.0, 0.0)),
        (np.array([math.inf, 0.0]), FloatRange(0.0, math.inf)),
    ],
)
def test_known_elements(array: np.ndarray, expected: object) -> None:
    assert of_array(array) == expected


def test_integers_that_leave_their_dtype_wrap_around() -> None:
    for dtype, low, high in (("i8", -128, 127), ("u8", 0, 255), ("i32", -(2**31), 2**31 - 1), ("u64", 0, 2**64 - 1)):
        x = Input("x", Tensor((2,), dtype))
        one = e.constant(np.array(1, NUMPY_DTYPES[dtype]))
        for bounds, made, fits in (
            (Range(low, high - 1), e.Add(x, one), Range(low + 1, high)),
            (Range(low + 1, high), e.Sub(x, one), Range(low, high - 1)),
        ):
            assert Ranges({x: bounds}).of(made) == fits
            assert Ranges({x: Range(low, high)}).of(made) == Range(low, high)


def test_a_float_that_leaves_its_dtype_is_infinite() -> None:
    for dtype, largest in (("f16", 65504.0), ("f32", 3.4e38), ("bf16", 3.38e38)):
        top = e.constant([-largest, largest], dtype)
        found = Ranges({}).of(e.Add(top, top))
        assert found == FloatRange(-math.inf, math.inf)
        small = Ranges({}).of(e.Mul(top, e.constant(0.5, dtype)))
        assert isinstance(small, FloatRange)
        assert math.isfinite(small.low) and math.isfinite(small.high)
        assert -0.51 * largest < small.low <= -0.49 * largest and 0.49 * largest <= small.high < 0.51 * largest


def test_an_op_without_a_rule_may_give_anything() -> None:
    x = Input("x", Tensor((3,), "i32"))
    ranges = Ranges({x: Range(0, 3)})
    for op in (e.ShiftLeft(x, x), e.Pow(x, x), e.BitOr(x, x)):
        assert isinstance(op, Op)
        assert ranges.of(op) == Range(-(2**31), 2**31 - 1)
    assert ranges.of(e.Exp(e.Cast(x, "f32"))) == FloatRange(-math.inf, math.inf, True)
    assert ranges.integers(e.Not(e.Less(x, x))) == Range(0, 1)
