"""What stands between products and softmax, one op after another: said by `llm.attention`, or refused by its name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from attention_of_graphs import result as attention_of

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.score_chain import fitted, reshaped

BATCH, HEADS, QUERIES, KEYS, DIM = 3, 2, 5, 7, 4
LEAST = float(np.finfo(np.float32).min)
SEEN = Input("seen", Tensor((QUERIES, KEYS), "bool"))
BIAS = Input("bias", Tensor((HEADS, QUERIES, KEYS), "f32"))
ROWS = Input("rows", Tensor((HEADS, QUERIES, 1), "f32"))  # one number a query
ROW = s.Slice(ROWS, 0, 0, 1)
NUMBER = Input("number", Tensor((), "f32"))
GIVEN = (SEEN, BIAS, ROWS, NUMBER)
Steps = Callable[[Value], Value]
c = e.constant


def graph_of(steps: Steps, dtype: str = "f32") -> Graph:
    """One attention of 5 queries and 7 keys; `steps` make scores of products."""
    q, k, v = (
        Input(name, Tensor((BATCH, HEADS, rows, DIM), dtype))
        for name, rows in zip("qkv", (QUERIES, KEYS, KEYS), strict=True)
    )
    raw = s.Matmul(q, s.Transpose(k, (0, 1, 3, 2)))
    shares = s.Softmax(steps(raw), 3)
    return Graph("g", (q, k, v, *GIVEN), (("out", s.Matmul(shares, v)),))


def result(graph: Graph) -> Attention | str:
    """The attention that becomes of a graph, or why none does. Queries see the first key, and some of the others."""
    seen = np.random.default_rng(5).random((QUERIES, KEYS)) < 0.6
    seen[:, 0] = True
    return attention_of(graph, 1e-12, {"seen": seen})


@dataclass(frozen=True)
class Said:
    """What an attention says of its scores besides a bias."""

    scale: float = 1.0
    softcap: float = 0.0
    bias: bool = False


def hidden(number: float) -> Steps:
    return lambda x: e.Where(SEEN, x, c(number))


def capped(x: Value) -> Value:
    return e.Mul(e.Tanh(e.Mul(x, c(0.25))), c(3.0))


def then(*steps: Steps) -> Steps:
    def all_of(x: Value) -> Value:
        for step in steps:
            x = step(x)
        return x

    return all_of


def merged(x: Value) -> Value:
    return s.Reshape(x, (BATCH * HEADS, QUERIES, KEYS))


def split(x: Value) -> Value:
    return s.Reshape(x, (BATCH, HEADS, QUERIES, KEYS))


def widened(x: Value) -> Value:
    return e.Cast(e.Cast(x, "f64"), "f32")


SAID: dict[str, tuple[Steps, Said]] = {
    "nothing": (lambda x: x, Said()),
    "times": (lambda x: e.Mul(x, c(0.5)), Said(0.5)),
    "a number times": (lambda x: e.Mul(c(0.5), x), Said(0.5)),
    "over": (lambda x: e.Div(x, c(4.0)), Said(0.25)),
    "less than nothing": (lambda x: e.Neg(e.Mul(x, c(0.5))), Said(-0.5)),
    "cast": (widened, Said()),
    "plus a bias": (lambda x: e.Add(x, BIAS), Said(bias=True)),
    "a bias plus": (lambda x: e.Add(BIAS, x), Said(bias=True)),
    "less a bias": (lambda x: e.Sub(x, BIAS), Said(bias=True)),
    "a bias less": (lambda x: e.Sub(BIAS, x), Said(-1.0, bias=True)),
    "a bias, then times": (lambda x: e.Mul(e.Add(x, BIAS), c(0.5)), Said(0.5, bias=True)),
    "a bias, then over": (lambda x: e.Div(e.Add(x, BIAS), c(4.0)), Said(0.25, bias=True)),
    "a bias, then turned": (lambda x: e.Neg(e.Add(x, BIAS)), Said(-1.0, bias=True)),
    "two biases": (lambda x: e.Sub(ROWS, e.Add(x, BIAS)), Said(-1.0, bias=True)),
    "a bias, cast": (lambda x: widened(e.Add(x, BIAS)), Said(bias=True)),
    "a bias twice": (lambda x: e.Add(BIAS, e.Add(x, BIAS)), Said(bias=True)),
    "a row's and hidden, merged": (
        then(lambda x: e.Mul(x, ROW), merged, lambda x: e.Where(s.Broadcast(SEEN, (6, 5, 7)), x, c(-math.inf)), split),
        Said(bias=True),
    ),
    "hidden and a row's, merged": (then(lambda x: e.Mul(x, ROW), hidden(-math.inf), merged, split), Said(bias=True)),
    "flat": (then(lambda x: s.Reshape(x, (3, 2, 35)), lambda x: e.Add(x, s.Reshape(BIAS, (2, 35))), split),
             Said(bias=True)),
    "a number for all": (lambda x: e.Sub(e.Add(x, c(2.0)), c(0.5)), Said()),
    "capped": (capped, Said(0.75, 3.0)),
    "capped by another op": (lambda x: e.Div(e.Activation(x, "tanh"), c(0.5)), Said(2.0, 2.0)),
    "capped and turned": (lambda x: e.Neg(capped(x)), Said(-0.75, 3.0)),
    "capped by a number below 0": (lambda x: e.Mul(e.Tanh(x), c(-2.0)), Said(-2.0, 2.0)),
    "capped and a bias": (lambda x: e.Sub(BIAS, capped(x)), Said(-0.75, 3.0, True)),
    "times a row's": (lambda x: e.Mul(x, ROWS), Said()),
    "a row's times": (lambda x: e.Mul(ROWS, x), Said()),
    "over a row's": (lambda x: e.Div(x, ROWS), Said()),
    "times and over rows'": (lambda x: e.Div(e.Mul(x, e.Exp(ROWS)), e.Exp(e.Neg(ROWS))), Said()),
    "a row's before capping": (lambda x: capped(e.Mul(x, ROWS)), Said(0.75, 3.0)),
    "a bias, then times a row's": (lambda x: e.Mul(e.Add(x, BIAS), ROWS), Said(bias=True)),
    "a bias, then over a row's": (lambda x: e.Div(e.Add(x, BIAS), ROWS), Said(bias=True)),
    "times an unknown number": (lambda x: e.Mul(x, NUMBER), Said()),
    "times a row's, cast": (lambda x: widened(e.Mul(x, ROWS)), Said()),
    "bounded by the least number": (lambda x: e.Maximum(e.Add(x, BIAS), c(LEAST)), Said(bias=True)),
    "bounded by the greatest number": (lambda x: e.Minimum(c(-LEAST), e.Add(x, BIAS)), Said(bias=True)),
    "hidden": (hidden(-math.inf), Said(bias=True)),
    "hidden by a number": (hidden(-1e4), Said(bias=True)),
    "hidden where not": (lambda x: e.Where(e.Not(SEEN), c(-1e4), x), Said(bias=True)),
    "hidden and a bias": (then(hidden(-1e30), lambda x: e.Add(x, BIAS)), Said(bias=True)),
    "a bias and hidden": (then(lambda x: e.Add(x, BIAS), hidden(-math.inf)), Said(bias=True)),
    "hidden twice": (
        then(hidden(-math.inf), lambda x: e.Where(e.Less(BIAS, c(-9.0)), c(-math.inf), x)), Said(bias=True),
    ),
    "hidden twice by a number": (
        then(hidden(-1e4), lambda x: e.Where(e.Less(BIAS, c(-9.0)), c(-1e4), x)), Said(bias=True),
    ),
    "hidden and capped before": (then(capped, hidden(-math.inf)), Said(0.75, 3.0, True)),
    "hidden and bounded": (then(hidden(-math.inf), lambda x: e.Maximum(x, c(LEAST))), Said(bias=True)),
    "hidden and bounded above": (then(hidden(-math.inf), lambda x: e.Minimum(x, c(-LEAST))), Said(bias=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_scores_are_said(name: str) -> None:
    steps, said = SAID[name]
    found = result(graph_of(steps))
    assert isinstance(found, Attention), found
    assert Said(found.scale, found.softcap, found.bias is not None) == said
    assert (found.causal, found.window, found.slopes, found.sinks) == (False, 0, None, None)


# What a choice puts in place of a score hides it or not, after whatever comes behind the choice.
FILLS: dict[str, tuple[float, Steps, bool]] = {
    "plus": (-4000.0, lambda x: e.Add(x, c(-2000.0)), True),
    "plus, in front": (-4000.0, lambda x: e.Add(c(-2000.0), x), True),
    "plus too much": (-6000.0, lambda x: e.Add(x, c(2000.0)), False),
    "less": (-4000.0, lambda x: e.Sub(x, c(2000.0)), True),
    "less too much": (-6000.0, lambda x: e.Sub(x, c(-2000.0)), False),
    "less not enough": (-4000.0, lambda x: e.Sub(x, c(600.0)), False),
    "plus not enough": (-4000.0, lambda x: e.Add(x, c(-600.0)), False),
    "turned": (4000.0, lambda x: e.Sub(c(-2000.0), x), True),
    "turned too high": (4000.0, lambda x: e.Sub(c(2000.0), x), False),
    "not turned": (-6000.0, lambda x: e.Sub(c(0.0), x), False),
    "negative": (6000.0, lambda x: e.Neg(x), True),
    "not negative": (-6000.0, lambda x: e.Neg(x), False),
    "times": (-3000.0, lambda x: e.Mul(x, c(2.0)), True),
    "times less": (-6000.0, lambda x: e.Mul(x, c(0.5)), False),
    "over": (-3000.0, lambda x: e.Div(x, c(0.5)), True),
    "over more": (-6000.0, lambda x: e.Div(x, c(2.0)), False),
    "the limit": (-5000.0, lambda x: x, True),
    "above the limit": (-4999.0, lambda x: x, False),
    "no number": (math.nan, lambda x: x, False),
    "infinite": (math.inf, lambda x: x, False),
    "infinite, turned": (math.inf, lambda x: e.Neg(x), True),
    "lifted": (-math.inf, lambda x: e.Maximum(x, c(LEAST)), True),
}


@pytest.mark.parametrize("name", FILLS)
def test_a_number_that_is_chosen_is_followed(name: str) -> None:
    number, steps, hides = FILLS[name]
    found = result(graph_of(then(hidden(number), steps)))
    assert isinstance(found, Attention) == hides, found
    if not hides:
        assert str(found).startswith("t.where puts ") and "in place of some scores, which does not hide" in str(found)


REFUSED: dict[str, tuple[Steps, str]] = {
    "capped twice": (lambda x: e.Tanh(capped(x)), "t.tanh acts on scores that are capped or masked already"),
    "a bias, then capped": (
        lambda x: e.Tanh(e.Add(x, BIAS)), "t.tanh acts on scores that are capped or masked already",
    ),
    "a number, then capped": (
        lambda x: e.Tanh(e.Add(x, c(1.0))), "t.tanh acts on scores that are capped or masked already",
    ),
    "hidden by 0, then capped": (
        lambda x: e.Activation(hidden(0.0)(x), "tanh"),
        "t.activation acts on scores that are capped or masked already",
    ),
    "another activation": (
        lambda x: e.Activation(x, "relu"),
        "its scores pass through t.activation, which is neither scale, softcap nor mask",
    ),
    "another op": (lambda x: e.Exp(x), "its scores pass through t.exp, which is neither scale, softcap nor mask"),
    "whole numbers": (
        lambda x: e.Cast(e.Cast(x, "i32"), "f32"),
        "its scores pass through t.cast, which is neither scale, softcap nor mask",
    ),
    "rounded": (
        lambda x: e.Cast(e.Cast(x, "f16"), "f32"), "its scores, products in f32, are rounded to f16",
    ),
    "squared": (
        lambda x: e.Mul(x, x), "its scores meet themselves in t.mul, which is neither scale, softcap nor mask",
    ),
    "one of two": (
        lambda x: e.Where(SEEN, x, e.Neg(x)),
        "its scores meet themselves in t.where, which is neither scale, softcap nor mask",
    ),
    "they divide": (
        lambda x: e.Div(BIAS, x), "its scores divide in t.div, which is neither scale, softcap nor mask",
    ),
    "a number divided": (
        lambda x: e.Div(c(1.0), x), "its scores divide in t.div, which is neither scale, softcap nor mask",
    ),
    "times 0": (lambda x: e.Mul(x, c(0.0)), "its scores are scaled by 0 in t.mul"),
    "over 0": (lambda x: e.Div(x, c(0.0)), "its scores are scaled by 0 in t.div"),
    "times infinity": (lambda x: e.Mul(x, c(math.inf)), "its scores are scaled by inf in t.mul"),
    "times no number": (lambda x: e.Mul(x, c(math.nan)), "its scores are scaled by nan in t.mul"),
    "capped, then a row's": (
        lambda x: e.Mul(capped(x), ROWS), "capped scores are scaled by t.mul from place to place",
    ),
    "capped, then over a row's": (
        lambda x: e.Div(capped(x), ROWS), "capped scores are scaled by t.div from place to place",
    ),
    "a factor of pairs": (
        lambda x: e.Mul(x, BIAS), "its scale differs from place to place: it is a tensor<[2, 5, 7], f32>",
    ),
    "bounded below": (
        lambda x: e.Maximum(x, c(-3.3e38)),
        "its scores are bounded by t.maximum, which is neither scale, softcap nor mask",
    ),
    "bounded above": (
        lambda x: e.Minimum(x, c(3.3e38)),
        "its scores are bounded by t.minimum, which is neither scale, softcap nor mask",
    ),
    "at least the greatest": (
        lambda x: e.Maximum(x, c(-LEAST)),
        "its scores are bounded by t.maximum, which is neither scale, softcap nor mask",
    ),
    "at most the least": (
        lambda x: e.Minimum(x, c(LEAST)),
        "its scores are bounded by t.minimum, which is neither scale, softcap nor mask",
    ),
    "bounded by a bias": (
        lambda x: e.Maximum(x, BIAS),
        "its scores are bounded by t.maximum, which is neither scale, softcap nor mask",
    ),
    "compared": (
        lambda x: e.Cast(e.Less(x, c(1.0)), "f32"),
        "t.lt compares its scores, so that they decide themselves what counts",
    ),
    "hidden by many numbers": (
        lambda x: e.Where(SEEN, x, BIAS),
        "t.where puts what is no one number in place of some scores, which does not hide them",
    ),
    "hidden, then a factor": (
        lambda x: e.Mul(hidden(-1e9)(x), ROWS),
        "t.where puts what is no one number in place of some scores, which does not hide them",
    ),
    "hidden by 1e4, and a bias": (
        lambda x: e.Add(hidden(-1e4)(x), BIAS),
        "t.where hides scores by -10000 and something else is added to them as well, so that a query which sees no "
        "key cannot be told",
    ),
    "hidden by two numbers": (
        lambda x: e.Where(e.Less(BIAS, c(-9.0)), c(-2e4), hidden(-1e4)(x)),
        "t.where hides scores by -10000 and something else is added to them as well, so that a query which sees no "
        "key cannot be told",
    ),
    "hidden by a number and infinity": (
        lambda x: e.Where(e.Less(BIAS, c(-9.0)), c(-math.inf), hidden(-1e4)(x)),
        "t.where hides scores by -10000 and something else is added to them as well, so that a query which sees no "
        "key cannot be told",
    ),
    "hidden not quite by 1e30, and a bias": (
        lambda x: e.Sub(hidden(-9.5e29)(x), BIAS),
        "t.where hides scores by -9.5e+29 and something else is added to them as well, so that a query which sees "
        "no key cannot be told",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_scores_are_refused_with_the_op(name: str) -> None:
    steps, why = REFUSED[name]
    assert result(graph_of(steps)) == why


@pytest.mark.parametrize(
    ("dtype", "number", "known"),
    [("f16", 65504.0, True), ("f16", 64000.0, False), ("bf16", 3.3895e38, True), ("bf16", 3.3e38, False)],
)
def test_bounds_of_narrow_scores_are_those_of_their_dtype(dtype: str, number: float, known: bool) -> None:
    for op, sign in ((e.Maximum, -1.0), (e.Minimum, 1.0)):
        found = result(graph_of(lambda x: op(x, c(sign * number, dtype)), dtype))  # noqa: B023
        assert isinstance(found, Attention) == known, found


# Values that broadcast to scores whose leading axes are merged or split.

LEADING = [
    ((6,), (2, 3)), ((2, 3), (6,)), ((2, 3), (2, 3)), ((2, 3, 1), (6, 1)), ((1, 4), (4,)), ((4,), (1, 4)),
    ((2, 2, 3), (4, 3)), ((4, 3), (2, 2, 3)), ((2, 6), (4, 3)), ((1, 1), (1,)), ((5,), (5, 1)), ((2, 3), (3, 2)),
]  # fmt: skip


def own_shapes(full: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every shape that broadcasts to another."""
    found = {()}
    for kept in itertools.product((False, True), repeat=len(full)):
        shape = tuple(dim if keeps else 1 for dim, keeps in zip(full, kept, strict=True))
        found.update(shape[i:] for i in range(len(shape)))
        if not kept[0]:
            found.add(shape[1:])
    return sorted(shape for shape in found if np.broadcast_shapes(shape, full) == full)


@pytest.mark.parametrize(("leading", "to"), LEADING, ids=str)
def test_what_broadcasts_to_scores_broadcasts_to_them_reshaped(leading: tuple[int, ...], to: tuple[int, ...]) -> None:
    rows = (2, 3)
    full, goal = (*leading, *rows), (*to, *rows)
    for shape in own_shapes(full):
        array = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
        expected = np.broadcast_to(array, full).reshape(goal)
        x = Input("x", Tensor(shape, "f64"))
        for moved in (reshaped(x, full, goal), fitted(x, leading, to, rows)):
            assert moved.rank <= len(goal)
            found = np.asarray(evaluate(Graph("g", (x,), (("out", moved),)), {"x": array}, {}.__getitem__)["out"])
            np.testing.assert_array_equal(np.broadcast_to(found, goal), expected)
            # It grows only where an axis in front is merged or split, and it is not the same all along those.
            if all(dim == 1 for dim in (*(1,) * (len(full) - len(shape)), *shape)[: len(leading)]):
                assert found.size == array.size
        if leading == to:
            assert fitted(x, leading, to, rows) is x
        if array.size == 1:
            assert reshaped(x, full, goal).rank == 0
