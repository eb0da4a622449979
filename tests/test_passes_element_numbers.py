"""Numbers of elements: equal ones for what is equal whatever the inputs are, and none for what only looks so."""

from __future__ import annotations

import numpy as np
import pytest
from pass_harness import x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.types import Array, precise
from llmc.compiler.passes.element_numbers import ElementNumbers, each_token_alone

T = symbol("T", 2, 9)
X, Y = x(4, name="x"), x(4, name="y")
IDS = x(4, name="ids", dtype="i64")
ROWS = x(T, 4, name="rows")


def vector(*values: float, dtype: str = "f32") -> Value:
    return e.constant(values, dtype)


VALUES: list[Value] = [
    IDS,
    X, Y, e.Neg(X), e.Mul(X, Y), e.Mul(Y, X), e.Mul(e.Neg(X), Y), e.Mul(e.Neg(X), e.Neg(Y)), e.Add(X, Y), e.Sub(X, Y),
    vector(0, 1, -1, 2), vector(-2, 0.5, 1, 0), vector(1, 2, 3, 4, dtype="f64"), vector(1, 2, 3, 4, dtype="bf16"),
    e.Mul(X, vector(0, 1, -1, 2)), e.Mul(vector(0, -1, 1, -2), X), e.Mul(e.Neg(X), vector(-2, -2, 2, 2)),
    e.Mul(e.Mul(X, vector(2, 2, 2, 2)), vector(-3, 1, -1, 0.5)), e.Mul(vector(2, 1, 0, -1), vector(3, 5, 7, 9)),
    e.Cos(X), e.Cos(e.Neg(X)), e.Sin(X), e.Cast(X, "bf16"), e.Cast(X, "f64"), e.Cast(e.Cast(X, "bf16"), "f32"),
    s.Reshape(e.Mul(X, Y), (2, 2)), s.Matmul(s.Reshape(X, (4, 1)), s.Reshape(Y, (1, 4))),
    s.Matmul(s.Reshape(X, (1, 4)), s.Reshape(Y, (4, 1))), s.Matmul(s.Reshape(X, (2, 2)), s.Reshape(Y, (2, 2))),
    s.Matmul(s.Reshape(X, (1, 1, 4)), s.Reshape(Y, (1, 4, 1))),
    s.Matmul(s.Reshape(X, (1, 4, 1)), s.Reshape(Y, (1, 1, 4))),
    s.Gather(X, e.constant([3, 0, 0], "i64"), 0), s.Gather(X, e.constant([[1], [-1]], "i64"), 0),
    s.Gather(ROWS, e.constant([2, 0], "i64"), 1), s.Gather(s.Transpose(ROWS, (1, 0)), e.constant([0], "i64"), 0),
    s.Concat((X, e.Neg(X), Y), 0), s.Slice(X, 0, 1, 4, 2), s.Broadcast(X, (3, 4)), s.Transpose(ROWS, (1, 0)),
    e.Where(e.Greater(X, Y), X, Y), e.Where(e.Less(Y, X), X, Y), e.Pow(X, vector(2, 2, 2, 2)), e.Maximum(X, Y),
    s.Softmax(X, 0), s.Softmax(s.Reshape(X, (2, 2)), 1), s.Cumsum(X, 0), s.Sum(X, (0,)),
    e.Mul(IDS, IDS), e.Mul(IDS, e.constant([0, 1, 2, -1], "i64")), e.Neg(IDS), vector(0, 1, 2, -1, dtype="i64"),
]  # fmt: skip


def evaluated(values: list[Value], rows: int) -> list[Array]:
    generator = np.random.default_rng(rows)
    inputs = {name: generator.uniform(0.5, 2.0, 4) for name in "xy"}
    inputs["ids"], inputs["rows"] = np.array([7, 11, 13, 17]), generator.uniform(0.5, 2.0, (rows, 4))
    graph = Graph("g", (X, Y, IDS, ROWS), tuple((str(i), value) for i, value in enumerate(values)))  # type: ignore[arg-type]
    with precise():
        found = evaluate(graph, inputs, lambda name: np.zeros(0))
    return [np.asarray(found[str(i)]) for i in range(len(values))]


@pytest.mark.parametrize("rows", [2, 5])
def test_one_number_is_one_value_and_a_product_is_what_it_is_a_product_of(rows: int) -> None:
    numbers = ElementNumbers({"T": rows})
    seen: dict[int, float] = {0: 0.0}
    for value, data in zip(VALUES, evaluated(VALUES, rows), strict=True):
        own = numbers.of(value)
        assert own.shape == data.shape == numbers.shape(value)
        for number, element in zip(own.reshape(-1).tolist(), data.reshape(-1).astype(float).tolist(), strict=True):
            sign = -1.0 if number < 0 else 1.0
            # bf16 counts as f64: the only roundings are those of f64 products in another order.
            assert sign * element == pytest.approx(seen.setdefault(abs(number), sign * element), rel=1e-14)
            for scale, inner in numbers.unscaled(number) if number else ():
                assert inner > 0
                if inner in seen:
                    assert scale * seen[inner] == pytest.approx(element, rel=1e-14)


