"""Masks over long contexts: what is a function of distance, what a solver proves, and what depends on the length."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from attention_harness import weight
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_harness import run_checked

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.ragged import RelativeBias
from llmc.compiler.ir.types import Array, Tensor
from llmc.compiler.passes.causality import attends_causally
from llmc.compiler.passes.distances import Distances
from llmc.compiler.passes.fuse_attention import FuseAttention
from llmc.compiler.passes.manager import Report
from llmc.compiler.passes.masks import HIDDEN, Mask, Unrecognised, describe_mask
from llmc.compiler.passes.pair_functions import PairReader
from llmc.compiler.passes.probe import Probe, reading

LONG = 131_072  # too many for every pair: 1.7e10
SLOPES = [0.125, 0.3125]


def length_over(p: Places, by: int) -> Value:
    """The length over a number, rounded down, as sizes are written: the element of a count that it is the index of."""
    size = p.size // by
    return s.Slice(s.Iota(size + 1), 0, size, size + 1)


class Places:
    """Queries [S, 1], keys [1, S] and the length of texts of at most `most` tokens."""

    def __init__(self, most: int, dtype: str = "i64") -> None:
        self.most = most
        self.size = symbol("S", 1, most)
        at = s.Iota(self.size, dtype)
        self.q, self.k = s.Reshape(at, (self.size, 1)), s.Reshape(at, (1, self.size))
        self.length = s.Slice(s.Iota(self.size + 1), 0, self.size, self.size + 1)
        self.back = e.Sub(self.q, self.k)

    @property
    def causal(self) -> Value:
        return e.LessEqual(self.k, self.q)

    def graph(self, scores: Callable[[Value], Value], keeps: Callable[[Value], Value] = lambda x: x) -> Graph:
        """One attention of two heads of a text."""
        inputs = [Input(name, Tensor((1, self.size), "i32")) for name in ("ids", "positions")]
        x = Input("x", Tensor((1, 2, self.size, 4), "f32"))
        raw = s.Matmul(x, s.Transpose(x, (0, 1, 3, 2)))
        return Graph("g", (*inputs, x), (("out", s.Matmul(keeps(s.Softmax(scores(raw), 3)), x)),))


def fill(seen: Value, number: float = -1e9) -> Callable[[Value], Value]:
    return lambda raw: e.Where(seen, raw, e.constant(number))


def add(bias: Value) -> Callable[[Value], Value]:
    return lambda raw: e.Add(raw, bias)


def per_head(*numbers: float) -> Value:
    return e.constant(np.reshape(numbers, (-1, 1, 1)), "f32")


def outcome(places: Places, scores: Callable[[Value], Value]) -> Attention | str:
    """The attention that becomes of scores, or why none does."""
    report = Report()
    after = FuseAttention().run(places.graph(scores), report)
    found = [op for op in after.ops if isinstance(op, Attention)]
    return found[0] if found else report.refusals[0][1]


def said(places: Places, scores: Callable[[Value], Value]) -> Mask:
    found = outcome(places, scores)
    assert isinstance(found, Attention), found
    assert found.bias is None
    slopes = None if found.slopes is None else tuple(found.slopes.value.array.tolist())  # type: ignore[union-attr]
    return Mask(found.causal, found.window, slopes)


def quotient(x: Value, by: int) -> Value:
    return e.Div(x, e.constant(by))


# What a mask is at 131,072 tokens, and at 300, where every pair is looked at if need be.
SEEN: dict[str, tuple[Callable[[Places], Value], Mask]] = {
    "causal": (lambda p: p.causal, Mask(True, 0, None)),
    "written as a difference": (lambda p: e.GreaterEqual(p.back, e.constant(0)), Mask(True, 0, None)),
    "window": (lambda p: e.And(p.causal, e.Less(p.back, e.constant(100))), Mask(True, 100, None)),
    "by quotients too": (
        lambda p: e.And(p.causal, e.GreaterEqual(quotient(p.q, 64), quotient(p.k, 64))),
        Mask(True, 0, None),
    ),
    "a place put together again": (
        lambda p: e.LessEqual(
            e.Add(e.Mul(e.FloorDivide(p.k, e.constant(64)), e.constant(64)), e.Mod(p.k, e.constant(64))), p.q
        ),
        Mask(True, 0, None),
    ),
    "by a length": (lambda p: e.And(p.causal, e.Less(p.k, p.length)), Mask(True, 0, None)),
    "by the number of ones": (
        lambda p: e.And(p.causal, e.Less(p.k, s.Sum(s.Broadcast(e.constant(1), (1, p.size)), (1,)))),
        Mask(True, 0, None),
    ),
    "by the largest place": (
        lambda p: e.And(p.causal, e.LessEqual(p.k, s.Max(p.k, (1,)))),
        Mask(True, 0, None),
    ),
    "or never": (lambda p: e.Or(p.causal, e.Equal(p.k, e.constant(-1))), Mask(True, 0, None)),
    "a number that is none": (
        lambda p: e.Equal(e.Where(p.causal, e.constant(1), e.constant(0)), e.constant(1)),
        Mask(True, 0, None),
    ),
    "fraction": (
        lambda p: e.And(p.causal, e.Less(e.Div(e.Cast(p.back, "f32"), e.constant(128.0)), e.constant(1.0))),
        Mask(True, 128, None),
    ),
    "both sides": (lambda p: e.Less(e.Abs(p.back), e.constant(33)), Mask(False, 33, None)),
}


@pytest.mark.parametrize("most", [300, LONG])
@pytest.mark.parametrize("name", SEEN)
def test_a_mask_is_known_whatever_the_context(name: str, most: int) -> None:
    places = Places(most)
    seen, mask = SEEN[name]
    assert said(places, fill(seen(places))) == mask


UNLIKE: dict[str, Callable[[Places], Value]] = {
    "block-local": lambda p: e.And(p.causal, e.Less(e.Sub(quotient(p.q, 32), quotient(p.k, 32)), e.constant(4))),
    "chunks": lambda p: e.And(p.causal, e.Equal(quotient(p.q, 64), quotient(p.k, 64))),
    "global keys": lambda p: e.And(
        p.causal, e.Or(e.Less(p.back, e.constant(16)), e.Equal(e.Mod(p.k, e.constant(50)), e.constant(49)))
    ),
    "first keys": lambda p: e.And(p.causal, e.Or(e.Less(p.back, e.constant(16)), e.Less(p.k, e.constant(4)))),
    "one key far away": lambda p: e.And(p.causal, e.NotEqual(p.k, e.constant(p.most - 3))),
    "one query far away": lambda p: e.And(p.causal, e.NotEqual(p.q, e.constant(p.most - 3))),
    "by a length": lambda p: e.And(p.causal, e.Less(e.Sub(p.length, p.k), e.constant(100))),
    "by distance and length": lambda p: e.LessEqual(e.Add(p.k, p.length), e.Add(p.q, e.constant(150))),
    "within a seventh of the length": lambda p: e.And(p.causal, e.LessEqual(e.Sub(p.q, p.k), length_over(p, 7))),
    "ahead for the longest": lambda p: e.LessEqual(p.k, e.Add(p.q, e.Div(p.length, e.constant(p.most)))),
}


@pytest.mark.parametrize("most", [300, LONG])
@pytest.mark.parametrize("name", UNLIKE)
def test_a_mask_that_is_another_somewhere_is_refused(name: str, most: int) -> None:
    places = Places(most)
    assert isinstance(outcome(places, fill(UNLIKE[name](places))), str)


@pytest.mark.parametrize(
    ("dtype", "most", "exact"),
    [("f16", 2049, True), ("f16", 2051, False), ("bf16", 257, True), ("bf16", 259, False), ("i16", 32_768, True),
     ("i16", 32_770, False)],
)  # fmt: skip
def test_places_are_what_their_dtype_holds(dtype: str, most: int, exact: bool) -> None:
    """In f16, 2,049 is 2,048: the query there sees the key after it."""
    places = Places(most)
    found = outcome(places, fill(e.LessEqual(e.Cast(places.k, dtype), e.Cast(places.q, dtype))))
    assert isinstance(found, Attention) == exact


def test_products_that_overflow_are_followed() -> None:
    """A square of i32 is negative from 46,341 on: those keys are seen again."""
    places = Places(LONG, "i32")
    near = e.Less(e.Mul(places.back, places.back), e.constant(2_000_000, "i32"))
    found = outcome(places, fill(e.And(places.causal, near)))
    assert isinstance(found, Attention) and isinstance(found.bias, RelativeBias) and found.causal


@pytest.mark.parametrize("most", [300, LONG])
def test_slopes_by_distance_and_by_key_are_alibi(most: int) -> None:
    places = Places(most)
    slopes = per_head(*SLOPES)
    expected = Mask(True, 0, tuple(SLOPES))
    by_distance = e.Mul(slopes, e.Cast(e.Neg(places.back), "f32"))
    by_key = e.Mul(slopes, e.Cast(places.k, "f32"))
    from_the_end = e.Mul(slopes, e.Cast(e.Sub(places.k, places.length), "f32"))
    hidden = e.Where(places.causal, e.constant(0.0), e.constant(-1e9))
    for bias in (by_distance, by_key, from_the_end):
        assert said(places, add(e.Add(bias, hidden))) == expected
        assert said(places, add(e.Where(places.causal, bias, e.constant(-math.inf)))) == expected


def test_a_number_that_slopes_outgrow_does_not_hide() -> None:
    """0.3125 a key, less 1e4: a key 60,000 later has more weight than the query's own."""
    for most, hides in ((8_000, True), (60_000, False)):
        places = Places(most)
        bias = e.Mul(per_head(*SLOPES), e.Cast(places.k, "f32"))
        hidden = e.Where(places.causal, e.constant(0.0), e.constant(-1e4))
        assert isinstance(outcome(places, add(e.Add(bias, hidden))), Attention) == hides


