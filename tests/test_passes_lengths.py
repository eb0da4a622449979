"""What a sequence's length decides: known for every length at once, in regimes, or refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes import lengths
from llmc.compiler.passes.lengths import MOST_REGIMES, Unsettled, regimes, settled
from llmc.compiler.passes.probe import Probe

LONGEST = 40
S, B = symbol("S", 2, LONGEST), symbol("B", 3, 5)
IDS = Input("ids", Tensor((1, S), "i32"))
POSITIONS = Input("positions", Tensor((1, S), "i32"))
SIZE = s.Slice(s.Iota(S + 1, "i32"), 0, S, S + 1)
FLOAT = e.Cast(SIZE, "f32")
COLUMN = s.Reshape(e.Cast(POSITIONS, "f32"), (S, 1))


def number(value: float, dtype: str = "f32") -> e.Constant:
    return e.constant(value, dtype)


def row(*values: float, dtype: str = "f32") -> e.Constant:
    return e.constant(values, dtype)


GRID = s.Broadcast(s.Reshape(e.constant(np.arange(6.0).reshape(3, 2), "f32"), (3, 1, 2)), (3, S, 2))
WAVE = e.Sin(COLUMN)
TABLE = e.constant(np.arange(100.0).reshape(50, 2), "f32")


def probe_of(value: Value) -> Probe:
    return Probe(Graph("main", (IDS, POSITIONS), (("y", value),)))


FOLLOWED: dict[str, Value] = {
    "a size": SIZE,
    "three sizes and two": s.Slice(s.Iota(3 * S + 3), 0, 3 * S + 2, 3 * S + 3),
    "a square": s.Slice(s.Iota(S * S + 1), 0, S * S, S * S + 1),
    "half a size less one": s.Slice(s.Iota(S + 1), 0, (S + 1) // 2 - 1, (S + 1) // 2),
    "a size beside another": s.Slice(s.Iota(S + B), 0, S, S + 1),
    "the last position": s.Slice(POSITIONS, 1, S - 1, S),
    "the last position, counted from the end": s.Slice(POSITIONS, -1, S - 1, S),
    "the last row of a wave": s.Slice(s.Concat((WAVE, e.Cos(COLUMN)), 1), 0, S - 1, S),
    "the last column of a wave": s.Slice(s.Transpose(s.Concat((WAVE, e.Cos(COLUMN)), 1), (1, 0)), -1, S - 1, S),
    "the largest": s.Max(WAVE, (0,)),
    "the least": s.Min(WAVE, (0,)),
    "the sum": s.Sum(WAVE, (-2,)),
    "the mean": s.Mean(WAVE, (0,)),
    "the product": s.Prod(e.Add(WAVE, number(1.5)), (0,)),
    "whether any": s.Any(e.Greater(POSITIONS, number(17, "i32")), (1,)),
    "whether all": s.All(e.Less(POSITIONS, number(17, "i32")), (1,)),
    "a sum that drops its axis": s.Sum(WAVE, (0,), False),
    "a sum of integers": s.Sum(POSITIONS, (0, 1)),
    "the largest of an axis before and one behind": s.Max(e.Mul(GRID, s.Reshape(WAVE, (1, S, 1))), (0, 1, 2)),
    "sums of an axis before": s.Sum(e.Mul(GRID, s.Reshape(WAVE, (1, S, 1))), (0, 1)),
    "sums of an axis behind": s.Sum(e.Mul(GRID, s.Reshape(WAVE, (1, S, 1))), (1, -1), False),
    "means of an axis before": s.Mean(e.Mul(GRID, s.Reshape(WAVE, (1, S, 1))), (0, 1)),
    "means of an axis behind": s.Mean(e.Mul(GRID, s.Reshape(WAVE, (1, S, 1))), (1, 2), False),
    "means of both": s.Mean(e.Mul(GRID, s.Reshape(WAVE, (1, S, 1))), (0, 1, 2)),
    "elements": e.Mul(e.Add(FLOAT, row(1, 2, 3)), e.Sqrt(FLOAT)),
    "elements of other ranks": e.Add(s.Reshape(FLOAT, (1, 1, 1)), e.Mul(s.Broadcast(FLOAT, (3,)), number(2))),
    "a choice": e.Where(e.Greater(SIZE, number(9, "i32")), row(1, 2), s.Broadcast(FLOAT, (3, 2))),
    "another shape": s.Reshape(e.Mul(FLOAT, e.constant(np.arange(6.0).reshape(2, 3), "f32")), (3, 2)),
    "spread to more axes": s.Broadcast(e.Mul(FLOAT, row(1, 2)), (3, 1, 2)),
    "axes in another order": s.Transpose(e.Mul(FLOAT, e.constant(np.arange(6.0).reshape(1, 2, 3), "f32")), (2, 0, 1)),
    "a piece": s.Slice(e.Mul(FLOAT, e.constant(np.arange(12.0).reshape(2, 6), "f32")), -1, 1, 6, 2),
    "side by side": s.Concat((e.Mul(FLOAT, row(1, 2)), row(7), FLOAT), 0),
    "side by side, counted from the end": s.Concat(
        (s.Broadcast(FLOAT, (3, 2)), e.constant(np.ones((3, 1)), "f32")), -1
    ),
    "below each other": s.Concat((s.Broadcast(FLOAT, (1, 2)), e.constant(np.ones((3, 2)), "f32")), 0),
    "rows of a table": s.Gather(TABLE, SIZE, 0),
    "rows of a table, counted from the end": s.Gather(TABLE, s.Reshape(SIZE, (1, 1)), -2),
    "a product of matrices": s.Matmul(s.Broadcast(FLOAT, (2, 3)), e.constant(np.arange(12.0).reshape(3, 4), "f32")),
    "a product with several": s.Matmul(
        e.constant(np.arange(12.0).reshape(2, 2, 3), "f32"), s.Reshape(e.Mul(FLOAT, row(1, 2, 3)), (3, 1))
    ),
    "of a length that is made of a length": e.Mul(s.Max(POSITIONS, (1,)), SIZE),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_value_is_known_for_every_length_at_once(name: str) -> None:
    value = FOLLOWED[name]
    probe = probe_of(value)
    for first, last in ((1, LONGEST), (7, 11)):
        found = lengths._by_length(probe, [value], np.arange(first, last + 1))[0]
        expected = [each[0] for each in probe.at_lengths([value], range(first, last + 1), exact=False)]
        # Running sums add in another order than numpy's: roundings of f32.
        tolerance = 1e-5 if "mean" in name or "sum" in name or "product" in name else 0
        np.testing.assert_allclose(found, np.stack(expected), rtol=tolerance, atol=tolerance)
        assert found.dtype.kind == expected[0].dtype.kind


THROUGH = "its angles depend on the sequence's length through {}, which is not followed"
NOT_FOLLOWED: dict[str, tuple[Value, str]] = {
    "two positions": (s.Slice(POSITIONS, 1, S - 2, S), THROUGH.format("t.slice")),
    "a reduction of others": (s.Argmax(s.Transpose(WAVE, (1, 0)), 1), THROUGH.format("t.argmax")),
    "a product over tokens": (s.Matmul(s.Transpose(WAVE, (1, 0)), WAVE), THROUGH.format("t.matmul")),
    "twice as many": (
        s.Max(s.Concat((WAVE, WAVE), 0), (0,)),
        "its angles depend on positions and on the sequence's length at once, in t.max",
    ),
    "two axes of tokens": (s.Max(e.Sub(COLUMN, s.Transpose(COLUMN, (1, 0))), (0, 1)), THROUGH.format("t.max")),
    "a table that the length decides": (
        s.Gather(e.Mul(FLOAT, row(1, 2, 3)), number(1, "i64"), 0),
        THROUGH.format("t.gather"),
    ),
    "a place among all": (
        s.Gather(s.Iota(S), e.Mul(SIZE, number(-1, "i32")), 0),
        "its angles depend on positions and on the sequence's length at once, in t.gather",
    ),
    "the largest of what the length alone decides": (
        s.Max(s.Slice(s.Iota(2 * S), 0, S, 2 * S), (0,)),
        "its angles depend on positions and on the sequence's length at once, in t.max",
    ),
    "the last of another size's rows": (s.Slice(s.Broadcast(COLUMN, (S, B)), 0, S - 1, S), THROUGH.format("t.slice")),
    "columns of a table": (s.Gather(TABLE, e.Minimum(SIZE, number(1, "i32")), 1), THROUGH.format("t.gather")),
    "shares": (s.Softmax(e.Mul(FLOAT, row(1, 2, 3)), 0), THROUGH.format("t.softmax")),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_is_not_followed_is_named(name: str) -> None:
    value, reason = NOT_FOLLOWED[name]
    probe = probe_of(value)
    with pytest.raises(Unsettled) as error:
        lengths._by_length(probe, [value], np.arange(1, LONGEST + 1))
    assert str(error.value) == reason


def steps(*ends: int) -> Value:
    """A number that changes behind these lengths."""
    total: Value = number(1 / 3)
    for end in ends:
        total = e.Where(e.Greater(SIZE, number(end, "i32")), e.Add(total, number(0.1)), total)
    return total


@pytest.mark.parametrize("chunk", [1, 7, 1 << 15])
@pytest.mark.parametrize("ends", [(), (1,), (2, 3), (6, 7, 8), (LONGEST - 1,), tuple(range(3, 3 + MOST_REGIMES - 1))])
def test_regimes_end_where_a_number_changes(ends: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "_CHUNK", chunk)
    one = e.Add(steps(*ends), e.Mul(FLOAT, number(0)))
    value = e.Mul(COLUMN, s.Reshape(e.Mul(one, row(1, 2)), (1, 2)))
    probe = probe_of(value)
    found = regimes(probe, [value])
    for index, values in enumerate(found.values):
        (constant,) = (v for v in values.values() if isinstance(v, e.Constant))
        exact = (1 / 3 + 0.1 * index) * np.array([[1, 2]])  # before rounding to f32
        np.testing.assert_allclose(constant.value.array.reshape(1, 2), exact, rtol=1e-14)
    assert found.last == ends and len(found.values) == len(ends) + 1
    for length in range(1, LONGEST + 1):
        own = settled(value, found.values[sum(length > end for end in ends)])
        assert not probe_of(own).depends_on_length(own)
        expected = probe.evaluate([value], length, exact=False)[0]
        # Both are rounded to f32 after each of a few operations.
        np.testing.assert_allclose(probe.evaluate([own], length, exact=False)[0], expected, rtol=2.0**-22, atol=0)


def test_numbers_of_a_regime_are_those_before_rounding() -> None:
    """1 / 3 in f64, where it is that for the whole regime; what f64 decides otherwise stays as the graph has it."""
    third = e.Div(number(1), e.Add(number(3), e.Mul(FLOAT, number(0))))
    value = e.Mul(COLUMN, s.Reshape(third, (1, 1)))
    (values,) = regimes(probe_of(value), [value]).values
    (constant,) = (v for v in values.values() if isinstance(v, e.Constant))
    assert float(constant.value.array.reshape(-1)[0]) == 1 / 3
    # Less than a rounding of f32 for each token: in f64 every length has a number of its own.
    drift = e.Add(number(1), e.Mul(FLOAT, number(2.0**-40)))
    value = e.Mul(COLUMN, s.Reshape(drift, (1, 1)))
    (values,) = regimes(probe_of(value), [value]).values
    (constant,) = (v for v in values.values() if isinstance(v, e.Constant))
    assert float(constant.value.array.reshape(-1)[0]) == 1.0


def constants(value: Value) -> list[float]:
    """The one number of each regime of a value that the length decides."""
    found = regimes(probe_of(value), [value])
    return [float(c.value.array.reshape(-1)[0]) for v in found.values for c in v.values() if isinstance(c, e.Constant)]


def test_a_regime_s_numbers_are_those_of_its_first_and_last_length() -> None:
    """No sequence is empty: what a length of 0 would give decides nothing."""
    third = e.Div(number(1), e.Where(e.Greater(SIZE, number(0, "i32")), number(3), number(7)))
    assert constants(e.Mul(COLUMN, s.Reshape(third, (1, 1)))) == [1 / 3]
    # In f64 the first length has a number of its own.
    drift = e.Add(number(1), e.Where(e.Greater(SIZE, number(1, "i32")), number(2.0**-40), number(0)))
    assert constants(e.Mul(COLUMN, s.Reshape(drift, (1, 1)))) == [1.0]


def test_numbers_that_rounding_decides_stay_as_the_graph_has_them() -> None:
    """What f64 gives instead is taken where it is within 2^-20."""
    none = e.Mul(FLOAT, number(0))
    for first, second, expected in ((1e8, 7.5, 8.0), (16.0, 1 + 0.75 * 2**-20, 1 + 0.75 * 2**-20)):
        rounded = e.Sub(e.Add(e.Add(number(first), none), number(second)), number(first))
        assert constants(e.Mul(COLUMN, s.Reshape(rounded, (1, 1)))) == [expected]


def test_regimes_of_an_odd_context_go_to_its_end() -> None:
    size = symbol("S", 2, 41)
    positions = Input("positions", Tensor((1, size), "i32"))
    last = e.Equal(s.Slice(s.Iota(size + 1, "i32"), 0, size, size + 1), number(41, "i32"))
    value = e.Mul(e.Cast(positions, "f32"), e.Where(last, number(2), number(3)))
    assert regimes(Probe(Graph("main", (positions,), (("y", value),))), [value]).last == (40,)


def test_every_number_that_the_length_decides_is_settled() -> None:
    first, second = (s.Reshape(e.Add(steps(end), e.Mul(FLOAT, number(0))), (1, 1)) for end in (3, 5))
    for value in (e.Add(e.Mul(COLUMN, first), second), e.Add(second, e.Mul(first, COLUMN))):
        found = regimes(probe_of(value), [value])
        assert found.last == (3, 5)
        for values in found.values:
            own = settled(value, values)
            assert not probe_of(own).depends_on_length(own)


def test_numbers_that_another_size_decides_are_not_known() -> None:
    """A batch, for one, may be of any size."""
    batch = s.Slice(s.Iota(B + 1, "f32"), 0, B, B + 1)
    for other in (batch, s.Slice(s.Iota(S + B, "f32"), 0, S + B - 1, S + B)):
        value = e.Mul(COLUMN, e.Add(other, e.Mul(FLOAT, number(0))))
        with pytest.raises(Unsettled, match=r"^its angles depend on sizes beside the number of tokens$"):
            regimes(probe_of(value), [value])


@pytest.mark.parametrize(("context", "last"), [(0, ()), (1, ()), (2, (1,)), (5, (1,)), (9, (1, 5)), (LONGEST, (1, 5))])
def test_regimes_of_a_graph_are_where_anything_changes_that_it_makes_of_lengths(
    context: int, last: tuple[int, ...]
) -> None:
    tokens = symbol("T", 1, 16)
    given = Input("lengths", Tensor((tokens,), "i32"))
    wide = e.Greater(s.Reshape(given, (tokens, 1)), e.constant([1, 5], "i32"))
    x = Input("x", Tensor((tokens, 2), "f32"))
    graph = Graph("main", (given, x), (("y", e.Where(wide, x, e.Neg(x))),))
    assert lengths.length_regimes(graph, context) == last


def test_more_regimes_than_are_welcome_are_refused_with_what_keeps_to_the_first() -> None:
    many = tuple(range(3, 3 + MOST_REGIMES))
    for ends, kept in ((many, "; --max-context 3 keeps to the first"), ((1, *many), "")):
        value = e.Mul(COLUMN, s.Reshape(e.Add(steps(*ends), e.Mul(FLOAT, number(0))), (1, 1)))
        with pytest.raises(Unsettled) as error:
            regimes(probe_of(value), [value])
        assert str(error.value) == f"the rotary angles of all tokens change over 7 times as a sequence grows{kept}"


def test_without_a_longest_sequence_nothing_is_known() -> None:
    free = symbol("S", 2)
    positions = Input("positions", Tensor((1, free), "i32"))
    size = s.Slice(s.Iota(free + 1, "f32"), 0, free, free + 1)
    value = e.Mul(e.Cast(positions, "f32"), size)
    with pytest.raises(Unsettled, match="and the longest sequence is not known"):
        regimes(Probe(Graph("main", (positions,), (("y", value),))), [value])
    mixed = e.Mul(e.Cast(POSITIONS, "f32"), e.Cast(s.Slice(s.Iota(2 * S), 0, S, 2 * S), "f32"))
    with pytest.raises(Unsettled, match="how far a token is from the sequence's end"):
        regimes(probe_of(mixed), [mixed])
