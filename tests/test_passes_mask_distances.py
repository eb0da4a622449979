"""Functions of a query and a key that are functions of their distance: the same numbers at every pair, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_harness import Pairs
from pass_harness import param

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.types import Array, numpy_dtype
from llmc.compiler.passes.distances import Affine, Distances
from llmc.compiler.passes.masks import HIDDEN, Unrecognised
from llmc.compiler.passes.pair_functions import PairReader
from llmc.compiler.passes.points import Point

c = e.constant
UNLIKE = "its mask is not decided by the distance of key and query alone"
LENGTHS = (1, 2, 5, 9)
CARRIED = 3.7  # added to tenths of places and taken off again, it leaves 2.0**-21.6 of the greatest of them
Build = Callable[[Pairs], Value]


def heads(*numbers: float, dtype: str = "f32") -> Value:
    return c(np.reshape(numbers, (-1, 1, 1)), dtype)


def floats(x: Value, dtype: str = "f32") -> Value:
    return e.Cast(x, dtype)


def stored(change: Callable[[Array], None] = lambda table: None, rows: int = 12, columns: int = 12) -> Array:
    """A number a distance, up to 12 places; changed somewhere."""
    table = 10.0 * np.subtract.outer(np.arange(rows), np.arange(columns))
    change(table)
    return table


def sliced(p: Pairs, table: Array, start: tuple[int, int] = (0, 0), axes: tuple[int, int] = (0, 1)) -> Value:
    """A table's first rows and columns, from `start` on."""
    x: Value = c(table, "f32")
    for axis, first in zip(axes, start, strict=True):
        x = s.Slice(x, axis, first, p.size + first)
    return x


def sliced_value(p: Pairs, table: Value) -> Value:
    return s.Slice(s.Slice(table, 0, 0, p.size), 1, 0, p.size)


def hole(at: tuple[int, int]) -> Callable[[Array], None]:
    def change(table: Array) -> None:
        table[at] += 1

    return change