def test_two_branches_are_not_shifted_by_one_number() -> None:
    """slope * key in one branch and 2 * slope * key in the other: rows are no functions of distance."""
    places = Places(300)
    key = e.Cast(places.k, "f32")
    near = e.Less(places.back, e.constant(5))
    bias = e.Where(near, e.Mul(per_head(*SLOPES), key), e.Mul(per_head(0.25, 0.5), key))
    assert isinstance(outcome(places, add(e.Where(places.causal, bias, e.constant(-1e9)))), str)


def test_a_band_ahead_is_not_causal() -> None:
    """Two keys ahead are seen, all others after the query are not."""
    places = Places(300)
    found = outcome(places, fill(e.GreaterEqual(places.back, e.constant(-2))))
    assert isinstance(found, Attention) and not found.causal and isinstance(found.bias, RelativeBias)


def stored_by_distance(p: Places) -> Value:
    """Every third key back, of a stored table for 200 tokens, sliced to the sequence."""
    at = np.arange(200)
    table = e.constant(np.where((at[:, None] - at) % 3 == 0, 0.5, -1.0)[None], "f32")
    return s.Slice(s.Slice(table, 1, 0, p.size), 2, 0, p.size)


@pytest.mark.parametrize(
    "bias",
    [
        lambda p: e.Maximum(e.Mul(per_head(-0.125, -0.0625), e.Cast(p.back, "f32")), e.constant(-4.5)),
        lambda p: e.Where(
            e.Less(p.back, e.constant(np.reshape([16, 64], (2, 1, 1)))), e.constant(0.0), e.constant(-1e9)
        ),
        lambda p: e.Neg(e.Log(e.Add(e.Abs(e.Cast(p.back, "f32")), e.constant(1.0)))),
        lambda p: stored_by_distance(p),
        lambda p: s.Gather(
            e.constant(np.cumsum(np.ones((2, 400)), 1) ** [[0.5], [0.25]], "f32"), e.Add(p.back, e.constant(150)), 1
        ),
    ],
    ids=["clamped", "windows", "logarithm", "stored", "looked up"],
)
@pytest.mark.parametrize("most", [65, 129])
def test_a_table_of_distances_says_what_the_bias_says(bias: Callable[[Places], Value], most: int) -> None:
    """At every distance, by the pass harness at several sizes, and in the table itself."""
    places = Places(most)
    scores = add(e.Add(bias(places), e.Where(places.causal, e.constant(0.0), e.constant(-math.inf))))
    after, _ = run_checked(places.graph(scores), "fuse-attention")
    (op,) = [op for op in after.ops if isinstance(op, Attention)]
    assert op.causal and isinstance(op.bias, RelativeBias)
    probe = Probe(after, places.size)
    found, expected = probe.evaluate([op.bias, bias(places)], most)
    lower = np.tril(np.ones((most, most), bool))
    expected = np.broadcast_to(expected, found.shape)
    np.testing.assert_allclose(found[:, lower], np.maximum(expected, -1e28)[:, lower], rtol=1e-6, atol=1e-6)


