"""Linear maps in a graph: their matrices, where they begin, and how far they are followed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.types import Tensor
from llmc.compiler.passes.element_numbers import ElementNumbers
from llmc.compiler.passes.linear_maps import REACH, LinearMaps, holds_channels

X = Input("x", Tensor((2, 3, 4), "f64"))
Y = Input("y", Tensor((2, 3, 4), "f64"))
FACTOR = e.constant(np.asarray([2.0, -3.0, 0.0, 1.0]), "f64")


class Maps(LinearMaps):
    """Moves, sums and products with a constant; the products are the map's own work."""

    def linear_operands(self, value: Value) -> tuple[Value, ...]:
        if isinstance(value, (e.Neg, e.Cast, e.Add, e.Sub, s.Slice, s.Concat, s.Reshape, s.Transpose)):
            return value.operands
        if isinstance(value, e.Mul) and FACTOR in value.operands:
            return (value.b if value.a is FACTOR else value.a,)
        return ()

    def is_map_op(self, op: Value) -> bool:
        return isinstance(op, e.Mul)


def maps(*outputs: Value) -> Maps:
    return Maps(Graph("g", (X, Y), tuple((f"out{i}", value) for i, value in enumerate(outputs))))


def first(x: Value) -> Value:
    return s.Slice(x, 2, 0, 2)


def second(x: Value) -> Value:
    return s.Slice(x, -1, 2, 4)


def doubled(x: Value) -> Value:
    return e.Add(x, x)


MAPS: dict[str, Callable[[], Value]] = {
    "minus": lambda: e.Neg(X),
    "moved": lambda: s.Transpose(s.Reshape(X, (6, 4)), (1, 0)),
    "a part": lambda: second(X),
    "parts in another order": lambda: s.Concat((second(X), first(X)), 2),
    "parts of several terms": lambda: s.Concat((e.Add(first(X), second(X)), first(X)), -1),
    "parts of several terms, later": lambda: s.Concat((first(X), e.Sub(first(X), second(X))), 2),
    "parts of three terms": lambda: s.Concat((e.Add(e.Sub(first(X), second(X)), first(X)), second(X)), 2),
    "parts of four terms, later": lambda: s.Concat((first(X), e.Add(e.Add(first(X), first(X)), doubled(second(X)))), 2),
    "times": lambda: e.Mul(X, FACTOR),
    "times, in front": lambda: e.Mul(FACTOR, e.Neg(X)),
    "times twice": lambda: e.Mul(e.Cast(e.Cast(X, "f32"), "f64"), FACTOR),
    "a sum": lambda: e.Add(e.Mul(X, FACTOR), s.Concat((e.Neg(second(X)), first(X)), 2)),
    "a difference": lambda: e.Sub(e.Mul(X, FACTOR), X),
    "spread": lambda: e.Add(X, s.Reshape(s.Slice(X, 2, 1, 2), (2, 3, 1))),
    "four terms": lambda: e.Add(e.Add(X, X), e.Sub(X, X)),
}


@pytest.mark.parametrize("name", MAPS)
def test_terms_are_what_a_map_computes(name: str) -> None:
    y = MAPS[name]()
    assert isinstance(y, Op)
    found = maps(y)
    cone = found.cone(y)
    assert cone is not None
    nodes, leaf = cone
    assert leaf is X and nodes[-1] is y
    numbers = ElementNumbers({})
    terms = found.terms(X, nodes, numbers)
    assert terms is not None

    def value(number: int) -> float:
        element = numbers.element(number)
        return 0.0 if number == 0 else np.sign(number) * (element.value if element is not None else np.nan)

    x = np.arange(24.0).reshape(2, 3, 4) ** 2
    total = sum(x.reshape(-1)[term.source] * np.vectorize(value)(term.coefficient) for term in terms)
    expected = evaluate(found.graph, {"x": x, "y": x}, {}.__getitem__)["out0"]
    np.testing.assert_array_equal(total, np.asarray(expected))


def test_more_than_four_terms_are_not_followed() -> None:
    five = e.Add(e.Add(e.Add(X, X), e.Sub(X, X)), X)
    found = maps(five)
    cone = found.cone(five)
    assert cone is not None and found.terms(X, cone[0], ElementNumbers({})) is None