BY_DISTANCE: dict[str, Build] = {
    "a number": lambda p: c(3.5),
    "numbers of heads": lambda p: heads(1, 2),
    "a distance": lambda p: p.back,
    "the other way round": lambda p: e.Neg(p.back),
    "a sum of places": lambda p: e.Add(p.q, e.Neg(p.k)),
    "twice": lambda p: e.Sub(e.Mul(p.q, c(2)), e.Mul(c(2), p.k)),
    "further": lambda p: e.Add(e.Sub(p.q, c(3)), e.Sub(c(1), p.k)),
    "in floats": lambda p: e.Sub(floats(p.q), floats(p.k)),
    "the length is in both": lambda p: e.Sub(e.Sub(p.length, p.k), e.Sub(p.length, p.q)),
    "moved": lambda p: s.Reshape(s.Transpose(e.Neg(p.back), (1, 0)), (1, p.size, p.size)),
    "spread": lambda p: e.Sub(s.Broadcast(p.q, (1, p.size, p.size)), p.k),
    "of each head": lambda p: e.Mul(heads(1, 2), floats(p.back)),
    "another function": lambda p: e.Sqrt(e.Abs(floats(p.back))),
    "a remainder": lambda p: e.Mod(e.Sub(p.k, p.q), c(3)),
    "a quotient": lambda p: e.Div(p.back, c(2)),
    "causal": lambda p: p.causal,
    "strictly": lambda p: e.Greater(p.q, p.k),
    "one key": lambda p: e.Equal(p.q, e.Add(p.k, c(1))),
    "all but one": lambda p: e.NotEqual(p.back, c(-2)),
    "fractions are less": lambda p: e.Less(e.Div(floats(p.q), c(2.0)), e.Add(e.Mul(floats(p.k), c(0.5)), c(1.25))),
    "always: below the end": lambda p: e.Less(p.k, c(9)),
    "always: up to the last": lambda p: e.LessEqual(p.k, c(8)),
    "never: the end": lambda p: e.GreaterEqual(p.k, c(9)),
    "never: after the last": lambda p: e.Greater(p.q, c(8)),
    "always: from the first on": lambda p: e.GreaterEqual(p.k, c(0)),
    "never: before the first": lambda p: e.Less(p.q, c(0)),
    "never: another place": lambda p: e.Equal(p.q, c(9)),
    "always: another place": lambda p: e.NotEqual(p.k, c(-1)),
    "always: below the length": lambda p: e.Less(p.k, p.length),
    "always: there is a token": lambda p: e.GreaterEqual(p.length, c(1)),
    "never: there are ten": lambda p: e.Equal(p.length, c(10)),
    "never: the length": lambda p: e.Equal(p.q, p.length),
    "both": lambda p: e.And(p.causal, e.Less(p.back, c(4))),
    "one of both": lambda p: e.Or(e.Not(p.causal), e.Less(p.back, c(4))),
    "the same or not": lambda p: e.Equal(p.causal, e.Less(p.back, c(4))),
    "a choice": lambda p: e.Where(p.causal, floats(p.back), heads(1, 2)),
    "the same at every key": lambda p: e.Mul(e.Mod(p.k, c(1)), c(5)),
    "the same at every query, in floats": lambda p: e.Add(e.Mul(floats(e.Mod(p.q, c(1))), c(2.0)), c(0.25)),
    "the same at every length": lambda p: e.Minimum(p.length, c(1)),
    "the same for keys of each head": lambda p: e.Add(e.Mul(heads(1, 2), floats(e.Mod(p.k, c(1)))), heads(3, 4)),
    "linear by its numbers": lambda p: e.Sub(e.FloorDivide(e.Mul(p.q, c(6)), c(3)), e.Mul(p.k, c(2))),
    "a length by its numbers": lambda p: e.Sub(e.Maximum(p.length, c(1)), p.length),
    "stored": lambda p: sliced(p, stored()),
    "stored for just as many": lambda p: sliced(p, stored(rows=9, columns=9)),
    "stored, from a row on": lambda p: sliced(p, stored(), (3, 0)),
    "stored, from a column on": lambda p: sliced(p, stored(), (1, 2)),
    "stored, turned": lambda p: s.Transpose(sliced(p, stored()), (1, 0)),
    "stored of heads": lambda p: sliced(p, np.stack([stored(), 3 * stored()]), (0, 1), (1, 2)),
    "stored of heads behind": lambda p: s.Transpose(
        sliced(p, np.stack([stored(), 3 * stored()], 2), (2, 1)), (2, 0, 1)
    ),
    "stored, another number where nobody looks": lambda p: sliced(p, stored(hole((2, 11)))),
    "stored, another number before": lambda p: sliced(p, stored(hole((0, 5))), (1, 0)),
    "looked up": lambda p: s.Gather(c(np.arange(40) ** 2), e.Add(p.back, c(9))),
    "numbers beyond those of floats": lambda p: e.Equal(e.Add(p.back, c(2**53 + 1)), c(2**53)),
    "the same at every key, beyond floats": lambda p: e.Add(e.Mod(p.k, c(1)), e.Add(e.Mod(p.q, c(1)), c(2**53 + 1))),
    "one number at every key, beyond floats": lambda p: e.Add(e.Maximum(p.k, c(2**53 + 1)), p.back),
    "always: a sum of places": lambda p: e.GreaterEqual(e.Add(p.q, p.k), c(0)),
    "never: a sum of places": lambda p: e.Less(e.Add(p.q, p.k), c(0)),
    "always: a multiple of a sum": lambda p: e.LessEqual(e.Mul(e.Add(p.q, p.k), c(2)), c(32)),
    "always: a part of a sum": lambda p: e.LessEqual(e.Div(floats(e.Add(p.q, p.k)), c(2.0)), c(8.0)),
    "always: in narrow floats": lambda p: e.LessEqual(
        e.Mul(floats(e.Add(p.q, p.k), "bf16"), c(2, "bf16")), c(32, "bf16")
    ),
    "every other, in floats": lambda p: e.Equal(e.Mod(floats(p.back), c(2.0)), c(0.0)),
    "linear from a number on, by its numbers": lambda p: e.Sub(
        e.FloorDivide(e.Mul(e.Add(p.q, c(2)), c(6)), c(3)), e.Mul(p.k, c(2))
    ),
    "looked at as a whole": lambda p: elements(p, p.back),
    "looked at as a whole, of heads": lambda p: elements(p, e.Mul(heads(1, 2, dtype="i64"), p.back)),
}


