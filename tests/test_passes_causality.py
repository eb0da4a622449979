"""Texts whose tokens see only those before them, recognised or not: what is believed holds for every pair."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from mask_harness import Pairs
from pass_harness import param

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes import causality
from llmc.compiler.passes.causality import attends_causally

c = e.constant
NONE = c(-math.inf)
Scores = Callable[[Pairs, Value], Value]


def graph_of(p: Pairs, *scores: Scores) -> Graph:
    """A text with an attention for each of `scores`, which makes them of products [1, 2, S, S]."""
    inputs = [Input("ids", Tensor((1, p.size), "i32")), p.positions, Input("x", Tensor((1, 2, p.size, 4), "f32"))]
    value: Value = inputs[-1]
    for each in scores:
        made = each(p, s.Matmul(value, s.Transpose(value, (0, 1, 3, 2))))
        value = s.Matmul(s.Reshape(s.Softmax(made, made.rank - 1), (1, 2, p.size, p.size)), value)
    return Graph("g", inputs, (("out", value),))  # type: ignore[arg-type]


def is_causal(p: Pairs, scores: Scores) -> bool:
    """Whether the result for a token is the same whatever the later ones are."""
    graph = graph_of(p, scores)
    generator = np.random.default_rng(1)
    x = generator.standard_normal((1, 2, p.most, 4)).astype(np.float32) * 3
    at = np.arange(p.most, dtype=np.int32)[None]
    for length in range(1, p.most):
        other = x.copy()
        other[:, :, length:] = generator.standard_normal(other[:, :, length:].shape) * 3
        given = [{"ids": at, "positions": at, "x": each} for each in (x, other)]
        with np.errstate(all="ignore"):
            found = [np.asarray(evaluate(graph, each, {}.__getitem__)["out"])[:, :, :length] for each in given]
        if not np.array_equal(*found) or not np.isfinite(found[0]).all():
            return False
    return True


def fill(seen: Value, number: float = -math.inf) -> Callable[[Value], Value]:
    return lambda x: e.Where(seen, x, c(number))


def bias(p: Pairs, hidden: float = -1e30) -> Value:
    return e.Where(p.causal, c(0.0), c(hidden))


def later(p: Pairs) -> Value:
    return e.Greater(p.k, p.q)


def squares(p: Pairs) -> Value:
    """Causal, but no function of distance."""
    return e.GreaterEqual(e.Mul(p.q, p.q), e.Mul(p.k, p.k))


def spaced(p: Pairs) -> Value:
    """Every query's own place, and keys at some places: no function of distance, nor causal."""
    return e.Or(e.Equal(p.q, p.k), e.NotEqual(e.Mod(p.k, c(3)), c(0)))