def test_a_table_of_weights_needs_no_numbers() -> None:
    """Buckets of distances: whether later keys are hidden is read off the weights where they can be."""
    places = Places(300)
    table = weight("buckets", 2, 599)
    bias = s.Gather(table, e.Add(places.back, e.constant(299)), 1)
    unread = outcome(places, add(bias))
    assert isinstance(unread, Attention) and isinstance(unread.bias, RelativeBias) and not unread.causal
    numbers = np.where(np.arange(599) < 299, -np.inf, 0.5 * np.arange(599) ** 0.5)  # back < 0: a later key
    with reading(lambda name: np.stack([numbers, numbers]).astype(np.float32)):
        read = outcome(places, add(bias))
    assert isinstance(read, Attention) and isinstance(read.bias, RelativeBias) and read.causal


def test_equal_masks_of_layers_are_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    numbers = Distances.numbers

    def counted(self: Distances, point: object) -> object:
        asked.append(point)
        return numbers(self, point)  # type: ignore[arg-type]

    monkeypatch.setattr(Distances, "numbers", counted)
    places = Places(300)
    x = Input("x", Tensor((1, 2, places.size, 4), "f32"))
    inputs = [Input(name, Tensor((1, places.size), "i32")) for name in ("ids", "positions")]
    value: Value = x
    for _ in range(6):
        again = Places(300)  # every layer builds its mask anew
        raw = s.Matmul(value, s.Transpose(value, (0, 1, 3, 2)))
        value = s.Matmul(s.Softmax(fill(again.causal)(raw), 3), value)
    report = Report()
    FuseAttention().run(Graph("g", (*inputs, x), (("out", value),)), report)
    assert report.hits["attention"] == 6 and len(asked) == 2, "the bias and where it counts"