def elements(p: Pairs, x: Value) -> Value:
    """`x` itself, by an op that is not followed."""
    rows = s.Broadcast(p.q, x.shape)
    return s.GatherElements(x, rows, x.rank - 2)


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_a_function_of_distance_is_the_same_at_every_pair(name: str) -> None:
    places = Pairs()
    value = BY_DISTANCE[name](places)
    reader = places.reader(value)
    distances = Distances(reader)
    point = distances.by_distance(reader.pair(value))
    assert point.dtype == value.dtype and len(point.shape) == value.rank
    for length in LENGTHS:
        expected = places.numbers(reader, value, length)
        found = places.read(reader, point, length, by_distance=True)
        np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)
    table = distances.numbers(point)
    assert table.distances.tolist() == list(range(-8, 9)) and table.zero == 8
    whole = places.read(reader, point, 9, by_distance=True)
    edges = np.concatenate([whole[..., 8, :8], whole[..., 0, :]], -1).astype(np.float64)
    np.testing.assert_array_equal(table.own, edges.reshape(-1, 17))
    np.testing.assert_allclose(table.exact, table.own, rtol=1e-6)


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("name", ["linear by its numbers", "the length is in both", "causal", "stored", "a remainder"])
def test_a_short_context_is_followed_as_well(name: str, most: int) -> None:
    places = Pairs(most)
    value = BY_DISTANCE[name](places)
    reader = places.reader(value)
    point = Distances(reader).by_distance(reader.pair(value))
    expected = places.numbers(reader, value, most)
    np.testing.assert_array_equal(places.read(reader, point, most, by_distance=True), expected)


