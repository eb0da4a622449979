"""Values as functions of a query, a key and a length: the evaluator's numbers for every length, or refused by name."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_harness import Pairs

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, product, symbol
from llmc.compiler.ir.elementwise import Constant
from llmc.compiler.ir.llm import Embed
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.types import numpy_dtype
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.pair_functions import _groups
from llmc.compiler.passes.points import Known, Place, Table
from llmc.errors import IRError

S = symbol("S", 1, 9)
c = e.constant


def heads(*numbers: float, dtype: str = "i64") -> Value:
    return c(np.reshape(numbers, (-1, 1, 1)), dtype)


def table(*shape: int, dtype: str = "i64") -> Value:
    """Numbers that are all different."""
    return c(np.arange(np.prod(shape)).reshape(shape) * 3 + 1, dtype)


def both(p: Pairs) -> Value:
    """[S, S]: different for every pair."""
    return e.Add(e.Mul(p.q, c(100)), p.k)


def six(p: Pairs) -> Value:
    """[6, S, S]"""
    return e.Add(e.Mul(heads(1, 2, 3, 5, 7, 11), p.q), p.k)


READ: dict[str, Callable[[Pairs], Value]] = {
    "a query": lambda p: p.q,
    "a key": lambda p: p.k,
    "keys, of rank 1": lambda p: p.at,
    "a number": lambda p: c(3),
    "the only place": lambda p: e.Add(s.Iota(1), p.q),
    "positions": lambda p: e.Sub(s.Reshape(p.positions, (p.size, 1)), p.positions),
    "in a narrow dtype": lambda p: e.Cast(e.Mul(p.q, c(40)), "i8"),
    "the length": lambda p: p.length,
    "twice the length": lambda p: s.Slice(s.Iota(p.size * 2 + 3), 0, p.size * 2 + 1, p.size * 2 + 2),
    "from the third on": lambda p: s.Reshape(s.Slice(s.Iota(p.size + 5), 0, 3, p.size + 3), (p.size, 1)),
    "from the length on": lambda p: s.Slice(s.Iota(p.size * 2), 0, p.size, p.size * 2),
    "every other": lambda p: s.Slice(s.Iota(p.size * 2), 0, 0, p.size * 2, 2),
    "every other from the second on": lambda p: s.Slice(s.Iota(p.size * 2 + 1), -1, 1, p.size * 2, 2),
    "the second row": lambda p: s.Slice(s.Broadcast(e.Add(p.k, c(1)), (4, p.size)), 0, 1, 2),
    "heads, sliced": lambda p: s.Slice(six(p), 0, 1, 6, 2),
    "heads, sliced by a negative axis": lambda p: s.Slice(six(p), -3, 2, 4),
    "heads, all of them": lambda p: s.Slice(six(p), 0, 0, 6),
    "one head": lambda p: s.Slice(six(p), 0, 4, 5),
    "turned": lambda p: s.Transpose(both(p), (1, 0)),
    "heads, turned": lambda p: s.Transpose(six(p), (0, 2, 1)),
    "heads behind": lambda p: s.Transpose(
        s.Reshape(e.Mul(s.Reshape(p.at, (1, p.size, 1)), c([[[2, 3]]])), (1, p.size, 2)), (2, 0, 1)
    ),
    "two axes of heads, turned": lambda p: s.Transpose(s.Reshape(six(p), (2, 3, p.size, p.size)), (1, 0, 3, 2)),
    "spread": lambda p: s.Broadcast(p.q, (3, p.size, p.size)),
    "a number, spread": lambda p: e.Add(s.Broadcast(c(4), (2, p.size, p.size)), s.Broadcast(heads(1, 2), (2, 1, 1))),
    "axes of size 1": lambda p: s.Reshape(s.Reshape(both(p), (1, p.size, 1, p.size)), (p.size, p.size)),
    "axes of size 1 around": lambda p: s.Reshape(both(p), (1, 1, p.size, p.size)),
    "heads, split": lambda p: s.Reshape(six(p), (2, 3, p.size, p.size)),
    "heads, merged": lambda p: s.Reshape(s.Reshape(six(p), (3, 2, p.size, p.size)), (6, p.size, p.size)),
    "heads in place of the first axis": lambda p: s.Reshape(s.Broadcast(p.q, (6, p.size, 1)), (2, 3, p.size, 1)),
    "heads that are alike, merged": lambda p: s.Reshape(s.Broadcast(p.k, (2, 3, 1, p.size)), (6, 1, p.size)),
    "heads that are alike in part, merged": lambda p: s.Reshape(
        s.Broadcast(e.Mul(p.k, c(np.reshape([2, 3], (2, 1, 1, 1)))), (2, 3, 1, p.size)), (6, 1, p.size)
    ),
    "heads, one after another": lambda p: s.Concat((six(p), e.Neg(six(p))), 0),
    "heads, one after another, by a negative axis": lambda p: s.Concat(
        (s.Broadcast(p.q, (1, p.size, 1)), e.Mul(p.q, heads(2, 3))), -3
    ),
    "heads, one after another, that are alike": lambda p: s.Concat(
        (s.Broadcast(p.q, (2, p.size, 1)), s.Broadcast(c(5), (3, p.size, 1))), 0
    ),
    "groups, one after another": lambda p: s.Concat(
        tuple(s.Reshape(x, (2, 3, p.size, p.size)) for x in (six(p), e.Neg(six(p)))), 1
    ),
    "the sum in f16": lambda p: s.Sum(e.Add(e.Cast(p.q, "f16"), heads(2048, 1, 1, 1, dtype="f16")), (0,)),
    "the sum in f64": lambda p: s.Sum(e.Mul(e.Cast(p.q, "f64"), heads(1 / 3, 0.1, 0.7, dtype="f64")), (0,)),
    "the greatest of heads": lambda p: s.Max(six(p), (0,)),
    "the least of heads, without the axis": lambda p: s.Min(six(p), (-3,), False),
    "the sum of heads that are alike": lambda p: s.Sum(s.Broadcast(p.q, (3, p.size, 1)), (0,)),
    "the product of axes": lambda p: s.Prod(s.Reshape(e.Mod(six(p), c(3)), (2, 3, p.size, p.size)), (1, 0), False),
    "the sum of one axis of two": lambda p: s.Sum(s.Reshape(six(p), (2, 3, p.size, p.size)), (1,), False),
    "the mean in f16": lambda p: s.Mean(e.Cast(six(p), "f16"), (0,)),
    "any and all": lambda p: e.And(
        s.Any(e.Less(six(p), c(9)), (0,), False), e.Not(s.All(e.Less(six(p), c(9)), (-3,), False))
    ),
    "the largest place": lambda p: s.Max(p.k, (1,)),
    "the largest place, without the axis": lambda p: s.Max(s.Slice(s.Iota(p.size + 3), 0, 3, p.size + 3), (-1,), False),
    "the largest of queries": lambda p: s.Max(p.q, (0, 1)),
    "the least place": lambda p: s.Min(s.Slice(s.Iota(p.size + 3), 0, 3, p.size + 3), (0,)),
    "the largest place spread": lambda p: s.Max(s.Broadcast(p.k, (1, p.size)), (-1,)),
    "how many": lambda p: s.Sum(s.Broadcast(c(1), (1, p.size)), (1,)),
    "three times how many": lambda p: s.Sum(s.Broadcast(c(3), (p.size,)), (0,), False),
    "counted": lambda p: s.Cumsum(s.Broadcast(c(2), (p.size,)), 0),
    "counted along queries": lambda p: s.Cumsum(s.Broadcast(c(3), (p.size, 1)), -2),
    "counted by itself": lambda p: s.Cumsum(e.Mul(p.q, p.q), 0),
    "counted by itself, of keys": lambda p: s.Cumsum(e.Add(e.Mul(p.k, p.k), c(1)), 1),
    "counted in floats": lambda p: s.Cumsum(s.Broadcast(c(0.1), (p.size,)), 0),
    "counted of heads": lambda p: s.Cumsum(e.Mul(p.q, heads(1, 2)), 1),
    "counted of each head": lambda p: s.Cumsum(s.Broadcast(heads(1, 2), (2, p.size, 1)), 1),
    "looked up": lambda p: s.Gather(table(40), e.Add(p.back, c(9))),
    "looked up of each head": lambda p: s.Gather(table(2, 40), e.Add(p.back, c(9)), 1),
    "looked up of each head, by a negative axis": lambda p: s.Gather(table(2, 40), e.Add(p.back, c(9)), -1),
    "looked up between, from the end": lambda p: s.Gather(table(2, 1, 40), e.Sub(p.back, c(20)), 2),
    "groups, sliced": lambda p: s.Slice(s.Reshape(six(p), (2, 3, p.size, p.size)), 1, 1, 3),
    "groups, sliced by a negative axis": lambda p: s.Slice(s.Reshape(six(p), (2, 3, p.size, p.size)), -3, 0, 3, 2),
    "the sum in bf16": lambda p: s.Sum(e.Add(e.Cast(p.q, "bf16"), heads(256, 1, 1, 1, dtype="bf16")), (0,)),
    "looked up from the end": lambda p: s.Gather(table(40), e.Sub(p.back, c(20))),
    "rows looked up": lambda p: s.Transpose(s.Gather(table(40, 3), e.Add(p.back, c(9)), 0), (2, 0, 1)),
    "looked up between": lambda p: s.Gather(table(2, 40, 1), p.at, 1),
    "a row for each": lambda p: s.Reshape(s.Transpose(s.Gather(table(20, 2), p.at), (1, 0)), (2, 1, p.size)),
    "all of them, looked up": lambda p: s.Gather(s.Broadcast(c(7), (p.size,)), s.Broadcast(p.k, (p.size, p.size))),
    "a place, looked up": lambda p: s.Gather(s.Iota(p.size), s.Reshape(e.Cast(p.k, "i32"), (p.size,))),
    "a later place, looked up": lambda p: s.Gather(
        e.Mul(s.Iota(p.size + 5), c(2)), s.Slice(s.Iota(p.size + 3), 0, 3, p.size + 3)
    ),
    "a place of heads, looked up": lambda p: s.Gather(e.Mul(p.k, heads(3, 5)), p.at, 2),
    "a diagonal": lambda p: s.Gather(p.causal, s.Iota(p.size), 0),
    "nothing in front": lambda p: e.Add(s.Concat((s.Iota(0), c([3])), 0), p.q),
    "some further than the length": lambda p: s.Slice(s.Iota(p.size * 2 + 3), 0, p.size + 3, p.size * 2 + 3),
    "one head, of an axis more": lambda p: s.Slice(s.Reshape(six(p), (6, 1, p.size, p.size)), 0, 4, 5),
    "one head, spread": lambda p: s.Slice(s.Broadcast(six(p), (2, 6, p.size, p.size)), 1, 4, 5),
    "heads, alone": lambda p: s.Concat((six(p),), 0),
    "the largest of one place": lambda p: s.Max(third(p), (0,)),
    "the least of one place": lambda p: s.Min(third(p), (0,)),
    "the largest of what falls": lambda p: s.Max(falling(p), (0,)),
    "the least of what falls": lambda p: s.Min(falling(p), (0,)),
    "counted of nothing": lambda p: e.Add(s.Sum(s.Cumsum(s.Broadcast(c(1), (p.size, 0)), 0), (1,)), p.q),
    "embedded": lambda p: Embed(table(20, 1, dtype="f32"), p.positions),
    "not followed, one group of heads": lambda p: s.Slice(s.Reshape(six(p), (2, 3, p.size, p.size)), 0, 1, 2),
    "not followed, of places": lambda p: s.GatherElements(both(p), s.Broadcast(p.k, (p.size, p.size)), 0),
}


def third(p: Pairs) -> Value:
    """[S]: 2 everywhere."""
    return s.Broadcast(s.Slice(s.Iota(p.size + 3), 0, 2, 3), (p.size,))


def falling(p: Pairs) -> Value:
    """[S]: -1, -2, ..."""
    return s.Cumsum(s.Broadcast(c(-1), (p.size,)), 0)


@pytest.mark.parametrize("name", READ)
def test_a_value_is_read_as_the_evaluator_computes_it(name: str) -> None:
    """For every pair, of texts of one token, of two, of some and of the most."""
    places = Pairs()
    value = READ[name](places)
    reader = places.reader(value)
    point = reader.pair(value)
    assert len(point.shape) == value.rank and point.dtype == value.dtype
    for length in (1, 2, 5, 9):
        expected = places.numbers(reader, value, length)
        found = places.read(reader, point, length)
        np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)
        assert found.dtype == numpy_dtype(value.dtype)


@pytest.mark.parametrize("name", [name for name in READ if not name.startswith("not followed")])
def test_what_can_be_followed_is_not_evaluated_for_every_pair(name: str) -> None:
    """So that it is known at any context, and of texts whose length matters: tables are those of constants alone."""
    places = Pairs()
    value = READ[name](places)
    reader = places.reader(value)
    stack = [reader.pair(value)]
    while stack:
        point = stack.pop()
        stack.extend(point.inputs)
        if isinstance(point, (Known, Table)):
            assert point.value is not None
            assert isinstance(point.value, Constant) or reader.probe.is_constant(point.value)


REFUSED: dict[str, tuple[Callable[[Pairs], Value], str]] = {
    "tokens": (lambda p: e.Add(p.token, p.token), "its mask depends on the input x"),
    "another op": (
        lambda p: s.Softmax(e.Add(p.token, p.token), 0), "its mask passes through t.softmax: tensor<[S, S], f32>",
    ),
    "places of no query": (
        lambda p: e.Add(s.Reshape(p.at, (p.size, 1, 1)), p.length),
        "its mask depends on a value of all tokens, tensor<[S, 1, 1], i64>",
    ),
    "positions of no query": (
        lambda p: e.Add(s.Reshape(p.positions, (p.size, 1, 1)), e.Cast(p.length, "i32")),
        "its mask depends on a value of all tokens, tensor<[S, 1, 1], i32>",
    ),
    "a square of the length": (
        lambda p: s.Slice(s.Iota(p.size * p.size + 1), 0, p.size * p.size, p.size * p.size + 1),
        "its mask depends on the size S*S",
    ),
    "some tokens": (
        lambda p: s.Reshape(s.Slice(s.Iota(p.size + 3), 0, p.size, p.size + 3), (3, 1, 1)),
        "its mask takes some tokens only: t.slice : tensor<[3], i64>",
    ),
    "put together": (
        lambda p: e.Add(s.Slice(s.Concat((p.length, p.k), 1), 1, 0, p.size), p.q),
        "its mask is put together along tokens: t.concat : tensor<[1, S + 1], i64>",
    ),
    "put together of no query": (
        lambda p: s.Max(s.Reshape(s.Concat((s.Slice(s.Iota(p.size + 1), 0, p.size, p.size + 1), p.at), 0),
                                  (p.size + 1, 1, 1)), (0,)),
        "its mask is reduced over tokens by t.max of tensor<[S + 1, 1, 1], i64>",
    ),
    "counted of pairs": (
        lambda p: s.Cumsum(e.Add(both(p), p.length), 0),
        "its mask sums along an axis that is not one of tokens: t.cumsum : tensor<[S, S], i64>",
    ),
    "counted of heads": (
        lambda p: s.Cumsum(e.Mul(e.Add(p.q, p.length), heads(1, 2)), 0),
        "its mask sums along an axis that is not one of tokens: t.cumsum : tensor<[2, S, 1], i64>",
    ),
    "counted lengths": (
        lambda p: s.Cumsum(s.Broadcast(p.length, (1, p.size)), 1),
        "its mask depends on the length by t.cumsum : tensor<[1, S], i64>",
    ),
    "the largest of pairs": (
        lambda p: s.Max(e.Sub(p.length, both(p)), (1,)),
        "its mask is reduced over tokens by t.max of tensor<[S, S], i64>",
    ),
    "the largest of both": (
        lambda p: s.Max(both(p), (0, 1)), "its mask is reduced over tokens by t.max of tensor<[S, S], i64>",
    ),
    "the largest square": (
        lambda p: s.Max(e.Mul(p.k, p.k), (1,)), "its mask is reduced over tokens by t.max of tensor<[1, S], i64>",
    ),
    "the largest of some": (
        lambda p: s.Max(s.Slice(s.Iota(p.size + 1), 0, 0, p.size + 1), (0,)),
        "its mask is reduced over tokens by t.max of tensor<[S + 1], i64>",
    ),
    "the largest from the length on": (
        lambda p: s.Max(s.Slice(s.Iota(p.size * 2), 0, p.size, p.size * 2), (0,)),
        "its mask is reduced over tokens by t.max of tensor<[S], i64>",
    ),
    "the sum of no heads": (
        lambda p: s.Sum(s.Broadcast(c(np.zeros((0, 1, 1)), "i64"), (0, p.size, 1)), (1,)),
        "its mask is reduced over tokens by t.sum of tensor<[0, S, 1], i64>",
    ),
    "the sum of nothing": (
        lambda p: s.Sum(s.Broadcast(c(1), (p.size, 0)), (0,)),
        "its mask is reduced over tokens by t.sum of tensor<[S, 0], i64>",
    ),
    "no rows": (
        lambda p: s.Sum(s.Gather(s.Broadcast(s.Reshape(p.length, (1,)), (p.size,)), c(np.zeros(0), "i64")), (0,)),
        "its mask looks up several rows of tensor<[S], i64> for each pair",
    ),
    "the sum of places": (
        lambda p: s.Sum(p.k, (1,)), "its mask is reduced over tokens by t.sum of tensor<[1, S], i64>",
    ),
    "the sum of floats": (
        lambda p: s.Sum(s.Broadcast(c(0.1), (1, p.size)), (1,)),
        "its mask is reduced over tokens by t.sum of tensor<[1, S], f32>",
    ),
    "the sum of heads": (
        lambda p: s.Sum(s.Broadcast(heads(1, 2), (2, p.size, 1)), (1,)),
        "its mask is reduced over tokens by t.sum of tensor<[2, S, 1], i64>",
    ),
    "the product of ones": (
        lambda p: s.Prod(s.Broadcast(c(1), (1, p.size)), (1,)),
        "its mask is reduced over tokens by t.prod of tensor<[1, S], i64>",
    ),
    "tokens merged": (
        lambda p: s.Reshape(e.Add(both(p), p.length), (1, p.size * p.size)),
        "its mask merges or splits tokens: t.reshape of tensor<[S, S], i64> to tensor<[1, S*S], i64>",
    ),
    "rows that differ": (
        lambda p: s.Gather(s.Broadcast(s.Reshape(p.length, (1,)), (p.size,)), e.Add(p.q, heads(0, 0))),
        "its mask looks up several rows of tensor<[S], i64> for each pair",
    ),
    "rows before the first": (
        lambda p: s.Gather(e.Add(p.at, s.Reshape(p.length, (1,))), e.Sub(p.q, c(1))),
        "its mask looks up tensor<[S], i64>, which is no table known when compiling",
    ),
    "rows by a remainder": (
        lambda p: s.Gather(e.Add(p.at, s.Reshape(p.length, (1,))), e.Mod(p.q, c(3))),
        "its mask looks up tensor<[S], i64>, which is no table known when compiling",
    ),
    "rows in few bits": (
        lambda p: s.Gather(e.Add(p.at, s.Reshape(p.length, (1,))), e.Cast(p.q, "i8")),
        "its mask looks up tensor<[S], i64>, which is no table known when compiling",
    ),
    "by two axes of tokens": (
        lambda p: s.Gather(table(40, 20), e.Add(p.at, s.Reshape(p.length, (1,)))),
        "its mask looks up a table tensor<[40, 20], i64> by two axes of tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_is_refused_by_its_name(name: str) -> None:
    places = Pairs()
    build, why = REFUSED[name]
    value = build(places)
    with pytest.raises(Unrecognised) as refused:
        places.reader(value).pair(value)
    assert str(refused.value) == why


def test_a_table_ends() -> None:
    """What is beyond its rows is no number of another one."""
    places = Pairs()
    row = s.Slice(table(12), 0, 0, places.size)
    looked_up = s.Gather(table(40), e.Add(places.back, c(9)))
    columns = s.Gather(table(3, 40), e.Add(places.back, c(9)), 1)
    reader = places.reader(row, looked_up, columns)
    zero = np.zeros((1, 1), np.int64)
    for value, query, key, why in (
        (row, 0, 11, ""), (row, 0, 12, "its mask has 12 rows, and row 12 is looked up"), (row, 0, 0, ""),
        (row, 0, -1, "its mask has 12 rows, and row -1 is looked up"), (looked_up, 30, 0, ""),
        (looked_up, 31, 0, "its mask looks up row 40 of 40"), (looked_up, 0, 49, ""),
        (looked_up, 0, 50, "its mask looks up row -41 of 40"), (columns, 30, 0, ""),
        (columns, 31, 0, "its mask looks up row 40 of 40"), (columns, 0, 50, "its mask looks up row -41 of 40"),
    ):  # fmt: skip
        point = reader.pair(value)
        if not why:
            assert reader.evaluate(point, zero + query, zero + key).shape == (1, 1, *point.shape)
            continue
        with pytest.raises(IRError, match=f"^{why}$"):
            reader.evaluate(point, zero + query, zero + key)


@pytest.mark.parametrize(("first", "refused"), [(0, False), (1, True), (2, True)])
def test_rows_that_may_be_before_the_first_are_not_looked_up(first: int, refused: bool) -> None:
    """A place counted from the end, for texts as short as a reader takes them to be."""
    places = Pairs()
    places.size = symbol("S", 3, 9)
    count = places.size - first
    rows = s.Slice(s.Iota(places.size * 2), 0, count - 1, 2 * count - 1 + first)
    value = s.Gather(
        e.Mul(s.Iota(places.size * 2), s.Slice(s.Iota(places.size + 1), 0, places.size, places.size + 1)), rows
    )
    reader = places.reader(value)
    if refused:
        with pytest.raises(Unrecognised, match="its mask looks up tensor<"):
            reader.pair(value)
    else:
        assert reader.pair(value).variables == {"key", "length"}


@pytest.mark.parametrize(("dtype", "most", "held"), [("i8", 127, True), ("i8", 128, False), ("u8", 255, True),
                                                     ("u8", 256, False), ("i64", 256, True)])  # fmt: skip
def test_places_in_a_dtype_that_is_too_narrow_are_not_counted_on(dtype: str, most: int, held: bool) -> None:
    """The greatest of 1, 2, ..., 127, -128, ... is not the last one, and no row is at -128."""
    places = Pairs(most)
    count = s.Cumsum(s.Broadcast(c(1, dtype), (places.size,)), 0)
    lengths = s.Slice(s.Iota(places.size + 1), 0, places.size, places.size + 1)
    rows = s.Gather(e.Add(s.Iota(places.size * 2), lengths), e.Cast(count, "i64"))
    for value, why in ((s.Max(count, (0,)), "is reduced over tokens"), (s.Min(count, (0,)), "is reduced over tokens"),
                       (rows, "looks up tensor<")):  # fmt: skip
        reader = places.reader(value)
        if not held:
            with pytest.raises(Unrecognised, match=why):
                reader.pair(value)
            continue
        for length in (1, most):
            expected = places.numbers(reader, value, length)
            found = places.read(reader, reader.pair(value), length)
            np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


def test_places_that_fall_in_a_narrow_dtype() -> None:
    for most, held in ((128, True), (129, False)):
        places = Pairs(most)
        value = s.Min(s.Cumsum(s.Broadcast(c(-1, "i8"), (places.size,)), 0), (0,))
        reader = places.reader(value)
        if held:
            assert reader.pair(value).variables == {"length"}
        else:
            with pytest.raises(Unrecognised, match="is reduced over tokens"):
                reader.pair(value)


def test_a_number_of_no_pair_is_one() -> None:
    """Of the longest text, unless lengths are given."""
    places = Pairs()
    reader = places.reader(places.length)
    zero = np.zeros((1, 1), np.int64)
    found = reader.evaluate(reader.pair(places.length), zero, zero)
    assert found.shape == (1, 1, 1, 1) and found.item() == 9


numbers = st.integers(-5, 5)
places = st.builds(Place, numbers, numbers, numbers, numbers)


@settings(max_examples=200, deadline=None)
@given(one=places, other=places, most=st.integers(1, 6))
def test_places_add_up_and_their_ends_are_those_of_all_pairs(one: Place, other: Place, most: int) -> None:
    def at(place: Place, q: int, k: int, size: int) -> int:
        return place.query * q + place.key * k + place.length * size + place.constant

    pairs = [(q, k, size) for size in range(1, most + 1) for q in range(size) for k in range(size)]
    values = [at(one, *pair) for pair in pairs]
    assert one.ends(most) == (min(values), max(values))
    both, further = one.moved(other), one.moved(3)
    assert [at(both, *pair) for pair in pairs] == [at(one, *pair) + at(other, *pair) for pair in pairs]
    assert [at(further, *pair) for pair in pairs] == [value + 3 for value in values]
    assert both == Place(*(getattr(one, n) + getattr(other, n) for n in ("query", "key", "length", "constant")))


# Axes that are merged or split together


def test_tokens_that_are_merged_with_axes_are_in_one_group_with_them() -> None:
    assert _groups((S, 2, 3), (S * 2, 3)) == [([0, 1, 2], [0, 1])]
    assert _groups((S * 2, 3), (S, 2, 3)) == [([0], [0, 1]), ([1], [2])]
    assert _groups((S,), (S, 1, 1)) == [([0], [0]), ([], [1]), ([], [2])]
    assert _groups((S, 1, 1), (S,)) == [([0], [0]), ([1], []), ([2], [])]


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of as many elements."""
    factors = draw(st.lists(st.integers(2, 3), max_size=5))
    shapes = []
    for _ in range(2):
        shape: list[int] = []
        for factor in factors:
            if shape and draw(st.booleans()):
                shape[-1] *= factor
            else:
                shape.append(factor)
        shapes.append(shape)
    return shapes[0], shapes[1]