# Guards


def guarded(places: Places, seen: Value, guard: Callable[[Value], Value]) -> Graph:
    masked = fill(seen, -math.inf)
    raw: list[Value] = []

    def scores(products: Value) -> Value:
        raw.append(masked(products))
        return raw[0]

    return places.graph(scores, lambda shares: e.Where(guard(raw[0]), e.constant(0.0), shares))


def test_guards_that_hold_for_seen_rows_are_refused() -> None:
    places = Places(300)
    size, seen = places.size, places.causal
    late = s.Reshape(e.GreaterEqual(places.q, e.constant(100)), (1, 1, size, 1))
    none = e.constant(-math.inf)
    guards: dict[str, tuple[Callable[[Value], Value], bool]] = {
        "a query far away": (lambda x: late, False),
        "all hidden": (lambda x: s.All(e.Equal(x, none), (3,)), True),
        "none above": (lambda x: e.Not(s.Any(e.Greater(x, none), (3,))), True),
        "not any seen": (lambda x: e.Not(s.Any(seen, (1,))), True),
        "some hidden": (lambda x: s.Any(e.Equal(x, none), (3,)), False),
        "all seen": (lambda x: s.All(seen, (1,)), False),
        "all hidden or late": (lambda x: e.Or(late, s.All(e.Equal(x, none), (3,))), False),
        "all hidden and late": (lambda x: e.And(late, s.All(e.Equal(x, none), (3,))), True),
        "the least is low": (lambda x: e.LessEqual(s.Max(x, (3,)), e.constant(-3.0)), False),
    }
    for name, (guard, vanishes) in guards.items():
        report = Report()
        FuseAttention().run(guarded(places, seen, guard), report)
        assert (report.refusals == []) == vanishes, name