def test_what_is_equal_whatever_the_inputs_are_has_one_number() -> None:
    of = ElementNumbers({"T": 3}).of

    def equal(a: Value, b: Value) -> bool:
        return np.array_equal(of(a), of(b))

    ones, zeros = vector(1, 1, 1, 1), vector(0, 0, 0, 0)
    assert equal(e.Mul(X, ones), X) and equal(e.Mul(e.Neg(ones), X), e.Neg(X)) and equal(e.Mul(X, zeros), zeros)
    assert equal(e.Mul(X, Y), e.Mul(Y, X)) and equal(e.Mul(e.Neg(X), Y), e.Neg(e.Mul(X, Y)))
    assert equal(vector(1, 2, 3, 4), vector(1, 2, 3, 4, dtype="f64")) and equal(e.Cast(X, "f64"), X)
    outer = s.Matmul(s.Reshape(X, (4, 1)), s.Reshape(Y, (1, 4)))
    assert equal(outer, e.Mul(s.Reshape(X, (4, 1)), s.Reshape(Y, (1, 4))))
    assert not equal(e.Cast(X, "bf16"), X) and not equal(X, Y) and not equal(e.Cos(X), e.Cos(e.Neg(X)))
    assert not equal(e.Sub(X, Y), e.Sub(Y, X)) and not equal(e.Cos(X), e.Sin(X))
    assert equal(vector(1, 2), e.constant([1, 2], "i64")) and not equal(vector(1, 2), vector(1, 3))
    # A number that is none is not even equal to itself.
    assert len(np.unique(of(vector(float("nan"), float("nan"))))) == 2
    assert len(np.unique(of(vector(float("inf"), float("inf"))))) == 2
    assert of(vector(-3.0)) == -of(vector(3.0)) and of(vector(-1.0)) == -1 and of(vector(0.0, -0.0)).tolist() == [0, 0]


def test_scales_are_taken_off_one_after_another() -> None:
    numbers = ElementNumbers({})
    (x0, *_) = numbers.of(X).tolist()
    value = e.Mul(e.Mul(e.Neg(X), vector(2, 2, 2, 2)), vector(-3, -3, -3, -3))
    found = list(numbers.unscaled(int(numbers.of(value)[0])))
    assert [scale for scale, _ in found] == [1.0, -3.0 if found[1][0] < 0 else 3.0, found[2][0]]
    assert found[2] == (6.0, x0)
    assert list(numbers.unscaled(-int(numbers.of(value)[0])))[2] == (-6.0, x0)
    # Neither factor of this is a constant, and both of that are.
    assert [scale for scale, _ in numbers.unscaled(int(numbers.of(e.Mul(X, Y))[0]))] == [1.0]
    both = int(numbers.of(e.Mul(vector(2.0), vector(3.0)))[0])
    assert [scale for scale, _ in numbers.unscaled(both)] == [1.0]


def test_products_of_whole_numbers_are_not_taken_apart() -> None:
    """They may overflow, and the sign of their factors is their own."""
    numbers = ElementNumbers({})
    for factor in (2, -1, -3):
        (number, *_) = numbers.of(e.Mul(IDS, e.constant([factor] * 4, "i64"))).tolist()
        assert list(numbers.unscaled(number)) == [(1.0, number)]


FREE = symbol("B", 1, 9)
ALONE: dict[str, tuple[Value, bool]] = {
    "nothing free": (s.Cumsum(X, 0), True),
    "elementwise": (e.Cos(ROWS), True),
    "a transpose": (s.Transpose(ROWS, (1, 0)), True),
    "channels of each row": (s.Slice(ROWS, 1, 0, 2), True),
    "rows": (s.Slice(ROWS, 0, 0, 2), False),
    "all rows but one": (s.Slice(ROWS, 0, 1, T), False),
    "up to a row that counts the rows": (s.Slice(x(T, 40, name="wide"), 1, 0, T), False),
    "channels side by side": (s.Concat((ROWS, ROWS), 1), True),
    "rows side by side": (s.Concat((ROWS, x(2, 4, name="two")), 0), False),
    "rows of ones in front": (s.Reshape(ROWS, (1, T, 4)), True),
    "channels as two axes": (s.Reshape(ROWS, (T, 2, 2)), True),
    "rows cut anew": (s.Reshape(ROWS, (2, 2 * T)), False),
    "rows put together": (s.Reshape(x(2, 2 * T, name="halves"), (T, 4)), False),
    "rows one after the other": (s.Reshape(ROWS, (4 * T,)), True),
    "two axes of one size": (s.Reshape(x(T, FREE, name="two"), (T, 1, FREE)), True),
    "a row spread": (s.Broadcast(x(4, name="x"), (T, 4)), True),
    "a product of rows by a matrix": (s.Matmul(ROWS, x(4, 3, name="m")), True),
    "a product over the rows": (s.Matmul(s.Transpose(ROWS, (1, 0)), ROWS), False),
    "a table's rows": (s.Gather(x(9, 4, name="table"), x(T, name="at", dtype="i64"), 0), True),
    "rows by number": (s.Gather(ROWS, x(T, name="at", dtype="i64"), 0), False),
    "channels by number": (s.Gather(ROWS, x(2, name="few", dtype="i64"), 1), True),
    "elements of channels": (s.GatherElements(ROWS, x(T, 2, name="el", dtype="i64"), -1), True),
    "elements of rows": (s.GatherElements(ROWS, x(T, 4, name="er", dtype="i64"), 0), False),
    "a count": (s.Iota(T), False),
    "a running sum": (s.Cumsum(ROWS, 0), False),
    "a sum of rows": (s.Sum(ROWS, (0,)), False),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_what_makes_a_row_of_the_same_row(name: str) -> None:
    value, expected = ALONE[name]
    assert isinstance(value, Op) and each_token_alone(value) is expected
    if isinstance(value, (s.Slice, s.Concat, s.Reshape)) and not expected:
        # What moves elements between rows gets numbers of its own: for other sizes others are equal.
        numbers = ElementNumbers({"T": 3, "B": 2})
        inputs = {number for operand in value.operands for number in numbers.of(operand).reshape(-1).tolist()}
        assert not inputs & set(numbers.of(value).reshape(-1).tolist())