@settings(max_examples=100, deadline=None)
@given(shapes=reshapes(), token=st.booleans(), data=st.data())
def test_axes_are_grouped_as_far_as_elements_say(
    shapes: tuple[list[int], list[int]], token: bool, data: st.DataObject
) -> None:
    """Every axis is in one group, in order; no group could be two. An axis of tokens is one beside itself."""
    old, new = (list[int | Dim](shape) for shape in shapes)
    ends = [set(itertools.accumulate(shape, operator.mul)) for shape in shapes]
    count = len(ends[0] & ends[1])
    if token:
        old, new = [*old, S], [*new, S]
        count += 1
    groups = _groups(tuple(old), tuple(new))
    assert len(groups) == count
    for side, shape in ((0, old), (1, new)):
        assert [axis for group in groups for axis in group[side]] == list(range(len(shape)))
    for left, right in groups:
        assert product(tuple(old[axis] for axis in left)) == product(tuple(new[axis] for axis in right))
    # Axes of size 1 change none of that.
    place = data.draw(st.integers(0, len(new)))
    wider = (*new[:place], 1, *new[place:])
    for a, b in ((tuple(old), wider), (wider, tuple(old))):
        groups = _groups(a, b)
        assert [axis for left, _ in groups for axis in left] == list(range(len(a)))
        assert [axis for _, right in groups for axis in right] == list(range(len(b)))
        for left, right in groups:
            assert product(tuple(a[axis] for axis in left)) == product(tuple(b[axis] for axis in right))