NOT_BY_DISTANCE: dict[str, tuple[Build, str]] = {
    "a key": (lambda p: p.k, UNLIKE),
    "a sum": (lambda p: e.Add(p.q, p.k), UNLIKE),
    "the length": (lambda p: p.length, UNLIKE),
    "a distance and the length": (lambda p: e.Add(p.back, p.length), UNLIKE),
    "in few bits": (
 lambda p: e.Sub(floats(e.Mul(floats(p.q, "f16"), c(301.0, "f16"))), floats(e.Mul(p.k, c(301)))), UNLIKE),
    "a product": (lambda p: e.Mul(p.q, p.k), UNLIKE),
    "unlike multiples": (lambda p: e.Sub(e.Mul(p.q, c(2)), p.k), UNLIKE),
    "quotients": (lambda p: e.Sub(e.Div(p.q, c(2)), e.Div(p.k, c(2))), UNLIKE),
    "a quotient of a number": (lambda p: e.Div(c(2), e.Add(p.k, c(1))), UNLIKE),
    "not always: below the last": (lambda p: e.Less(p.k, c(8)), UNLIKE),
    "not always: up to the last but one": (lambda p: e.LessEqual(p.q, c(7)), UNLIKE),
    "not never: the last": (lambda p: e.GreaterEqual(p.k, c(8)), UNLIKE),
    "not never: after the last but one": (lambda p: e.Greater(p.k, c(7)), UNLIKE),
    "not always: after the first": (lambda p: e.Greater(p.k, c(0)), UNLIKE),
    "not never: up to the first": (lambda p: e.LessEqual(p.q, c(0)), UNLIKE),
    "not never: the last place": (lambda p: e.Equal(p.q, c(8)), UNLIKE),
    "not always: the first place": (lambda p: e.NotEqual(p.k, c(0)), UNLIKE),
    "not always: two tokens": (lambda p: e.GreaterEqual(p.length, c(2)), UNLIKE),
    "not never: nine": (lambda p: e.Equal(p.length, c(9)), UNLIKE),
    "not always: before the last of a text": (lambda p: e.Less(e.Add(p.k, c(1)), p.length), UNLIKE),
    "one key that is another": (lambda p: e.Add(floats(e.Div(p.k, c(8))), c(1.0)), UNLIKE),
    "one length that is another": (lambda p: e.Div(p.length, c(9)), UNLIKE),
    "nearly linear": (lambda p: e.Sub(e.Maximum(p.q, c(1)), p.k), UNLIKE),
    "stored, another number": (
        lambda p: sliced(p, stored(hole((8, 1)))), "its stored mask is not decided by the distance of key and query",
    ),
    "stored, another last number": (
        lambda p: sliced(p, stored(hole((8, 8)))), "its stored mask is not decided by the distance of key and query",
    ),
    "stored, another first number": (
        lambda p: sliced(p, stored(hole((3, 0))), (3, 0)),
        "its stored mask is not decided by the distance of key and query",
    ),
    "stored by key": (
        lambda p: s.Slice(c(np.arange(12.0)[None] ** 2, "f32"), 1, 0, p.size),
        "its mask looks up a table by one place, not by a distance",
    ),
    "weights by key": (
        lambda p: s.Slice(param("row", 1, 12), 1, 0, p.size),
        "its mask looks up a table by one place, not by a distance",
    ),
    "stored by query": (
        lambda p: s.Slice(c(np.arange(12.0)[:, None] ** 2, "f32"), 0, 0, p.size),
        "its mask looks up a table by one place, not by a distance",
    ),
    "stored, from the length on": (
        lambda p: s.Slice(s.Slice(c(stored(rows=24), "f32"), 0, p.size, p.size * 2), 1, 0, p.size),
        "its mask looks up a table by one place, not by a distance",
    ),
    "more than f64 keeps, by its numbers": (
        lambda p: e.FloorDivide(e.Add(e.Mul(p.q, c(2)), c(2**60)), c(2)), UNLIKE,
    ),
    "stored, and the length": (
        lambda p: e.Add(sliced(p, stored()), floats(p.length)), UNLIKE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_BY_DISTANCE)
def test_what_is_no_function_of_distance_is_refused(name: str) -> None:
    places = Pairs()
    build, why = NOT_BY_DISTANCE[name]
    value = build(places)
    reader = places.reader(value)
    distances = Distances(reader)
    point = reader.pair(value)
    for _ in range(2):  # also when asked again
        with pytest.raises(Unrecognised) as refused:
            distances.by_distance(point)
        assert str(refused.value) == why
        assert isinstance(distances.found_by_distance(point), Unrecognised)


# Up to a number a row


def sloped(p: Pairs, *slopes: float) -> Value:
    return e.Mul(heads(*slopes), floats(p.k))


def chosen(p: Pairs, bias: Value, number: float) -> Value:
    return e.Where(p.causal, bias, c(number))


SHIFTED: dict[str, Build] = {
    "a distance": lambda p: floats(p.back),
    "slopes by key": lambda p: sloped(p, 0.5, -0.25),
    "thirds by key": lambda p: sloped(p, 1 / 3, 0.1),
    "slopes by key from a number on": lambda p: e.Add(sloped(p, 0.5, -0.25), heads(1000, -3)),
    "slopes by key, in other words": lambda p: e.Div(floats(e.Add(p.k, e.FloorDivide(p.k, c(1)))), heads(2, 8)),
    "a number a query": lambda p: e.Sub(floats(p.back), floats(e.Mul(p.q, p.q))),
    "a number a length": lambda p: e.Add(floats(p.length), floats(p.back)),
    "a great number": lambda p: e.Add(floats(p.back), e.Mul(floats(e.Add(p.q, c(1))), c(1e5))),
    "times a number": lambda p: e.Mul(e.Add(floats(p.back), floats(p.q)), heads(2, 3)),
    "a number times": lambda p: e.Mul(c(2.0), e.Add(floats(p.back), floats(p.q))),
    "over a number": lambda p: e.Div(e.Sub(sloped(p, 1, 2), floats(p.q)), heads(2, 3)),
    "cast": lambda p: floats(floats(e.Add(floats(p.back), floats(p.q)), "f64")),
    "moved": lambda p: s.Reshape(e.Add(floats(p.back), floats(p.q)), (1, p.size, p.size)),
    "hidden": lambda p: chosen(p, sloped(p, 0.5, -0.25), -math.inf),
    "hidden by a number": lambda p: chosen(p, sloped(p, 0.5, -0.25), -10_004.0),
    "hidden the other way": lambda p: e.Where(e.Not(p.causal), c(-1e30), sloped(p, 0.5)),
    "from the end": lambda p: e.Mul(heads(0.5, 2), floats(e.Sub(p.k, p.length))),
    "rounded four times": lambda p: e.Minimum(e.Sub(e.Add(sloped(p, 0.1), c(CARRIED)), c(CARRIED)), c(1e9)),
    "small numbers a query": lambda p: e.Mul(
        e.Add(e.Mul(floats(p.back), c(1e-6)), e.Mul(floats(p.q), c(1e-6))), c(1e7)
    ),
    "stored slopes, from the end": lambda p: s.Slice(c(np.arange(12.0)[None] / 2, "f32"), 1, 12 - p.size, 12),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_a_bias_is_one_of_distance_but_for_a_number_a_row(name: str) -> None:
    places = Pairs()
    value = SHIFTED[name](places)
    reader = places.reader(value)
    point = Distances(reader).up_to_rows(reader.pair(value))
    assert point.dtype == value.dtype
    for length in LENGTHS:
        expected = places.numbers(reader, value, length).astype(np.float64)
        found = np.broadcast_to(places.read(reader, point, length, by_distance=True), expected.shape)
        hides = expected <= 2 * HIDDEN
        np.testing.assert_array_equal(found <= HIDDEN, hides)
        difference = np.where(hides, 0, found) - np.where(hides, 0, expected)
        own = np.diagonal(difference, axis1=-2, axis2=-1)[..., None]
        # f32 numbers of up to 1e6 that are apart by less.
        limit = 1e-6 * max(1.0, np.abs(np.where(hides, 0, expected)).max())
        assert (np.abs(np.where(hides, 0, difference - own)) <= limit).all()


NOT_SHIFTED: dict[str, Build] = {
    "more than f32 keeps": lambda p: e.Add(floats(p.back), e.Mul(floats(e.Add(p.q, c(1))), c(1.2e5))),
    "less than f32 keeps": lambda p: e.Sub(floats(p.back), e.Mul(floats(e.Add(p.q, c(1))), c(1.2e5))),
    "infinite in a row": lambda p: e.Add(floats(p.back), e.Where(e.Less(p.q, c(3)), c(0.0), c(-math.inf))),
    "slopes that bend": lambda p: e.Mul(heads(0.5, 2), e.Maximum(floats(p.k), c(2.0))),
    "one slope that bends": lambda p: e.Mul(heads(1, 2), e.Maximum(floats(p.k), heads(0, 2))),
    "slopes from too far": lambda p: e.Minimum(e.Add(sloped(p, 0.5, 2), heads(0, 1.1e6)), c(1e9)),
    "slopes that are whole": lambda p: e.Mul(c(2), e.Mod(p.k, c(9))),
    "hidden by too little": lambda p: chosen(p, sloped(p, 0.5, -0.25), -10_003.9),
    "hidden by too little beside slopes that fall": lambda p: chosen(p, sloped(p, -0.5), -10_003.9),
    "two branches": lambda p: e.Where(p.causal, sloped(p, 0.5), sloped(p, 2)),
    "a choice that no distance decides": lambda p: e.Where(e.Less(p.q, c(3)), sloped(p, 0.5), c(-1e30)),
    "a bias of pairs and a choice": lambda p: chosen(p, e.Mul(floats(p.q), floats(p.k)), -1e30),
    "over a place": lambda p: e.Div(sloped(p, 0.5), floats(e.Add(p.q, c(1)))),
    "times a place": lambda p: e.Mul(sloped(p, 0.5), floats(p.q)),
    "another function of slopes": lambda p: e.Abs(e.Add(floats(p.back), floats(p.q))),
    "whole numbers cast": lambda p: floats(e.Add(e.Mul(p.back, c(2)), e.Mul(p.q, p.q))),
    "more than f32 keeps, scaled": lambda p: e.Mul(far_rows(p), c(1000.0)),
    "more than f32 keeps, scaled in front": lambda p: e.Mul(c(1000.0), far_rows(p)),
    "times a weight": lambda p: e.Mul(e.Add(floats(p.back), floats(p.q)), param("w", 1, 1)),
    "times a weight in front": lambda p: e.Mul(param("w", 1, 1), e.Add(floats(p.back), floats(p.q))),
    "a weight a query": lambda p: e.Mul(e.Sqrt(floats(p.q)), param("w", 1, 1)),
    "places in narrow floats": lambda p: floats(floats(e.Add(p.k, c(2048)), "f16")),
    "stored, twice as far from the end": lambda p: s.Slice(bent(), 1, 24 - p.size * 2, 24 - p.size),
}


def far_rows(p: Pairs) -> Value:
    return e.Add(floats(p.back), e.Mul(floats(e.Add(p.q, c(1))), c(300.0)))


def bent() -> Value:
    """[1, 30]: slopes but where texts of two tokens look."""
    row = np.arange(30.0) / 2
    row[21:] += 5
    return c(row[None], "f32")


@pytest.mark.parametrize("name", NOT_SHIFTED)
def test_a_bias_that_is_another_somewhere_is_refused(name: str) -> None:
    places = Pairs()
    value = NOT_SHIFTED[name](places)
    reader = places.reader(value)
    with pytest.raises(Unrecognised):
        Distances(reader).up_to_rows(reader.pair(value))


def test_rows_are_shifted_where_shares_are_asked_for_alone() -> None:
    """`by_distance` itself shifts none."""
    places = Pairs()
    value = e.Add(floats(places.back), floats(places.q))
    reader = places.reader(value)
    assert isinstance(Distances(reader).found_by_distance(reader.pair(value)), Unrecognised)
    assert isinstance(Distances(reader).up_to_rows(reader.pair(value)), Point)


def test_a_table_that_is_computed_is_one_before_rounding_too() -> None:
    """So that slopes are read from it as they were before rounding."""
    places = Pairs()
    value = sliced_value(places, e.Mul(c(stored(), "f32"), c(0.07, "f32")))
    reader = places.reader(value)
    distances = Distances(reader)
    found = distances.numbers(distances.by_distance(reader.pair(value)))
    exact = 10.0 * -found.distances * reader.probe.evaluate([c(0.07, "f32")], 1)[0]
    np.testing.assert_allclose(found.exact[0], exact, rtol=1e-15)
    assert not np.array_equal(found.own, found.exact)


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("name", ["slopes by key", "thirds by key", "a number a query", "steep slopes"])
def test_a_bias_of_a_short_context_is_one_of_distance(name: str, most: int) -> None:
    places = Pairs(most)
    value = (SHIFTED | {"steep slopes": lambda p: sloped(p, 2e6)})[name](places)
    reader = places.reader(value)
    point = Distances(reader).up_to_rows(reader.pair(value))
    expected = places.numbers(reader, value, most).astype(np.float64)
    found = np.broadcast_to(places.read(reader, point, most, by_distance=True), expected.shape)
    own = [np.diagonal(x, axis1=-2, axis2=-1)[..., None] for x in (found, expected)]
    np.testing.assert_allclose(found - own[0], expected - own[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12), (13, 13)])
def test_a_table_of_too_few_tokens_is_refused(rows: int, columns: int) -> None:
    """A reader of more tokens than the sizes of the graph have: slices are proved not to end before these."""
    places = Pairs(12)
    value = sliced(places, stored(rows=rows, columns=columns))
    reader = PairReader(places.reader(value).probe, 13, size=places.size)
    found = Distances(reader).found_by_distance(reader.pair(value))
    if rows == columns:
        assert isinstance(found, Point)
    else:
        assert isinstance(found, Unrecognised) and str(found) == "its mask is stored for 12 tokens, not for 13"


def test_weights_that_nobody_reads_are_functions_of_distance_where_places_are() -> None:
    places = Pairs()
    value = e.Mul(floats(places.back), param("w", 1, 1))
    reader = places.reader(value)
    found = Distances(reader).found_by_distance(reader.pair(value))
    assert isinstance(found, Point) and found.variables == {"key"}
    # What is compared with them is not known.
    compared = e.Less(floats(e.Add(places.q, places.k)), param("w", 1, 1))
    reader = places.reader(compared)
    assert isinstance(Distances(reader).found_by_distance(reader.pair(compared)), Unrecognised)


# Places in dtypes

ROOM = [
    ("f64", 2**53, True), ("f64", 2**53 + 1, False), ("f32", 2**24, True), ("f32", 2**24 + 1, False),
    ("f16", 2**11, True), ("f16", 2**11 + 1, False), ("bf16", 2**8, True), ("bf16", 2**8 + 1, False),
    ("i8", 127, True), ("i8", 128, False), ("u8", 255, True), ("u8", 256, False), ("i64", 2**63 - 1, True),
    ("i64", 2**63, False), ("bool", 1, False),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "greatest", "exact"), ROOM)
