"""Patterns fit in either order where an op commutes, bind each name once, and see the number that a constant holds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.pattern import Const, Node, Pattern, Through, Var, match, number_of
from llmc.compiler.ir.types import Tensor

A, B, C = (Input(name, Tensor((3, 4), "f32")) for name in "abc")
X, Y = Var("x"), Var("y")


def names(value: Value, pattern: Pattern) -> dict[str, str] | None:
    """What inputs the variables stand for, by name."""
    found = match(value, pattern)
    return found and {key: getattr(bound, "name", "") for key, bound in found.items()}


@pytest.mark.parametrize("kind", [e.Add, e.Mul, e.Maximum, e.Equal, e.Sub, e.Div, e.Less, e.Pow], ids=lambda k: k.name)
def test_operands_are_in_either_order_where_that_means_the_same(kind: type[e.Binary]) -> None:
    pattern = Node(kind, Node(e.Neg, X), Y)
    assert names(kind(e.Neg(A), B), pattern) == {"x": "a", "y": "b"}
    commutes = kind in (e.Add, e.Mul, e.Maximum, e.Equal)
    assert names(kind(B, e.Neg(A)), pattern) == ({"x": "a", "y": "b"} if commutes else None)


def test_a_name_stands_for_one_value() -> None:
    square = Node(e.Mul, X, X)
    assert names(e.Mul(A, A), square) == {"x": "a"}
    assert match(e.Mul(A, B), square) is None and match(e.Mul(e.Neg(A), e.Neg(A)), square) is None
    # The first order in which it fits, wherever the name comes again.
    assert names(e.Add(A, e.Mul(B, A)), Node(e.Add, Node(e.Mul, X, Y), X)) == {"x": "a", "y": "b"}
    assert match(e.Add(C, e.Mul(B, A)), Node(e.Add, Node(e.Mul, X, Y), X)) is None


def test_a_variable_may_be_choosy() -> None:
    deep = Var("x", lambda value: isinstance(value, e.Neg))
    found = match(e.Add(A, e.Neg(B)), Node(e.Add, deep, Y))
    assert found is not None and found["y"] is A
    assert match(e.Add(A, B), Node(e.Add, deep, Y)) is None


def test_a_node_is_of_a_kind_has_a_name_and_as_many_operands() -> None:
    value = e.Add(e.Neg(A), B)
    found = match(value, Node((e.Sub, e.Add), X, Y, name="sum"))
    assert found is not None and found["sum"] is value
    assert set(found) == {"sum", "x", "y"}
    unnamed = match(value, Node(e.Add, X, Y))
    assert unnamed is not None and set(unnamed) == {"x", "y"}
    assert match(value, Node((e.Sub, e.Mul), X, Y)) is None
    assert match(value, Node(e.Add, X)) is None and match(value, Node(e.Add, X, Y, Var("z"))) is None
    assert match(A, Node(e.Add, X, Y)) is None
    summed = s.Sum(A, (1,))
    assert match(summed, Node(s.Sum, X, where=lambda op: op.axes == (1,))) is not None
    assert match(summed, Node(s.Sum, X, where=lambda op: op.axes == (0,))) is None


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_casts_and_reshapes_are_seen_through(depth: int) -> None:
    value: Value = e.Neg(A)
    for i in range(depth):
        value = e.Cast(value, "f16" if i % 2 == 0 else "f32")
    pattern = Through((e.Cast, s.Reshape), Node(e.Neg, X))
    assert names(value, pattern) == {"x": "a"} and names(s.Reshape(value, (12,)), pattern) == {"x": "a"}
    assert match(s.Transpose(value, (1, 0)), pattern) is None
    assert (match(value, Through((s.Reshape,), Node(e.Neg, X))) is None) == (depth > 0)
    assert match(e.Exp(value), pattern) is None


NUMBERS: dict[str, tuple[Value, object]] = {
    "one": (e.constant(2.5, "f32"), 2.5),
    "an integer": (e.constant(3, "i64"), 3),
    "a truth": (e.constant(True), True),
    "many": (e.constant(np.full((2, 3), 7.0), "f32"), 7.0),
    "unlike": (e.constant([7.0, 7.0, 6.0], "f32"), None),
    "none": (e.constant(np.zeros((0, 3)), "f32"), None),
    "no constant": (A, None),
    "computed": (e.Neg(e.constant(1.0)), None),
    "cut off": (e.Cast(e.constant(2.7, "f32"), "i32"), 2),
    "cut off and back": (e.Cast(e.Cast(e.constant(2.7, "f32"), "i32"), "f32"), 2.0),
    "wrapped around": (e.Cast(e.constant(300, "i32"), "u8"), 44),
    "as a truth": (e.Cast(e.Cast(e.constant(300, "i32"), "bool"), "f32"), 1.0),
    "rounded": (e.Cast(e.Cast(e.constant(0.1, "f32"), "f16"), "f32"), float(np.float16(0.1))),
    "moved": (s.Broadcast(s.Reshape(e.constant([4.0], "f32"), ()), (2, 3)), 4.0),
    "moved between casts": (e.Cast(s.Reshape(e.Cast(e.constant([-1.5], "f32"), "i8"), (1, 1)), "i64"), -1),
    "infinite": (e.constant(-math.inf, "f16"), -math.inf),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_number_that_a_constant_holds(name: str) -> None:
    value, expected = NUMBERS[name]
    found = number_of(value)
    assert found == expected and type(found) is type(expected)
    bound = match(value, Const("k"))
    assert bound == (None if expected is None else {"k": value})


def test_not_a_number_is_a_number_to_a_pattern() -> None:
    found = number_of(e.constant(math.nan, "f32"))
    assert isinstance(found, float) and math.isnan(found)
    assert number_of(e.constant([math.nan, math.nan], "f32")) is None