SHOWN: dict[str, Scores] = {
    "filled": lambda p, x: fill(p.causal)(x),
    "filled by a number": lambda p, x: fill(p.causal, -1e30)(x),
    "filled the other way": lambda p, x: e.Where(later(p), NONE, x),
    "filled where not": lambda p, x: fill(e.Not(later(p)))(x),
    "filled of two conditions": lambda p, x: fill(e.And(p.causal, e.Less(p.back, c(3))))(x),
    "filled of two conditions of which one is no distance": lambda p, x: fill(e.And(spaced(p), p.causal))(x),
    "filled of either": lambda p, x: e.Where(e.Or(later(p), e.Greater(p.back, c(3))), NONE, x),
    "filled of either of which one is no distance": lambda p, x: e.Where(
        e.Or(e.And(e.Less(p.k, p.q), e.Equal(e.Mod(p.k, c(3)), c(0))), later(p)), NONE, x
    ),
    "filled by squares": lambda p, x: fill(squares(p))(x),
    "filled by squares the other way": lambda p, x: e.Where(e.Not(squares(p)), NONE, x),
    "moved": lambda p, x: fill(s.Reshape(s.Broadcast(p.causal, (2, p.size, p.size)), (1, 2, p.size, p.size)))(x),
    "added": lambda p, x: e.Add(x, bias(p)),
    "added in front": lambda p, x: e.Add(bias(p), x),
    "added, with slopes": lambda p, x: e.Add(x, e.Add(e.Cast(p.k, "f32"), bias(p))),
    "added after a number": lambda p, x: e.Add(e.Add(x, c(2.0)), bias(p)),
    "added before a number": lambda p, x: e.Sub(e.Add(x, bias(p)), c(2.0)),
    "a number and what is added": lambda p, x: e.Add(c(2.0), e.Add(x, bias(p))),
    "added to what is no product": lambda p, x: e.Add(e.Mul(x, x), bias(p)),
    "cast": lambda p, x: e.Cast(e.Cast(fill(p.causal)(x), "f64"), "f32"),
    "without the first axis": lambda p, x: s.Reshape(fill(p.causal)(x), (2, p.size, p.size)),
    "with another axis": lambda p, x: s.Reshape(
        s.Reshape(fill(p.causal)(x), (2, p.size, p.size)), (1, 2, 1, p.size, p.size)
    ),
    "moved, of two conditions": lambda p, x: fill(
        s.Reshape(s.Broadcast(e.And(spaced(p), p.causal), (2, p.size, p.size)), (1, 2, p.size, p.size))
    )(x),
    "reshaped, of two conditions": lambda p, x: fill(s.Reshape(e.And(spaced(p), p.causal), (1, 1, p.size, p.size)))(x),
    "less the largest": lambda p, x: e.Sub(y := fill(p.causal)(x), s.Max(y, (3,))),
    "behind a bound": lambda p, x: fill(p.causal)(e.Minimum(x, c(1.0))),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_text_that_hides_later_tokens_is_shown_to(name: str) -> None:
    places = Pairs()
    assert is_causal(places, SHOWN[name])
    assert attends_causally(graph_of(places, SHOWN[name]))


NOT: dict[str, Scores] = {
    "all": lambda p, x: e.Neg(x),
    "a key ahead": lambda p, x: fill(e.LessEqual(p.k, e.Add(p.q, c(1))))(x),
    "the last key": lambda p, x: fill(e.Or(p.causal, e.Equal(p.k, c(8))))(x),
    "the first query": lambda p, x: fill(e.Or(p.causal, e.Equal(p.q, c(0))))(x),
    "earlier ones are hidden": lambda p, x: fill(e.GreaterEqual(p.k, p.q))(x),
    "filled the other way": lambda p, x: e.Where(p.causal, NONE, x),
    "filled where not": lambda p, x: fill(e.Not(p.causal))(x),
    "of either": lambda p, x: fill(e.Or(p.causal, e.Less(e.Abs(p.back), c(3))))(x),
    "of both, filled": lambda p, x: e.Where(e.And(later(p), e.Less(p.back, c(-1))), NONE, x),
    "by squares, strictly": lambda p, x: fill(e.Not(squares(p)))(x),
    "by squares, the other way": lambda p, x: e.Where(squares(p), NONE, x),
    "by squares and one more": lambda p, x: fill(e.Or(squares(p), e.Equal(p.k, c(8))))(x),
    "not hidden enough": lambda p, x: fill(p.causal, -4.0)(x),
    "filled by a great number": lambda p, x: fill(p.causal, 1e30)(x),
    "filled by no one number": lambda p, x: e.Where(p.causal, x, s.Reshape(s.Max(x, (2,)), (1, 2, 1, p.size))),
    "its own place is hidden": lambda p, x: fill(e.Less(p.k, p.q), -1e30)(x),
    "its own place is hidden somewhere": lambda p, x: fill(e.And(p.causal, e.NotEqual(e.Add(p.k, p.q), c(0))), -1e30)(
        x
    ),
    "its own place is hidden, in a bias": lambda p, x: e.Add(x, e.Where(e.Less(p.k, p.q), c(0.0), c(-1e30))),
    "taken away": lambda p, x: e.Sub(x, bias(p)),
    "a number less": lambda p, x: e.Sub(c(2.0), e.Add(x, bias(p))),
    "heads and keys exchanged": lambda p, x: s.Reshape(
        s.Transpose(fill(p.causal)(x), (0, 2, 1, 3)), (1, 2, p.size, p.size)
    ),
    "cast to few bits": lambda p, x: e.Cast(e.Cast(fill(p.causal, -1e30)(x), "i8"), "f32"),
    "added twice": lambda p, x: e.Add(e.Add(x, bias(p)), e.Neg(e.Add(x, bias(p)))),
    "a bias that hides no later one": lambda p, x: e.Add(x, e.Where(p.causal, c(0.0), c(-4.0))),
    "a bias of another side": lambda p, x: e.Add(x, e.Where(e.GreaterEqual(p.k, p.q), c(0.0), c(-1e30))),
    "hidden, then bounded": lambda p, x: e.Maximum(fill(p.causal)(x), c(-4.0)),
    "hidden, then turned": lambda p, x: e.Neg(fill(p.causal, -1e30)(x)),
}


@pytest.mark.parametrize("name", NOT)
def test_a_text_that_shows_later_tokens_is_not_taken_for_one_that_hides_them(name: str) -> None:
    places = Pairs()
    assert not is_causal(places, NOT[name]), "this test is of scores that are not causal"
    assert not attends_causally(graph_of(places, NOT[name]))


def test_every_attention_of_a_text_must_hide_later_tokens() -> None:
    places = Pairs()
    good, bad = SHOWN["filled"], NOT["all"]
    for scores, known in (((good, good), True), ((good, bad), False), ((bad, good), False), ((), False)):
        assert attends_causally(graph_of(places, *scores)) == known
    x = Input("x", Tensor((1, places.size, 2, 4), "f32"))
    inputs = (Input("ids", Tensor((1, places.size), "i32")), places.positions, x)
    for causal in (False, True):
        op = Attention(x, x, x, causal=causal, scale=1.0)
        assert attends_causally(Graph("g", inputs, (("out", op),))) == causal
        raw = s.Transpose(op, (0, 2, 1, 3))
        scores = good(places, s.Matmul(raw, s.Transpose(raw, (0, 1, 3, 2))))
        both = Graph("g", inputs, (("out", s.Matmul(s.Softmax(scores, 3), raw)),))
        assert attends_causally(both) == causal


def test_what_no_token_decides_is_no_attention() -> None:
    """Shares of places alone may be of all of them: they are numbers."""
    places = Pairs()
    shares = s.Softmax(e.Cast(places.back, "f32"), 1)
    x = Input("x", Tensor((1, 2, places.size, 4), "f32"))
    inputs = (Input("ids", Tensor((1, places.size), "i32")), places.positions, x)
    for scores, known in ((SHOWN["filled"], True), (NOT["all"], False)):
        made = scores(places, s.Matmul(x, s.Transpose(x, (0, 1, 3, 2))))
        outputs = (("out", s.Matmul(s.Softmax(made, 3), x)), ("shares", shares))
        assert attends_causally(Graph("g", inputs, outputs)) == known


def test_a_text_without_a_longest_length_is_not_shown_to() -> None:
    for high, known in ((9, True), (None, False)):
        places = Pairs()
        places.size = symbol("S", 1, high)
        at = s.Iota(places.size)
        places.positions = Input("positions", Tensor((1, places.size), "i32"))
        places.causal = e.LessEqual(s.Reshape(at, (1, places.size)), s.Reshape(at, (places.size, 1)))
        assert attends_causally(graph_of(places, SHOWN["filled"])) == known


def test_conditions_that_are_not_known_show_nothing() -> None:
    places = Pairs()
    size = places.size
    unread = s.Slice(s.Slice(param("table", 12, 12), 0, 0, size), 1, 0, size)
    for condition in (
        lambda x: e.Greater(x, c(0.0)),
        lambda x: e.And(places.causal, e.Greater(x, c(0.0))),
        lambda x: e.Greater(unread, c(0.0)),
        lambda x: e.And(places.causal, e.Greater(unread, c(0.0))),
    ):
        assert not attends_causally(graph_of(places, lambda p, x: e.Where(condition(x), x, NONE)))  # noqa: B023
    assert not attends_causally(graph_of(places, lambda p, x: e.Add(x, unread)))
    scores = Input("scores", Tensor((1, 2, size, size), "f32"))
    x = Input("x", Tensor((1, 2, size, 4), "f32"))
    inputs = (Input("ids", Tensor((1, size), "i32")), places.positions, scores, x)
    assert not attends_causally(Graph("g", inputs, (("out", s.Matmul(s.Softmax(scores, 3), x)),)))


@pytest.mark.parametrize("heads", [1, 2])
def test_pairs_are_looked_at_where_they_are_few(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Pairs()
    condition = e.And(squares(places), c(np.ones((heads, 1, 1), bool)))
    for most, known in ((81 * heads, True), (81 * heads - 1, False)):
        monkeypatch.setattr(causality, "MOST_PAIRS", most)
        seen = e.Not(e.Not(condition)) if heads == 1 else e.Equal(condition, c(True))
        assert attends_causally(graph_of(places, lambda p, x: fill(seen)(x))) == known  # noqa: B023


@pytest.mark.parametrize("most", [255, 256, 257, 513])
def test_every_pair_of_a_long_text_is_looked_at(most: int) -> None:
    """Queries are taken some at a time, up to the last."""
    places = Pairs(most)
    for query, key, known in (
        (most - 1, most - 1, True), (most - 2, most - 1, False), (0, most - 1, False), (0, 1, False),
        (255, 256, most < 257), (256, 257, most < 258),
    ):  # fmt: skip
        pair = e.And(e.Equal(places.q, c(query)), e.Equal(places.k, c(key)))
        scores: Scores = lambda p, x: fill(e.Or(squares(p), pair))(x)  # noqa: B023, E731
        assert attends_causally(graph_of(places, scores)) == known


def test_scores_of_one_head_without_other_axes_are_an_attention_too() -> None:
    places = Pairs()
    x = Input("x", Tensor((places.size, 4), "f32"))
    inputs = (Input("ids", Tensor((1, places.size), "i32")), places.positions, x)
    for scores, known in ((SHOWN["filled"], True), (NOT["all"], False)):
        made = scores(places, s.Matmul(x, s.Transpose(x, (1, 0))))
        graph = Graph("g", inputs, (("out", s.Matmul(s.Softmax(made, 1), x)),))
        assert attends_causally(graph) == known


def test_a_choice_among_a_few_is_no_attention() -> None:
    """Such as a router's among experts: of each token alone."""
    places = Pairs()
    x = Input("x", Tensor((1, 2, places.size, 4), "f32"))
    inputs = (Input("ids", Tensor((1, places.size), "i32")), places.positions, x)
    made = SHOWN["filled"](places, s.Matmul(x, s.Transpose(x, (0, 1, 3, 2))))
    outputs = (("out", s.Matmul(s.Softmax(made, 3), x)), ("experts", s.Softmax(x, 3)),
               ("one", s.Softmax(s.Slice(x, 3, 0, 1), 3)))  # fmt: skip
    assert attends_causally(Graph("g", inputs, outputs))


@pytest.mark.parametrize("kind", ["of squares", "of distances"])
def test_a_condition_that_cannot_be_told_for_a_pair_shows_nothing(kind: str) -> None:
    """A table that ends before the row of the first query and the last key: beyond it is an error, and no number."""
    places = Pairs(5)
    back = e.Sub(e.Mul(places.k, places.k), e.Mul(places.q, places.q)) if kind == "of squares" else e.Neg(places.back)
    most = 16 if kind == "of squares" else 4
    for rows, known in ((2 * most + 1, True), (2 * most, False)):
        seen = s.Gather(c(np.arange(rows) <= most), e.Add(back, c(most)), 0)
        assert attends_causally(graph_of(places, lambda p, x: fill(seen)(x))) == known  # noqa: B023