def test_a_dtype_has_room_for_places(dtype: str, greatest: int, exact: bool) -> None:
    """For a key from 0 on, up to the greatest number itself, in whichever way it is reached."""
    none, one = Fraction(0), Fraction(1)
    assert Affine(none, one, none, Fraction(greatest - 3)).is_exact(dtype, 4) == exact
    assert Affine(one, none, none, Fraction(greatest - 3)).is_exact(dtype, 4) == exact
    assert Affine(none, none, one, Fraction(greatest - 4)).is_exact(dtype, 4) == exact
    if dtype.startswith("u"):
        assert Affine(none, -one, none, Fraction(3)).is_exact(dtype, 4)
        assert not Affine(none, -one, none, Fraction(2)).is_exact(dtype, 4)
    elif dtype != "bool":
        lower = Fraction(3 - greatest - dtype.startswith("i"))
        assert Affine(none, -one, none, lower).is_exact(dtype, 4) == exact
    if dtype in ("f16", "bf16"):
        half = Fraction(1, 2)
        assert Affine(none, half, none, Fraction(greatest - 3, 2)).is_exact(dtype, 4) == exact
        assert Affine(none, 8 * one, none, Fraction(8 * (greatest - 3))).is_exact(dtype, 4) == exact
        for parts in (3, 5, 6, 9):
            assert not Affine(none, Fraction(1, parts), none, none).is_exact(dtype, 4)
    assert Affine(none, none, none, none).is_exact(dtype, 4) == (dtype != "bool")
    assert not Affine(none, Fraction(1, 2), none, none).is_exact("i64", 4)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.tuples(*[st.integers(-70, 70)] * 3, st.integers(-300, 300)),
    unit=st.sampled_from([Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(1, 5), Fraction(8)]),
    dtype=st.sampled_from(["i8", "u8", "i16", "f16", "bf16", "f32"]),
    most=st.integers(1, 7),
)
def test_exact_places_are_what_a_dtype_holds(
    parts: tuple[int, int, int, int], unit: Fraction, dtype: str, most: int
) -> None:
    affine = Affine(*(Fraction(part) * unit for part in parts))
    every = [
        affine.query * q + affine.key * k + affine.length * n + affine.constant
        for n in range(1, most + 1) for q in range(n) for k in range(n)
    ]  # fmt: skip
    assert affine.ends(most) == (min(every), max(every))
    if affine.is_exact(dtype, most):
        kept = np.asarray([float(x) for x in every]).astype(numpy_dtype(dtype)).astype(np.float64)
        assert [Fraction(float(x)) for x in kept] == every
