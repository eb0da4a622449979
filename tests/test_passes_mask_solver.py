"""Masks of whole numbers, proved by a solver: what it says is so at every pair, what it refuses is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import z3
from mask_harness import Pairs

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Value
from llmc.compiler.passes.mask_solver import _Terms, proved_mask
from llmc.compiler.passes.masks import Mask, Unrecognised

c = e.constant
MOST = 40
UNLIKE = "its mask is not decided by the distance of key and query alone"
Build = Callable[[Pairs], Value]


def bias_of(seen: Value, hidden: float = -math.inf, shown: float = 0.0) -> Value:
    return e.Where(seen, c(shown), c(hidden))


def shown_by(p: Pairs, bias: Value) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Which keys a bias shows to the queries of the longest text."""
    reader = p.reader(bias)
    return p.numbers(reader, bias, p.most) > -5e3


def proved(p: Pairs, bias: Value, chosen: Value | None = None, exact_shift: bool = False) -> Mask:
    reader = p.reader(bias, *([] if chosen is None else [chosen]))
    return proved_mask(reader, reader.pair(bias), None if chosen is None else reader.pair(chosen), None, exact_shift)


def both(p: Pairs, other: Value) -> Value:
    return e.And(p.causal, other)


# Conditions on which keys are seen
PROVED: dict[str, tuple[Build, Mask]] = {
    "causal": (lambda p: p.causal, Mask(True, 0, None)),
    "less": (lambda p: e.Less(p.k, e.Add(p.q, c(1))), Mask(True, 0, None)),
    "greater": (lambda p: e.Greater(e.Add(p.q, c(1)), p.k), Mask(True, 0, None)),
    "not later": (lambda p: e.Not(e.Greater(p.k, p.q)), Mask(True, 0, None)),
    "one or another": (lambda p: e.Or(e.Less(p.k, p.q), e.Equal(p.k, p.q)), Mask(True, 0, None)),
    "all": (lambda p: e.Or(p.causal, e.NotEqual(p.k, p.q)), Mask(False, 0, None)),
    "all but what is never": (lambda p: e.NotEqual(p.k, c(MOST)), Mask(False, 0, None)),
    "a window": (lambda p: both(p, e.Less(p.back, c(7))), Mask(True, 7, None)),
    "a window of one": (lambda p: e.Equal(p.back, c(0)), Mask(True, 1, None)),
    "the longest window": (lambda p: both(p, e.Less(p.back, c(MOST - 1))), Mask(True, MOST - 1, None)),
    "a window of all": (lambda p: both(p, e.Less(p.back, c(MOST))), Mask(True, 0, None)),
    "on both sides": (lambda p: e.Less(e.Abs(p.back), c(7)), Mask(False, 7, None)),
    "the longest on both sides": (lambda p: e.Less(e.Abs(p.back), c(MOST - 1)), Mask(False, MOST - 1, None)),
    "a window by its largest": (
        lambda p: both(p, e.Less(e.Maximum(p.back, c(3)), c(7))), Mask(True, 7, None),
    ),
    "a window by its least": (lambda p: both(p, e.Greater(e.Minimum(e.Neg(p.back), c(3)), c(-7))), Mask(True, 7, None)),
    "the next on both sides": (lambda p: e.Less(e.Abs(p.back), c(2)), Mask(False, 2, None)),
    "by quotients too": (
        lambda p: both(p, e.GreaterEqual(e.Div(p.q, c(4)), e.Div(p.k, c(4)))), Mask(True, 0, None),
    ),
    "put together again": (
        lambda p: e.LessEqual(e.Add(e.Mul(e.FloorDivide(p.k, c(4)), c(4)), e.Mod(p.k, c(4))), p.q), Mask(True, 0, None),
    ),
    "put together of numbers below 0": (
        lambda p: e.GreaterEqual(
            e.Add(e.Mul(e.FloorDivide(p.back, c(4)), c(4)), e.Mod(p.back, c(4))), c(0)
        ),
        Mask(True, 0, None),
    ),
    "put together of numbers below 0, rounded to 0": (
        lambda p: e.GreaterEqual(e.Add(e.Mul(e.Div(p.back, c(4)), c(4)), e.Fmod(p.back, c(4))), c(0)),
        Mask(True, 0, None),
    ),
    "a quotient rounded to 0": (lambda p: both(p, e.Equal(e.Div(p.back, c(7)), c(0))), Mask(True, 7, None)),
    "a quotient rounded to 0 on both sides": (lambda p: e.Equal(e.Div(p.back, c(7)), c(0)), Mask(False, 7, None)),
    "a quotient rounded down": (lambda p: e.Equal(e.FloorDivide(p.back, c(7)), c(0)), Mask(True, 7, None)),
    "a rest that is what is divided": (lambda p: both(p, e.Equal(e.Mod(p.back, c(MOST)), p.back)), Mask(True, 0, None)),
    "a rest of the sign of what is divided": (
        lambda p: e.GreaterEqual(e.Fmod(p.back, c(MOST)), c(0)), Mask(True, 0, None),
    ),
    "a choice": (
        lambda p: e.Equal(e.Where(p.causal, c(1), c(0)), c(1)), Mask(True, 0, None),
    ),
    "a choice of places": (lambda p: e.LessEqual(e.Where(p.causal, p.k, c(MOST)), p.q), Mask(True, 0, None)),
    "truth as a number": (lambda p: e.Greater(e.Cast(p.causal, "i32"), c(0, "i32")), Mask(True, 0, None)),
    "a number as truth": (lambda p: e.Cast(e.Maximum(e.Add(p.back, c(1)), c(0)), "bool"), Mask(True, 0, None)),
    "a number below 0 as truth": (lambda p: e.Not(e.Cast(e.Minimum(p.back, c(0)), "bool")), Mask(True, 0, None)),
    "the same truth": (lambda p: e.Equal(p.causal, e.LessEqual(p.k, c(MOST))), Mask(True, 0, None)),
    "another truth": (lambda p: e.NotEqual(p.causal, e.Greater(p.k, c(MOST))), Mask(True, 0, None)),
    "truth that is known": (lambda p: both(p, e.Equal(c(True), c(True))), Mask(True, 0, None)),
    "cast": (lambda p: e.LessEqual(e.Cast(p.k, "i8"), e.Cast(p.q, "i8")), Mask(True, 0, None)),
    "moved": (
        lambda p: s.Transpose(s.Broadcast(e.GreaterEqual(p.k, p.q), (p.size, p.size)), (1, 0)), Mask(True, 0, None),
    ),
    "moved and cast": (
        lambda p: e.LessEqual(s.Reshape(e.Cast(p.k, "i32"), (1, 1, p.size)), s.Reshape(e.Cast(p.q, "i32"),
                                                                                      (1, p.size, 1))),
        Mask(True, 0, None),
    ),
    "before the end": (lambda p: both(p, e.Less(p.k, p.length)), Mask(True, 0, None)),
    "the length alone": (lambda p: both(p, e.GreaterEqual(p.length, c(1))), Mask(True, 0, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVED)
def test_what_is_proved_is_so_at_every_pair(name: str) -> None:
    places = Pairs(MOST)
    build, mask = PROVED[name]
    bias = bias_of(build(places))
    assert proved(places, bias) == mask
    at = np.arange(MOST)
    np.testing.assert_array_equal(mask.shows(at - at[:, None]), np.squeeze(shown_by(places, bias)))


WHOLE: dict[str, Build] = {
    "sums": lambda p: e.Sub(e.Add(p.q, p.q), p.k),
    "products": lambda p: e.Mul(p.back, e.Neg(p.k)),
    "absolute": lambda p: e.Abs(p.back),
    "the greater": lambda p: e.Maximum(p.back, c(2)),
    "the less": lambda p: e.Minimum(c(2), p.back),
    "a quotient": lambda p: e.Div(p.back, c(3)),
    "a quotient rounded down": lambda p: e.FloorDivide(p.back, c(3)),
    "a rest": lambda p: e.Mod(p.back, c(3)),
    "a rest of the other sign": lambda p: e.Fmod(p.back, c(3)),
    "over 1": lambda p: e.Add(e.Div(p.back, c(1)), e.Mod(p.back, c(1))),
    "truth": lambda p: e.Cast(p.causal, "i64"),
    "a choice": lambda p: e.Where(p.causal, p.q, p.k),
    "a length": lambda p: e.Sub(p.length, p.k),
    "moved": lambda p: s.Reshape(s.Transpose(p.back, (1, 0)), (1, p.size, p.size)),
    "cast": lambda p: e.Cast(e.Cast(p.back, "i8"), "i32"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_term_is_what_the_evaluator_computes(name: str) -> None:
    places = Pairs(MOST)
    value = WHOLE[name](places)
    reader = places.reader(value)
    terms = _Terms(reader)
    term = terms.whole(reader.pair(value))
    for length in (1, 2, 9):
        numbers = np.broadcast_to(places.numbers(reader, value, length), (1, length, length))[0]
        for query, key in np.ndindex(length, length):
            at = [(terms.query, query), (terms.key, key), (terms.length, length)]
            given = [(place, z3.IntVal(number)) for place, number in at]
            assert z3.simplify(z3.substitute(term, *given)).as_long() == numbers[query, key]


# Ways of making a bias of conditions
BIASES: dict[str, Build] = {
    "a choice": lambda p: bias_of(p.causal),
    "the other way": lambda p: e.Where(e.Greater(p.k, p.q), c(-math.inf), c(0.0)),
    "just hidden": lambda p: bias_of(p.causal, -5000.0),
    "hidden by numbers": lambda p: e.Where(p.causal, c(0.0), e.Where(e.Less(p.k, c(9)), c(-1e4), c(-2e4))),
    "shifted": lambda p: bias_of(p.causal, -6e3, 1000.0),
    "shifted to where others are hidden": lambda p: bias_of(p.causal, -9999.0, -4999.0),
    "times": lambda p: e.Mul(e.Cast(e.Not(p.causal), "f32"), c(-1e9)),
    "one less": lambda p: e.Mul(e.Sub(c(1.0), e.Cast(p.causal, "f32")), c(-1e9)),
    "added": lambda p: e.Add(bias_of(p.causal, -1e9), bias_of(e.Less(p.q, c(MOST)), -1e9)),
    "the least": lambda p: e.Minimum(bias_of(p.causal, -1e9), bias_of(e.GreaterEqual(p.k, c(0)), -1e9)),
    "the greatest": lambda p: e.Maximum(bias_of(p.causal, -1e9), bias_of(p.causal, -1e8)),
    "cast": lambda p: e.Cast(e.Cast(bias_of(p.causal, -1e9), "f64"), "f32"),
    "moved": lambda p: s.Reshape(s.Broadcast(bias_of(p.causal), (1, 1, p.size, p.size)), (p.size, p.size)),
    "never": lambda p: e.Where(e.Less(p.k, c(0)), c(3.0), bias_of(p.causal)),
    "the same from both": lambda p: e.Where(
        e.Less(e.Mod(p.k, c(3)), c(1)), bias_of(p.causal, -1e9), bias_of(p.causal, -1e9)
    ),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("exact_shift", [False, True])
def test_a_bias_of_conditions_hides_what_it_hides(name: str, exact_shift: bool) -> None:
    places = Pairs(MOST)
    bias = BIASES[name](places)
    if exact_shift and name.startswith("shifted"):
        with pytest.raises(Unrecognised, match=r"^its mask adds a number to all keys of a query, which counts"):
            proved(places, bias, exact_shift=True)
    else:
        assert proved(places, bias, exact_shift=exact_shift) == Mask(True, 0, None)


REFUSED: dict[str, tuple[Build, str]] = {
    "a key ahead of the first query": (
        lambda p: bias_of(e.Or(p.causal, e.And(e.Equal(p.q, c(0)), e.Equal(p.k, c(1))))),
        f"{UNLIKE}: the query at ",
    ),
    "bf16 as whole numbers": (
        lambda p: bias_of(both(p, e.Less(e.Cast(e.Cast(p.k, "bf16"), "i64"), c(2)))),
        f"{UNLIKE}: t.cast is not followed",
    ),
    "an element of several": (
        lambda p: s.Slice(e.Where(p.causal, c(np.zeros((2, 1, 1)), "f32"), c(-math.inf)), 0, 1, 2), UNLIKE,
    ),
    "an element that is not there": (
        lambda p: e.Add(bias_of(p.causal), s.Gather(c([[0.0], [2.0]], "f32"), c([7], "i64"), 0)),
        "its mask cannot be evaluated: ",
    ),
    "a key ahead": (
        lambda p: bias_of(e.LessEqual(e.Add(p.k, e.Cast(e.Equal(p.q, c(9)), "i64")), p.q)),
        f"{UNLIKE}: the query at 9 and the key at 9 of ",
    ),
    "its own place": (lambda p: bias_of(e.Less(p.k, p.q)), f"{UNLIKE}: the query at "),
    "a hole": (lambda p: bias_of(both(p, e.NotEqual(p.k, c(3)))), f"{UNLIKE}: the query at "),
    "a key for the longest": (
        lambda p: bias_of(e.LessEqual(p.k, e.Add(p.q, e.Div(p.length, c(MOST))))), f"{UNLIKE}: the query at ",
    ),
    "not for the shortest": (
        lambda p: bias_of(e.Or(p.causal, e.Equal(p.length, c(1)))), "",
    ),
    "a window for long ones": (
        lambda p: bias_of(both(p, e.Or(e.Less(p.back, c(7)), e.Less(p.length, c(MOST))))), f"{UNLIKE}: the query at ",
    ),
    "one side longer": (
        lambda p: bias_of(e.And(e.Less(p.back, c(7)), e.Greater(p.back, c(-6)))), f"{UNLIKE}: the query at ",
    ),
    "two numbers": (
        lambda p: e.Where(e.Less(p.k, c(3)), c(1.0), bias_of(p.causal)), f"{UNLIKE}: it adds 0, 1",
    ),
    "not hidden": (lambda p: bias_of(p.causal, -4999.0), f"{UNLIKE}: it adds -4999, 0"),
    "shifted below": (lambda p: bias_of(p.causal, -6000.0, -1001.0), f"{UNLIKE}: it adds -1001"),
    "all are hidden": (lambda p: bias_of(p.causal, -1e4, -1e4), f"{UNLIKE}: it adds "),
    "infinite": (lambda p: bias_of(p.causal, -1e4, math.inf), f"{UNLIKE}: it adds inf"),
    "no number": (lambda p: bias_of(p.causal, -1e4, math.nan), f"{UNLIKE}: it adds nan"),
    "too much": (lambda p: bias_of(p.causal, -1e9, 1.1e6), f"{UNLIKE}: it adds 1.1e+06"),
    "floats of places": (lambda p: e.Cast(p.back, "f32"), f"{UNLIKE}: t.cast is not followed"),
    "another op": (lambda p: e.Sqrt(e.Cast(p.causal, "f32")), f"{UNLIKE}: t.sqrt is not followed"),
    "floats compared": (
        lambda p: bias_of(e.Less(e.Cast(p.k, "f32"), c(3.0))), f"{UNLIKE}: t.lt is not followed",
    ),
    "places looked up": (
        lambda p: bias_of(s.Slice(c(np.arange(MOST)[None] < 9), 1, 0, p.size)), f"{UNLIKE}: a table is not followed",
    ),
    "places looked up, compared": (
        lambda p: bias_of(e.Less(s.Slice(c(np.arange(MOST)[None]), 1, 0, p.size), c(3))),
        f"{UNLIKE}: a table is not followed",
    ),
    "a table": (lambda p: s.Slice(c(np.ones((1, MOST)), "f32"), 1, 0, p.size), UNLIKE),
    "by a place": (
        lambda p: bias_of(e.Less(e.Div(p.q, e.Add(p.k, c(1))), c(3))),
        f"{UNLIKE}: t.div by what is no number above 0 is not followed",
    ),
    "by 0": (
        lambda p: bias_of(e.Less(e.FloorDivide(p.q, c(0)), c(3))),
        f"{UNLIKE}: t.floor_div by what is no number above 0 is not followed",
    ),
    "by a number below 0": (
        lambda p: bias_of(e.Less(e.Mod(p.q, c(-3)), c(3))),
        f"{UNLIKE}: t.mod by what is no number above 0 is not followed",
    ),
    "another function of whole numbers": (
        lambda p: bias_of(e.Less(e.Pow(p.back, c(2)), c(3))), f"{UNLIKE}: t.pow is not followed",
    ),
    "too large": (
        lambda p: bias_of(e.LessEqual(e.Mul(e.Cast(p.k, "i8"), c(4, "i8")), c(99, "i8"))),
        "its mask computes numbers that do not fit i8",
    ),
    "too small": (
        lambda p: bias_of(e.LessEqual(e.Mul(e.Cast(p.k, "i8"), c(-4, "i8")), c(99, "i8"))),
        "its mask computes numbers that do not fit i8",
    ),
    "too small at no limit": (
        lambda p: bias_of(e.LessEqual(e.Mul(e.Cast(p.k, "i8"), c(-5, "i8")), c(99, "i8"))),
        "its mask computes numbers that do not fit i8",
    ),
    "cast to too few bits": (
        lambda p: bias_of(e.LessEqual(e.Cast(e.Mul(p.k, c(4)), "i8"), c(99, "i8"))),
        "its mask computes numbers that do not fit i8",
    ),
    "below 0 without a sign": (
        lambda p: bias_of(e.LessEqual(e.Cast(p.back, "u8"), c(99, "u8"))),
        "its mask computes numbers that do not fit u8",
    ),
    "many numbers": (
        lambda p: sum_of(*(bias_of(e.Less(p.k, c(i)), float(2**i)) for i in range(5))), UNLIKE,
    ),
}  # fmt: skip


def sum_of(first: Value, *others: Value) -> Value:
    for other in others:
        first = e.Add(first, other)
    return first


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proved_is_refused(name: str) -> None:
    places = Pairs(MOST)
    build, why = REFUSED[name]
    bias = build(places)
    if not why:  # of one token, no key is later
        assert proved(places, bias) == Mask(True, 0, None)
        return
    with pytest.raises(Unrecognised) as refused:
        proved(places, bias)
    assert str(refused.value) == why or (
        why.endswith(("at ", "of ", "adds ", "evaluated: ")) and str(refused.value).startswith(why)
    )


def test_sixteen_numbers_are_followed() -> None:
    places = Pairs(MOST)
    four = sum_of(*(bias_of(e.Less(places.k, c(i)), float(2**i)) for i in range(4)))
    found = e.Add(e.Mul(four, c(0.0)), bias_of(places.causal))
    assert proved(places, found) == Mask(True, 0, None)


def test_seventeen_numbers_are_not() -> None:
    places = Pairs(MOST)
    found: Value = c(0.0)
    for i in range(16):
        found = e.Where(e.Less(places.k, c(i)), c(-1e4 - i), found)
    assert proved(places, bias_of(places.causal, -1e9)) == Mask(True, 0, None)
    with pytest.raises(Unrecognised, match=f"^{UNLIKE}$"):
        proved(places, e.Add(found, c(0.0)))


def test_a_bias_that_hides_nothing_is_no_mask() -> None:
    places = Pairs(MOST)
    assert proved(places, bias_of(places.causal, 2.0, 2.0)) == Mask(False, 0, None)


def test_a_product_counts_where_keys_are_seen() -> None:
    places = Pairs(MOST)
    bias = bias_of(places.causal)
    assert proved(places, bias, places.causal) == Mask(True, 0, None)
    assert proved(places, bias, e.Less(places.k, e.Add(places.q, c(3)))) == Mask(True, 0, None)
    for chosen in (e.Less(places.k, places.q), both(places, e.NotEqual(places.k, c(MOST - 1)))):
        with pytest.raises(Unrecognised, match=r"^t\.where puts a number that does not hide the key"):
            proved(places, bias, chosen)


def test_heads_and_factors_are_not_followed() -> None:
    places = Pairs(MOST)
    why = f"^{UNLIKE}, and 40 tokens are too many to look at every pair$"
    two = e.Mul(bias_of(places.causal, -1e9), c(np.reshape([1.0, 2.0], (2, 1, 1)), "f32"))
    spread = e.And(places.causal, s.Broadcast(c(np.reshape([True, True], (2, 1, 1)), "bool"), (2, 1, 1)))
    bias = bias_of(places.causal)
    for given in ((two, None, None), (bias, spread, None), (bias, None, bias)):
        reader = places.reader(*(value for value in given if value is not None))
        points = [None if value is None else reader.pair(value) for value in given]
        with pytest.raises(Unrecognised, match=why):
            proved_mask(reader, *points, exact_shift=False)  # type: ignore[arg-type]