# Texts that are causal


def test_a_text_is_causal_where_every_attention_is_shown_to_be() -> None:
    places = Places(300)
    at_three = e.Mul(e.Cast(e.Equal(places.q, e.constant(3)), "i64"), e.Cast(e.NotEqual(places.k, places.q), "i64"))
    clipped: Callable[[Value], Value] = lambda raw: e.Minimum(raw, e.constant(9.0))  # noqa: E731
    seen = {
        "filled": (fill(places.causal), True),
        "clipped, then filled": (lambda x: fill(places.causal)(clipped(x)), True),
        "clipped, then added": (
            lambda x: e.Add(clipped(x), e.Where(places.causal, e.constant(0.0), e.constant(-1e9))), True,
        ),
        "filled, then clipped": (lambda x: clipped(fill(places.causal)(x)), False),
        "chunks": (fill(UNLIKE["chunks"](places)), True),
        "a hole": (fill(e.LessEqual(e.Add(places.k, at_three), places.q)), True),
        "a key ahead": (fill(e.LessEqual(e.Sub(places.k, at_three), places.q)), False),
        "two ahead": (fill(e.GreaterEqual(places.back, e.constant(-2))), False),
        "not its own place": (fill(e.Less(places.k, places.q)), False),
        "not hidden enough": (fill(places.causal, -9.0), False),
        "all": (clipped, False),
    }  # fmt: skip
    for name, (scores, causal) in seen.items():
        graph = FuseAttention().run(places.graph(scores), Report())
        assert attends_causally(graph) == causal, name
    assert not attends_causally(Graph("g", (), ()))


# Masks in numbers


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 33), window=st.integers(1, 40), wrong=st.data())
def test_one_wrong_pair_is_seen(size: int, window: int, wrong: st.DataObject) -> None:
    at = np.arange(size)
    back = at[:, None] - at
    bias = np.where((back >= 0) & (back < window), 0.0, -np.inf)[None]
    assert describe_mask(bias, at) == Mask(True, window if window < size else 0, None)
    query = wrong.draw(st.integers(0, size - 1))
    key = wrong.draw(st.integers(0, size - 1))
    changed = bias.copy()
    changed[0, query, key] = 0.0 if math.isinf(bias[0, query, key]) else -np.inf
    # The furthest pair may be read as another window; a mask of two tokens, as none.
    try:
        found = describe_mask(changed, at)
    except Unrecognised:
        return
    shown = found.shows(at[None, :] - at[:, None])
    np.testing.assert_array_equal(shown, changed[0] > HIDDEN)


def test_a_reader_evaluates_any_pairs() -> None:
    """The same numbers as the evaluator's, at pairs in any order."""
    places = Places(129)
    bias = e.Add(
        e.Mul(per_head(*SLOPES), e.Cast(e.Mod(places.back, e.constant(7)), "f32")),
        e.Cast(s.Cumsum(s.Broadcast(e.constant(2), (places.size,)), 0), "f32"),
    )
    graph = places.graph(add(bias))
    reader = PairReader(Probe(graph), places.most, size=places.size)
    (dense,) = Probe(graph).evaluate([bias], places.most)
    generator = np.random.default_rng(0)
    queries, keys = generator.integers(0, places.most, (2, 5, 40))
    found: Array = reader.evaluate(reader.pair(bias), queries, keys)[..., 0, 0]
    np.testing.assert_allclose(np.moveaxis(found, 2, 0), dense[:, queries, keys], rtol=1e-6)
    assert found.shape == (5, 40, 2)


