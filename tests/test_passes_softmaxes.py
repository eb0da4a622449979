"""Softmaxes in every way of writing them, near misses beside each, and what stands behind them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.types import Tensor, precise
from llmc.compiler.passes.masks import Unrecognised
from llmc.compiler.passes.softmaxes import softmax_operand, weighted, without_maximum

X = Input("x", Tensor((2, 5, 5), "f32"))
Y = Input("y", Tensor((2, 5, 5), "f32"))
c = e.constant


def shares(exponential: Value, total: Value) -> Op:
    return e.Div(exponential, total)


def exp(x: Value = X) -> Value:
    return e.Exp(x)


def written(x: Value) -> Op:
    """exp(x) / sum(exp(x))"""
    power = exp(x)
    return e.Div(power, s.Sum(power, (2,)))


def by_reciprocal(x: Value, axes: tuple[int, ...] = (2,), first: bool = False) -> Op:
    power = exp(x)
    over = e.Reciprocal(s.Sum(power, axes))
    return e.Mul(over, power) if first else e.Mul(power, over)


def largest(x: Value = X, axes: tuple[int, ...] = (2,)) -> Value:
    return s.Max(x, axes)


SOFTMAXES: dict[str, Callable[[], Op]] = {
    "an op": lambda: s.Softmax(X, 2),
    "an op, by a negative axis": lambda: s.Softmax(X, -1),
    "exponentials": lambda: written(X),
    "by a negative axis": lambda: shares(power := exp(), s.Sum(power, (-1,))),
    "by a reciprocal": lambda: by_reciprocal(X),
    "a reciprocal first": lambda: by_reciprocal(X, first=True),
    "less the largest": lambda: written(e.Sub(X, largest())),
    "less the largest, by a negative axis": lambda: written(e.Sub(X, largest(X, (-1,)))),
    "less the largest, as a sum": lambda: written(e.Add(X, e.Neg(largest()))),
    "less the largest, as a sum the other way": lambda: written(e.Add(e.Neg(largest()), X)),
    "less the largest, by a reciprocal": lambda: by_reciprocal(e.Sub(X, largest())),
}


def same(op: Value, other: Value) -> bool:
    """Whether two values are equal for random inputs."""
    generator = np.random.default_rng(3)
    given = {x.name: generator.standard_normal((2, 5, 5)) for x in (X, Y)}
    with precise():
        found = evaluate(Graph("g", (X, Y), (("a", op), ("b", other))), given, {}.__getitem__)
    shape = np.broadcast_shapes(np.shape(found["a"]), np.shape(found["b"]))
    return bool(np.allclose(*(np.broadcast_to(np.asarray(found[name]), shape) for name in "ab"), rtol=0, atol=1e-12))


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_is_known(name: str) -> None:
    op = SOFTMAXES[name]()
    assert softmax_operand(op) is X
    assert same(op, s.Softmax(X, 2))


NO_SOFTMAXES: dict[str, Callable[[], Op]] = {
    "another axis": lambda: s.Softmax(X, 1),
    "another axis, counted from the end": lambda: s.Softmax(X, -2),
    "a sum over another axis": lambda: shares(power := exp(), s.Sum(power, (1,))),
    "a sum over two axes": lambda: shares(power := exp(), s.Sum(power, (1, 2))),
    "a mean": lambda: shares(power := exp(), s.Mean(power, (2,))),
    "a sum of other exponentials": lambda: shares(exp(), s.Sum(exp(Y), (2,))),
    "turned round": lambda: shares(s.Sum(power := exp(), (2,)), power),
    "squares": lambda: shares(power := e.Mul(X, X), s.Sum(power, (2,))),
    "times": lambda: e.Mul(power := exp(), s.Sum(power, (2,))),
    "less": lambda: e.Sub(power := exp(), s.Sum(power, (2,))),
    "a reciprocal of another sum": lambda: by_reciprocal(X, (1,)),
    "a reciprocal of other exponentials": lambda: e.Mul(exp(), e.Reciprocal(s.Sum(exp(Y), (2,)))),
    "one op": lambda: e.Exp(X),
}


@pytest.mark.parametrize("name", NO_SOFTMAXES)
def test_what_is_no_softmax_is_not_taken_for_one(name: str) -> None:
    op = NO_SOFTMAXES[name]()
    assert softmax_operand(op) is None
    assert not same(op, s.Softmax(X, 2))


KEPT: dict[str, Callable[[], Value]] = {
    "the largest of others": lambda: e.Sub(X, largest(Y)),
    "the largest of another axis": lambda: e.Sub(X, largest(X, (1,))),
    "the largest of all": lambda: e.Sub(X, largest(X, (0, 1, 2))),
    "the least": lambda: e.Sub(X, s.Min(X, (2,))),
    "the largest itself": lambda: e.Add(X, largest()),
    "from the largest": lambda: e.Sub(largest(), X),
    "less the negative largest": lambda: e.Sub(X, e.Neg(largest())),
    "others, less the largest": lambda: e.Add(Y, e.Neg(largest())),
    "less others": lambda: e.Sub(X, Y),
    "plus others": lambda: e.Add(X, Y),
    "plus the negative of others": lambda: e.Add(X, e.Neg(Y)),
    "times the largest": lambda: e.Mul(X, e.Neg(largest())),
}


@pytest.mark.parametrize("name", KEPT)
def test_another_number_than_the_largest_is_kept(name: str) -> None:
    value = KEPT[name]()
    assert without_maximum(value) is value
    assert softmax_operand(written(value)) is value


def test_a_sum_that_loses_its_axis_stands_for_another_row() -> None:
    """Rows and columns being as many, it broadcasts along the rows."""
    square = Input("square", Tensor((5, 5), "f32"))
    power = e.Exp(square)
    assert softmax_operand(e.Div(power, s.Sum(power, (1,), False))) is None
    value = e.Sub(square, s.Max(square, (1,), False))
    assert without_maximum(value) is value
    power = e.Exp(value)
    assert softmax_operand(e.Div(power, s.Sum(power, (1,)))) is value


# What stands between shares and the values that they weigh

V = Input("v", Tensor((2, 5, 3), "f32"))
SEEN = Input("seen", Tensor((2, 5, 1), "bool"))
PAIRS = Input("pairs", Tensor((5, 5), "bool"))


def behind(step: Callable[[Value], Value], *others: Callable[[Value], Value], drops: bool = False,
           values: Value = V) -> tuple[Graph, Op]:  # fmt: skip
    softmax = s.Softmax(X, 2)
    outputs: list[tuple[str, Value]] = [("out", s.Matmul(step(softmax), values))]
    outputs += [(f"other{i}", other(softmax)) for i, other in enumerate(others)]
    return Graph("g", (X, Y, V, SEEN, PAIRS), tuple(outputs)), softmax


def is_nan(x: Value) -> Value:
    return e.NotEqual(x, x)


ZERO = c(0.0)
FOLLOWED: dict[str, tuple[Callable[[Value], Value], int]] = {
    "nothing": (lambda x: x, 0),
    "a cast": (lambda x: e.Cast(e.Cast(x, "f64"), "f32"), 0),
    "axes in front": (lambda x: s.Reshape(s.Reshape(x, (1, 2, 5, 5)), (2, 5, 5)), 0),
    "a guard": (lambda x: e.Where(SEEN, ZERO, x), 1),
    "two guards": (lambda x: e.Where(e.Not(SEEN), ZERO, e.Where(SEEN, ZERO, x)), 2),
    "a guard of all": (lambda x: e.Where(e.Less(c(1.0), c(2.0)), ZERO, x), 1),
    "no numbers": (lambda x: e.Where(is_nan(x), ZERO, x), 0),
    "no numbers, the other way": (lambda x: e.Where(e.Not(e.Equal(x, x)), ZERO, x), 0),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_shares_are_followed_to_their_product(name: str) -> None:
    step, guards = FOLLOWED[name]
    graph, softmax = behind(step)
    product, found = weighted(graph, softmax, False)
    assert product is graph.outputs[0][1] and len(found) == guards


STOPPED: dict[str, tuple[Callable[[Value], Value], str]] = {
    "two users": (lambda x: e.Add(x, e.Neg(x)), "its probabilities are used 2 times"),
    "another op": (lambda x: e.Neg(x), "its probabilities pass through t.neg"),
    "scaled": (lambda x: e.Mul(x, Y), "its probabilities pass through t.mul"),
    "whole numbers": (lambda x: e.Cast(e.Cast(x, "i32"), "f32"), "its probabilities pass through t.cast"),
    "rows moved": (
        lambda x: s.Reshape(s.Reshape(x, (2, 25, 1)), (2, 5, 5)), "its probabilities pass through t.reshape",
    ),
    "rows merged": (lambda x: s.Reshape(s.Reshape(x, (10, 5)), (2, 5, 5)), "its probabilities pass through t.reshape"),
    "one axis": (lambda x: s.Reshape(s.Reshape(x, (50,)), (2, 5, 5)), "its probabilities pass through t.reshape"),
    "some zeros": (lambda x: e.Where(PAIRS, ZERO, x), "some of its probabilities are set to zero"),
    "some ones": (lambda x: e.Where(SEEN, c(1.0), x), "its probabilities pass through t.where"),
    "zeros elsewhere": (lambda x: e.Where(SEEN, x, ZERO), "its probabilities pass through t.where"),
    "zeros where others are no numbers": (
        lambda x: e.Where(is_nan(Y), ZERO, x), "some of its probabilities are set to zero",
    ),
    "zeros where they are numbers": (
        lambda x: e.Where(e.Equal(x, x), ZERO, x), "some of its probabilities are set to zero",
    ),
    "zeros where they are numbers, the other way": (
        lambda x: e.Where(e.Not(is_nan(x)), ZERO, x), "some of its probabilities are set to zero",
    ),
    "a part": (lambda x: s.Slice(s.Concat((x, Y), 2), 2, 0, 5), "its probabilities pass through t.concat"),
    "more rows": (
        lambda x: e.Where(s.Broadcast(e.Cast(ZERO, "bool"), (3, 2, 5, 1)), ZERO, x),
        "its probabilities pass through t.where",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPPED)
def test_other_steps_behind_shares_are_refused(name: str) -> None:
    step, why = STOPPED[name]
    graph, softmax = behind(step)
    with pytest.raises(Unrecognised) as refused:
        weighted(graph, softmax, False)
    assert str(refused.value) == why


def test_shares_are_what_is_weighed() -> None:
    """Not what weighs, nor both; not an output."""
    softmax = s.Softmax(X, 2)
    for value, why in (
        (s.Matmul(Y, softmax), "its probabilities pass through t.matmul"),
        (s.Matmul(softmax, softmax), "its probabilities are used 2 times"),
    ):
        with pytest.raises(Unrecognised) as refused:
            weighted(Graph("g", (X, Y), (("out", value),)), softmax, False)
        assert str(refused.value) == why
    cast = e.Cast(e.Cast(softmax, "f16"), "f32")
    for output in (softmax, cast):
        graph = Graph("g", (X, V), (("out", s.Matmul(cast, V)), ("shares", output)))
        with pytest.raises(Unrecognised, match=r"^its probabilities are an output of the graph$"):
            weighted(graph, softmax, False)


FOUR = Input("four", Tensor((2, 4, 3), "f32"))
KEEP_SINKS = "its probabilities keep the column of sinks"
COLUMNS: dict[str, tuple[Callable[[Value], Value], Value, str]] = {
    "cut off": (lambda x: s.Slice(x, 2, 0, 4), FOUR, ""),
    "cut off, by a negative axis": (lambda x: s.Slice(e.Cast(x, "f32"), -1, 0, 4), FOUR, ""),
    "kept": (lambda x: x, V, KEEP_SINKS),
    "kept and cast": (lambda x: e.Cast(e.Cast(x, "f16"), "f32"), V, KEEP_SINKS),
    "the first cut off": (lambda x: s.Slice(x, 2, 1, 5), FOUR, KEEP_SINKS),
    "the first and the last cut off": (
        lambda x: s.Slice(x, 2, 1, 4), Input("three", Tensor((2, 3, 3), "f32")), KEEP_SINKS,
    ),
    "two cut off": (lambda x: s.Slice(x, 2, 0, 3), Input("three", Tensor((2, 3, 3), "f32")), KEEP_SINKS),
    "every other": (lambda x: s.Slice(x, 2, 0, 4, 2), Input("two", Tensor((2, 2, 3), "f32")), KEEP_SINKS),
    "a row cut off": (lambda x: s.Slice(x, 1, 0, 4), V, "its probabilities pass through t.slice"),
    "cut off twice": (
        lambda x: s.Slice(s.Slice(x, 2, 0, 4), 2, 0, 4), FOUR, "its probabilities pass through t.slice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_sinks_is_cut_off(name: str) -> None:
    step, values, why = COLUMNS[name]
    softmax = s.Softmax(X, 2)
    product = s.Matmul(step(softmax), values)
    inputs = (X, V, *([values] if values is not V else []))
    graph = Graph("g", inputs, (("out", product),))  # type: ignore[arg-type]
    if not why:
        assert weighted(graph, softmax, True) == (product, [])
        with pytest.raises(Unrecognised, match=r"^its probabilities pass through t\.slice$"):
            weighted(graph, softmax, False)
        return
    with pytest.raises(Unrecognised) as refused:
        weighted(graph, softmax, True)
    assert str(refused.value) == why


@pytest.mark.parametrize(("rows", "sinks"), [(3, True), (3, False), (7, True), (7, False)])
def test_rows_need_not_be_as_many_as_keys(rows: int, sinks: bool) -> None:
    """Four keys and a column of sinks, or five keys."""
    softmax = s.Softmax(Input("x", Tensor((2, rows, 5), "f32")), 2)
    product = s.Matmul(s.Slice(softmax, 2, 0, 4) if sinks else softmax, FOUR if sinks else V)
    inputs = (softmax.x, FOUR, V)
    assert weighted(Graph("g", inputs, (("out", product),)), softmax, sinks) == (product, [])  # type: ignore[arg-type]
