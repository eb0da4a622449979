"""Guards that set the shares of whole rows to zero: those of empty rows vanish, and any other is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import Array, Tensor
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.row_guards import require_guard
from llmc.compiler.passes.score_chain import Chain, chain_of

SEEN = Input("seen", Tensor((5, 5), "bool"))
UNSEEN = e.Not(SEEN)
OTHER = Input("other", Tensor((5, 5), "bool"))
BIAS = Input("bias", Tensor((5, 5), "f32"))
Q, K = (Input(name, Tensor((2, 5, 3), "f32")) for name in "qk")
c = e.constant
NONE = c(-math.inf)


@dataclass(frozen=True)
class Row:
    """Scores, and what they are made of."""

    raw: Value
    masked: Value  # where it is -inf, so is the score
    scores: Value

    @property
    def chain(self) -> Chain:
        graph = Graph("g", (SEEN, OTHER, BIAS, Q, K), (("out", self.scores),))
        return chain_of(graph, self.raw, self.scores)  # type: ignore[arg-type]


def row(mask: Callable[[Value], Value], after: Callable[[Value], Value] = lambda x: x) -> Row:
    raw = s.Matmul(Q, s.Transpose(K, (0, 2, 1)))
    masked = mask(raw)
    return Row(raw, masked, after(masked))


def filled(x: Value) -> Value:
    return e.Where(SEEN, x, NONE)


def added(x: Value) -> Value:
    return e.Add(x, BIAS)


def hides(name: str, scores: Row, guard: Value) -> bool:
    """Whether rows are empty wherever the guard holds, among random ones of which some are empty."""
    graph = Graph("g", (SEEN, OTHER, BIAS, Q, K), (("guard", guard), ("scores", scores.scores)))
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(60):
        given: dict[str, Array] = {x.name: generator.standard_normal(x.shape) for x in (Q, K)}  # type: ignore[arg-type]
        for mask in ("seen", "other"):
            density = generator.choice([0.2, 0.5, 0.8])
            given[mask] = (generator.random((5, 5)) < density) & (generator.random((5, 1)) < 0.7)
        given["seen"] |= (generator.random((5, 1)) < 0.1) & np.ones((5, 5), bool)
        given["bias"] = np.where(given["other"], generator.standard_normal((5, 5)) * 3, -np.inf)
        with np.errstate(all="ignore"):
            found = evaluate(graph, given, {}.__getitem__)
        holds, numbers = np.asarray(found["guard"]), np.asarray(found["scores"])
        holds = np.broadcast_to(holds, (2, 5, 1))
        held += int(holds.sum())
        if (holds & (numbers > -np.inf).any(-1, keepdims=True)).any():
            return False
    assert held, f"{name}: it never holds"
    return True


def top(x: Value, keep: bool = True) -> Value:
    return s.Max(x, (x.rank - 1,), keep)


def count(condition: Value, dtype: str = "i64") -> Value:
    return s.Sum(e.Cast(condition, dtype), (condition.rank - 1,))


def every(condition: Value) -> Value:
    return s.All(condition, (condition.rank - 1,))


def some(condition: Value) -> Value:
    return s.Any(condition, (-1,))


def zero() -> Value:
    return c(0)


GOOD: dict[str, tuple[Row, Callable[[Row], Value]]] = {
    "the largest is -inf": (row(filled), lambda r: e.Equal(top(r.scores), NONE)),
    "-inf is the largest": (row(filled), lambda r: e.Equal(NONE, top(r.scores))),
    "the largest is at most -inf": (row(filled), lambda r: e.LessEqual(top(r.scores), NONE)),
    "-inf is at least the largest": (row(filled), lambda r: e.GreaterEqual(NONE, top(r.scores))),
    "the largest is not above -inf": (row(filled), lambda r: e.Not(e.Greater(top(r.scores), NONE))),
    "-inf is not below the largest": (row(filled), lambda r: e.Not(e.Less(NONE, top(r.scores)))),
    "the largest is not another than -inf": (row(filled), lambda r: e.Not(e.NotEqual(top(r.scores), NONE))),
    "the largest, by a negative axis": (row(filled), lambda r: e.Equal(s.Max(r.scores, (-1,)), NONE)),
    "the largest, its axis given back": (
        row(filled), lambda r: s.Reshape(e.Equal(s.Max(r.scores, (2,), False), NONE), (2, 5, 1)),
    ),
    "the largest, its axis given back before": (
        row(filled), lambda r: e.Equal(s.Reshape(s.Reshape(top(r.scores), (1, 2, 5, 1)), (2, 5, 1)), NONE),
    ),
    "the largest of what is added": (row(added), lambda r: e.Equal(top(BIAS), NONE)),
    "the largest of what is added, in front": (row(added), lambda r: e.Equal(top(s.Reshape(BIAS, (1, 5, 5))), NONE)),
    "the largest before a bias": (row(filled, added), lambda r: e.Equal(top(r.masked), NONE)),
    "the largest before a cast": (
        row(filled, lambda x: e.Cast(e.Cast(x, "f64"), "f32")), lambda r: e.Equal(top(r.masked), NONE),
    ),
    "the largest, cast": (row(filled), lambda r: e.Equal(top(e.Cast(r.scores, "f16")), c(-math.inf, "f16"))),
    "the largest before axes in front": (
        row(filled, lambda x: s.Reshape(s.Reshape(x, (1, 2, 5, 5)), (2, 5, 5))), lambda r: e.Equal(top(r.masked), NONE),
    ),
    "the largest before another choice": (
        row(filled, lambda x: e.Where(OTHER, x, NONE)), lambda r: e.Equal(top(r.masked), NONE),
    ),
    "none is seen": (row(filled), lambda r: e.Not(some(SEEN))),
    "all are not seen": (row(filled), lambda r: every(e.Not(SEEN))),
    "none is seen, of a choice the other way": (row(lambda x: e.Where(UNSEEN, NONE, x)), lambda r: every(UNSEEN)),
    "the condition of a choice the other way": (row(lambda x: e.Where(SEEN, NONE, x)), lambda r: every(SEEN)),
    "none is seen, in front": (row(filled), lambda r: s.Reshape(e.Not(some(SEEN)), (1, 5, 1))),
    "none is seen of the condition in front": (row(filled), lambda r: e.Not(some(s.Reshape(SEEN, (1, 5, 5))))),
    "none is seen by the second choice": (
        row(filled, lambda x: e.Where(OTHER, x, NONE)), lambda r: e.Not(some(OTHER)),
    ),
    "none is seen, before a cast": (
        row(filled, lambda x: e.Cast(e.Cast(x, "f64"), "f32")), lambda r: e.Not(some(SEEN)),
    ),
    "none is seen, before axes in front": (
        row(filled, lambda x: s.Reshape(s.Reshape(x, (1, 2, 5, 5)), (2, 5, 5))), lambda r: e.Not(some(SEEN)),
    ),
    "none is seen by the first choice": (row(filled, lambda x: e.Where(OTHER, x, NONE)), lambda r: e.Not(some(SEEN))),
    "none is seen by either": (
        row(filled, lambda x: e.Where(OTHER, x, NONE)), lambda r: e.Not(some(e.And(SEEN, SEEN))),
    ),
    "all are hidden by either": (
        row(filled, lambda x: e.Where(OTHER, x, NONE)), lambda r: every(e.Or(e.Not(SEEN), e.Not(OTHER))),
    ),
    "all are hidden by both": (row(filled), lambda r: every(e.And(e.Not(SEEN), OTHER))),
    "none is one of both": (row(filled), lambda r: e.Not(some(e.Or(SEEN, OTHER)))),
    "all are -inf": (row(filled), lambda r: every(e.Equal(r.scores, NONE))),
    "-inf is all": (row(filled), lambda r: every(e.GreaterEqual(NONE, r.scores))),
    "none is above -inf": (row(filled), lambda r: e.Not(some(e.Greater(r.scores, NONE)))),
    "-inf is below none": (row(filled), lambda r: e.Not(some(e.Less(NONE, r.scores)))),
    "none is another than -inf": (row(filled), lambda r: e.Not(some(e.NotEqual(r.scores, NONE)))),
    "all that is added is -inf": (row(added), lambda r: every(e.LessEqual(BIAS, NONE))),
    "the count is 0": (row(filled), lambda r: e.Equal(count(SEEN), zero())),
    "0 is the count": (row(filled), lambda r: e.Equal(zero(), count(SEEN))),
    "the count is at most 0": (row(filled), lambda r: e.LessEqual(count(SEEN), zero())),
    "the count is not above 0": (row(filled), lambda r: e.Not(e.Greater(count(SEEN, "f32"), c(0.0)))),
    "the count is not another": (row(filled), lambda r: e.Not(e.NotEqual(count(SEEN), zero()))),
    "both of which one is": (row(filled), lambda r: e.And(e.Equal(top(r.scores), NONE), some(OTHER))),
    "either of which both are": (row(filled), lambda r: e.Or(e.Equal(top(r.scores), NONE), e.Not(some(SEEN)))),
    "neither": (row(filled), lambda r: e.Not(e.Or(some(SEEN), some(OTHER)))),
    "not both, of which each tells": (row(filled), lambda r: e.Not(e.And(some(SEEN), e.Greater(top(r.scores), NONE)))),
}  # fmt: skip

BAD: dict[str, tuple[Row, Callable[[Row], Value]]] = {
    "the largest is not -inf": (row(filled), lambda r: e.NotEqual(top(r.scores), NONE)),
    "the largest is above -inf": (row(filled), lambda r: e.Greater(top(r.scores), NONE)),
    "the largest is at least -inf": (row(filled), lambda r: e.GreaterEqual(top(r.scores), NONE)),
    "-inf is at most the largest": (row(filled), lambda r: e.LessEqual(NONE, top(r.scores))),
    "not: the largest is -inf": (row(filled), lambda r: e.Not(e.Equal(top(r.scores), NONE))),
    "not: the largest is at most -inf": (row(filled), lambda r: e.Not(e.LessEqual(top(r.scores), NONE))),
    "not: the largest is below": (row(filled), lambda r: e.Not(e.Less(top(r.scores), NONE))),
    "the largest is below 0": (row(filled), lambda r: e.Less(top(r.scores), c(0.0))),
    "the largest is at most -1": (row(filled), lambda r: e.LessEqual(top(r.scores), c(-1.0))),
    "the least is -inf": (row(filled), lambda r: e.Equal(s.Min(r.scores, (2,)), NONE)),
    "the largest of queries is -inf": (
        row(lambda x: e.Where(OTHER, x, NONE)), lambda r: s.Transpose(e.Equal(s.Max(r.scores, (1,)), NONE), (0, 2, 1)),
    ),
    "the largest of queries, as a row": (
        row(filled), lambda r: s.Reshape(e.Equal(s.Max(r.scores, (1,), False), NONE), (2, 5, 1)),
    ),
    "the largest of another bias": (row(filled), lambda r: e.Equal(top(BIAS), NONE)),
    "the largest is at most that of a bias": (row(filled), lambda r: e.LessEqual(top(r.scores), top(BIAS))),
    "the largest before a bound": (
        row(filled, lambda x: e.Maximum(x, c(-9.0))), lambda r: e.Equal(top(r.masked), NONE),
    ),
    "the largest before turning": (row(filled, e.Neg), lambda r: e.Equal(top(r.masked), NONE)),
    "the largest of what is taken away": (row(lambda x: e.Sub(x, BIAS)), lambda r: e.Equal(top(BIAS), NONE)),
    "the largest before another choice of numbers": (
        row(filled, lambda x: e.Where(OTHER, x, c(0.0))), lambda r: e.Equal(top(r.masked), NONE),
    ),
    "all are seen": (row(filled), lambda r: every(SEEN)),
    "some are seen": (row(filled), lambda r: some(SEEN)),
    "some are not seen": (row(filled), lambda r: some(e.Not(SEEN))),
    "not all are seen": (row(filled), lambda r: e.Not(every(SEEN))),
    "not all are not seen": (row(filled), lambda r: e.Not(every(e.Not(SEEN)))),
    "none of the others": (row(filled), lambda r: e.Not(some(OTHER))),
    "none is seen, of a choice that fills": (row(lambda x: e.Where(SEEN, x, c(-1e9))), lambda r: e.Not(some(SEEN))),
    "none is seen, of a choice the other way": (row(lambda x: e.Where(SEEN, NONE, x)), lambda r: e.Not(some(SEEN))),
    "all are one of both": (row(filled), lambda r: every(e.Or(e.Not(SEEN), OTHER))),
    "none is seen, before whole numbers": (
        row(filled, lambda x: e.Cast(e.Cast(x, "i32"), "f32")), lambda r: e.Not(some(SEEN)),
    ),
    "none is both": (row(filled), lambda r: e.Not(some(e.And(SEEN, OTHER)))),
    "all are -inf or another": (row(filled), lambda r: every(e.Or(e.Equal(r.scores, NONE), OTHER))),
    "some are -inf": (row(filled), lambda r: some(e.Equal(r.scores, NONE))),
    "all are another than -inf": (row(filled), lambda r: every(e.NotEqual(r.scores, NONE))),
    "all are at least -inf": (row(filled), lambda r: every(e.GreaterEqual(r.scores, NONE))),
    "none is -inf": (row(filled), lambda r: e.Not(some(e.Equal(r.scores, NONE)))),
    "none is at most -inf": (row(filled), lambda r: e.Not(some(e.LessEqual(r.scores, NONE)))),
    "none is below -inf": (row(filled), lambda r: e.Not(some(e.Less(r.scores, NONE)))),
    "all are below 1": (row(filled), lambda r: every(e.Less(r.scores, c(1.0)))),
    "all of the others are -inf": (row(filled), lambda r: every(e.Equal(BIAS, NONE))),
    "none is seen by any query": (row(filled), lambda r: s.Reshape(e.Not(s.Any(SEEN, (0,))), (5, 1))),
    "the count is 1": (row(filled), lambda r: e.Equal(count(SEEN), c(1))),
    "the count is above 0": (row(filled), lambda r: e.Greater(count(SEEN), zero())),
    "the count is at least 0": (row(filled), lambda r: e.GreaterEqual(count(SEEN), zero())),
    "0 is at most the count": (row(filled), lambda r: e.LessEqual(zero(), count(SEEN))),
    "not: the count is 0": (row(filled), lambda r: e.Not(e.Equal(count(SEEN), zero()))),
    "the count of hidden keys is 0": (row(filled), lambda r: e.Equal(count(e.Not(SEEN)), zero())),
    "the sum of numbers is 0": (
        row(added), lambda r: e.Equal(s.Sum(e.Cast(e.Cast(e.Maximum(BIAS, c(-1.0)), "i32"), "f32"), (1,)), c(0.0)),
    ),
    "either of which one is": (row(filled), lambda r: e.Or(e.Equal(top(r.scores), NONE), some(OTHER))),
    "not both, of which one is": (row(filled), lambda r: e.Not(e.And(some(SEEN), some(OTHER)))),
    "another choice": (row(filled), lambda r: e.Where(some(OTHER), e.Not(some(SEEN)), some(SEEN))),
    "an input": (row(filled), lambda r: s.Slice(OTHER, 1, 0, 1)),
    "a query's own": (row(filled), lambda r: s.Slice(e.Equal(r.scores, NONE), 2, 0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_guard_of_empty_rows_vanishes(name: str) -> None:
    scores, build = GOOD[name]
    guard = build(scores)
    assert hides(name, scores, guard)
    require_guard(scores.chain, guard)


@pytest.mark.parametrize("name", BAD)
def test_a_guard_of_other_rows_is_refused(name: str) -> None:
    scores, build = BAD[name]
    guard = build(scores)
    assert not hides(name, scores, guard), "this test is of guards that hold in rows which see keys"
    with pytest.raises(Unrecognised, match=r"^its probabilities are set to zero in rows that see keys$"):
        require_guard(scores.chain, guard)


def test_a_guard_over_no_axis_is_one_of_keys() -> None:
    scores = row(filled)
    for guard in (e.Not(s.Any(SEEN, ())), e.Equal(s.Max(scores.scores, ()), NONE)):
        with pytest.raises(Unrecognised):
            require_guard(scores.chain, guard)


@pytest.mark.parametrize("dtype", ["i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64", "f16", "bf16", "f32"])
def test_a_count_that_wraps_is_none(dtype: str) -> None:
    """In i8, 256 keys that are seen are 0, and in i16 65,536."""
    scores = row(filled)
    guard = e.Equal(count(SEEN, dtype), c(0, dtype))
    assert hides(dtype, scores, guard), "so few keys are counted right"
    if dtype in ("i8", "u8", "i16", "u16"):
        with pytest.raises(Unrecognised):
            require_guard(scores.chain, guard)
    else:
        require_guard(scores.chain, guard)


def test_a_guard_that_loses_its_axis_is_one_of_other_rows() -> None:
    """As many heads as queries: what a head hides stands where queries do."""
    q, k = (Input(name, Tensor((5, 5, 3), "f32")) for name in "qk")
    seen = Input("seen", Tensor((5, 1, 5), "bool"))
    raw = s.Matmul(q, s.Transpose(k, (0, 2, 1)))
    scores = e.Where(seen, raw, NONE)
    chain = chain_of(Graph("g", (seen, q, k), (("out", scores),)), raw, scores)
    require_guard(chain, e.Not(s.Any(seen, (2,))))
    for guard in (e.Not(s.Any(seen, (2,), False)), e.Equal(s.Max(s.Reshape(scores, (5, 5, 5)), (2,), False), NONE)):
        with pytest.raises(Unrecognised):
            require_guard(chain, guard)