@pytest.mark.parametrize(("count", "known"), [(REACH - 1, True), (REACH, True), (REACH + 1, False)])
def test_a_map_is_followed_so_far(count: int, known: bool) -> None:
    ops: list[Value] = [X]
    for _ in range(count):
        ops.append(e.Neg(ops[-1]))
    found = maps(ops[-1])
    assert isinstance(ops[1], Op) and isinstance(ops[-1], Op)
    assert (found.cone(ops[-1]) is not None) == known
    users = found.linear_users(ops[1])
    assert users == ops[2:][:REACH], "in order"


def test_what_is_not_linear_is_no_user() -> None:
    start = e.Neg(X)
    other = e.Abs(start)
    users = [beside := e.Neg(start), e.Add(beside, start)]
    assert maps(users[-1], other).linear_users(start) == users


def test_users_are_not_followed_behind_so_many() -> None:
    """The last two are users of one value."""
    ops: list[Value] = [X]
    for _ in range(REACH):
        ops.append(e.Neg(ops[-1]))
    last = [e.Neg(ops[-1]), e.Cast(ops[-1], "f32")]
    assert isinstance(ops[1], Op)
    found = maps(*(e.Neg(value) for value in last)).linear_users(ops[1])
    assert len(found) == REACH + 1 and set(found) == {*ops[2:], *last}


def test_a_value_is_asked_once_where_all_of_it_comes_from() -> None:
    asked: list[Value] = []

    class Counting(Maps):
        def linear_operands(self, value: Value) -> tuple[Value, ...]:
            asked.append(value)
            return super().linear_operands(value)

    y = e.Add(X, X)
    for _ in range(9):
        y = e.Add(y, y)
    assert Counting(Graph("g", (X,), (("y", y),))).cone(y) is not None
    assert len(asked) == 11


def test_a_map_of_two_values_is_none() -> None:
    y = e.Add(e.Neg(X), Y)
    assert maps(y).cone(y) is None and maps(y).source(y) is None
    # A product of two values is the beginning of one, not linear itself.
    product = e.Mul(X, Y)
    y = e.Neg(product)
    assert maps(y).cone(y) == ([y], product)


def test_the_source_is_the_last_value_that_all_passes_through() -> None:
    a = e.Neg(X)
    b = e.Neg(a)
    turned = e.Mul(b, FACTOR)
    beside = e.Neg(b)
    y = e.Add(turned, beside)
    assert maps(y).source(y) == (b, [turned, beside, y])
    # What is turned at once, and what turns are made of.
    y = e.Neg(once := e.Mul(X, FACTOR))
    assert maps(y).source(y) == (X, [once, y])
    product = e.Mul(X, Y)
    y = e.Neg(e.Mul(product, FACTOR))
    found = maps(y).source(y)
    assert found is not None and found[0] is product
    # Some of it goes past the middle.
    middle = e.Neg(a)
    y = e.Add(middle, a)
    assert maps(y).source(y) == (a, [middle, y])
    # Without a turn, the last but itself.
    assert maps(b).source(b) == (a, [b])


def test_a_source_has_the_shape_or_more_channels() -> None:
    wide = s.Concat((X, X), 2)
    part = s.Slice(wide, 2, 0, 4)
    y = e.Neg(first(part))
    assert isinstance(y, Op)
    found = maps(y).source(y)
    assert found is not None and found[0].shape == (2, 3, 2)
    size = symbol("S", 1, 9)
    kinds = {
        "more": ((2, 3, 5), "f64", True), "as many": ((2, 3, 4), "f64", True), "fewer": ((2, 3, 3), "f64", False),
        "another dtype": ((2, 3, 4), "f32", False), "more of another dtype": ((2, 3, 5), "f32", False),
        "other rows": ((2, 4, 5), "f64", False), "another rank": ((3, 5), "f64", False),
        "free": ((2, 3, size), "f64", False),
    }  # fmt: skip
    for name, (shape, dtype, holds) in kinds.items():
        assert holds_channels(Input("z", Tensor(shape, dtype)), X) == holds, name
    assert not holds_channels(X, Input("z", Tensor((2, 3, size), "f64")))
    assert holds_channels(Input("a", Tensor((size,), "f64")), Input("b", Tensor((size,), "f64")))