def test_what_is_not_followed_is_evaluated_for_the_longest_sequence() -> None:
    """Places that are looked up at places: a table of whole numbers, of which those of a shorter text are the first."""
    for back, known in ((0, True), (1, False)):
        places = Places(300)
        at = s.Reshape(s.Gather(s.Iota(places.size), s.Iota(places.size), 0), (1, places.size))
        if back:  # counted from the end: another mask for every length
            at = s.Reshape(s.Gather(s.Iota(places.size), e.Sub(places.length, e.constant(1)), 0), (1, 1))
        found = outcome(places, fill(e.LessEqual(at, places.q)))
        assert isinstance(found, Attention) == known


def test_values_that_are_looked_up_by_place_are_those_of_the_place() -> None:
    """Masks of padding, all ones, are looked up by key; so may be a table of both places."""
    places = Places(300)
    size = places.size
    ones = s.Broadcast(e.constant(True), (size,))
    keys = s.Broadcast(places.k, (size, size))
    assert said(places, fill(e.And(places.causal, s.Gather(ones, keys, 0)))) == Mask(True, 0, None)
    late = s.Reshape(e.GreaterEqual(places.k, e.constant(7)), (size,))
    assert isinstance(outcome(places, fill(e.And(places.causal, s.Gather(late, keys, 0)))), str)
    # The diagonal of a causal mask: every query is asked of itself.
    square = s.Gather(places.causal, s.Iota(size), 0)
    assert said(places, fill(square)) == Mask(True, 0, None)
    transposed = s.Transpose(s.Gather(places.causal, s.Iota(size), 1), (1, 0))
    assert isinstance(outcome(places, fill(transposed)), Attention)
    assert not outcome(places, fill(transposed)).causal  # type: ignore[union-attr]


def test_what_is_not_followed_and_depends_on_the_length_is_refused() -> None:
    """The last key is seen by the longest text, and by no other."""
    places = Places(300)
    size = places.size
    zeros = s.Slice(s.Broadcast(e.constant(0), (size,)), 0, 0, size - 1)
    last = s.Reshape(s.Concat((zeros, places.length), 0), (1, size))
    seen = e.Or(e.Equal(last, e.constant(0)), e.Equal(last, e.constant(300)))
    assert isinstance(outcome(places, fill(e.And(places.causal, seen))), str)


def test_what_stands_behind_a_softcap_is_no_factor_of_queries() -> None:
    """f * tanh(q k) is not tanh((f q) k)."""
    places = Places(300)
    factor = e.Cast(e.Add(places.q, e.constant(1)), "f32")
    assert isinstance(outcome(places, lambda raw: fill(places.causal)(e.Mul(e.Tanh(raw), factor))), str)
    inside = outcome(places, lambda raw: fill(places.causal)(e.Tanh(e.Mul(raw, factor))))
    assert isinstance(inside, Attention) and inside.softcap == 1.0


@pytest.mark.parametrize(("added", "known"), [(0.0, True), (1.5, False)])
def test_a_number_added_to_all_keys_counts_beside_sinks_also_where_a_solver_looks(added: float, known: bool) -> None:
    places = Places(LONG)
    seen = e.And(places.causal, e.GreaterEqual(quotient(places.q, 64), quotient(places.k, 64)))
    column = s.Broadcast(e.constant(np.zeros((1, 2, 1, 1)), "f32"), (1, 2, places.size, 1))
    bias = e.Where(seen, e.constant(added), e.constant(-1e30))

    def with_sink(raw: Value) -> Value:
        return s.Concat((e.Add(raw, bias), column), 3)

    def without_sink(shares: Value) -> Value:
        return s.Slice(shares, 3, 0, places.size)

    report = Report()
    after = FuseAttention().run(places.graph(with_sink, without_sink), report)
    assert any(isinstance(op, Attention) for op in after.ops) == known, report.refusals
