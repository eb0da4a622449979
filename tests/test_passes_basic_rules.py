"""canonicalize at the borders of its rules: what each condition keeps apart, and what comes out where it holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pass_harness import S, c, graph_of, names, run_checked, x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import llm
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import symbol
from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.passes.canonical_elementwise import never_negative
from llmc.compiler.passes.manager import parse_pipeline, run_passes

X, Y = x(), x(name="y")
ROW, MATRIX = x(6, name="row"), x(3, 6, name="matrix")
SQUARE = x(6, 6, name="square")
INTS = x(1, S, 6, name="n", dtype="i64")
BYTES = x(1, S, 6, name="b", dtype="u8")
SMALL = x(1, S, 6, name="k", dtype="i8")
LONG = x(1, S, 6, name="l", dtype="u64")
FLAG, OTHER = e.Greater(X, Y), e.Less(X, Y)
POSITIVE = e.Exp(Y)
HALF = x(1, S, 6, name="h", dtype="bf16")
CUBE = x(4, 5, 6, name="cube")
N, K = symbol("N", 2, 9), symbol("K", 0, 9)
WIDTH = x(3, N, name="width")


def i(value: int, dtype: str = "i64") -> e.Constant:
    return e.constant(value, dtype)


def spread(value: Value, *shape: int) -> Value:
    return s.Broadcast(value, shape)


def softmax(shifted: Value, axis: int = -1) -> Value:
    power = e.Exp(shifted)
    return e.Div(power, s.Sum(power, (axis,)))


def below(size: int, *shape: int) -> Value:
    """Indices that an input decides."""
    return e.Mod(x(*shape, name="at", dtype="i64"), i(size))


# A value, and the ops that are left of it, in order.
BECOMES: dict[str, tuple[Value, list[str]]] = {
    "c <= x": (e.LessEqual(i(2), INTS), ["t.ge"]),
    "c > x": (e.Greater(i(2), INTS), ["t.lt"]),
    "c >= x": (e.GreaterEqual(i(2), INTS), ["t.le"]),
    "c < x": (e.Less(i(2), INTS), ["t.gt"]),
    "c == x": (e.Equal(i(2), INTS), ["t.eq"]),
    "c - x stays": (e.Sub(c(2), X), ["t.sub"]),
    "c ** x stays": (e.Pow(c(2), X), ["t.pow"]),
    "c // x stays": (e.FloorDivide(c(2), POSITIVE), ["t.exp", "t.floor_div"]),
    "a vector of constants to the right": (e.Add(e.constant(np.arange(6.0), "f32"), X), ["t.add"]),
    "x - 0": (e.Sub(X, c(0)), []),
    "x / 1": (e.Div(X, c(1)), []),
    "x - 1": (e.Sub(X, c(1)), ["t.add"]),
    "x / 2": (e.Div(X, c(2)), ["t.mul"]),
    "bytes - 0": (e.Sub(BYTES, i(0, "u8")), []),
    "bytes - 1 stay": (e.Sub(BYTES, i(1, "u8")), ["t.sub"]),
    "n / 1": (e.Div(INTS, i(1)), []),
    "n / 2 stays": (e.Div(INTS, i(2)), ["t.div"]),
    "x ** 1": (e.Pow(X, c(1)), []),
    "min(x, inf)": (e.Minimum(X, c(math.inf)), []),
    "max(x, inf) stays": (e.Maximum(X, c(math.inf)), ["t.maximum"]),
    "min(x, -inf) stays": (e.Minimum(X, c(-math.inf)), ["t.minimum"]),
    "x + 1 stays": (e.Add(X, c(1)), ["t.add"]),
    "x * 0 stays for floats": (e.Mul(X, c(0)), ["t.mul"]),
    "x ** -1": (e.Pow(X, c(-1)), ["t.reciprocal"]),
    "x ** -2": (e.Pow(X, c(-2)), ["t.mul", "t.reciprocal"]),
    "x ** 4 stays": (e.Pow(X, c(4)), ["t.pow"]),
    "x ** -3 stays": (e.Pow(X, c(-3)), ["t.pow"]),
    "x and true": (e.And(FLAG, e.constant(True)), ["t.gt"]),
    "x or false": (e.Or(FLAG, e.constant(False)), ["t.gt"]),
    "x or true": (e.Or(FLAG, e.constant(True)), ["t.broadcast"]),
    "x and false": (e.And(FLAG, e.constant(False)), ["t.broadcast"]),
    "x == true stays": (e.Equal(FLAG, e.constant(True)), ["t.gt", "t.eq"]),
    "n * 1": (e.Mul(INTS, i(1)), []),
    "n ** 2": (e.Pow(INTS, i(2)), ["t.mul"]),
    "n ** 3": (e.Pow(INTS, i(3)), ["t.mul", "t.mul"]),
    "n ** 0": (e.Pow(INTS, i(0)), ["t.broadcast"]),
    "a power of another shape stays": (e.Pow(ROW, spread(c(2), 3, 6)), ["t.broadcast", "t.pow"]),
    "bytes - c stay": (e.Sub(BYTES, i(3, "u8")), ["t.sub"]),
    "n - c": (e.Sub(SMALL, i(127, "i8")), ["t.add"]),
    "n - the lowest stays": (e.Sub(SMALL, i(-128, "i8")), ["t.sub"]),
    "n - one above the lowest": (e.Sub(SMALL, i(-127, "i8")), ["t.add"]),
    "0 - n": (e.Sub(i(0), INTS), ["t.neg"]),
    "0 - bytes stay": (e.Sub(i(0, "u8"), BYTES), ["t.sub"]),
    "1 - x stays": (e.Sub(c(1), X), ["t.sub"]),
    "0 - a row, for each row, stays": (e.Sub(spread(c(0), 3, 6), ROW), ["t.broadcast", "t.sub"]),
    "-y + c": (e.Add(e.Neg(X), c(2)), ["t.neg", "t.add"]),
    "x * -1": (e.Mul(INTS, i(-1)), ["t.neg"]),
    "x / -1": (e.Div(X, c(-1)), ["t.neg"]),
    "a row times -1, for each row, stays": (e.Mul(ROW, spread(c(-1), 3, 6)), ["t.broadcast", "t.mul"]),
    "not not": (e.Not(e.Not(FLAG)), ["t.gt"]),
    "not -": (e.Neg(e.Abs(X)), ["t.abs", "t.neg"]),
    "| |x| |": (e.Abs(e.Abs(X)), ["t.abs"]),
    "1 / (1 / x)": (e.Reciprocal(e.Reciprocal(POSITIVE)), ["t.exp"]),
    "x / 2^13": (e.Div(X, c(2**13)), ["t.mul"]),
    "x / 2^14 stays": (e.Div(X, c(2**14)), ["t.div"]),
    "x / 2^-15": (e.Div(X, c(2.0**-15)), ["t.mul"]),
    "x / 2^-16 stays": (e.Div(X, c(2.0**-16)), ["t.div"]),
    "x / 0 stays": (e.Div(X, c(0)), ["t.div"]),
    "x / inf stays": (e.Div(X, c(math.inf)), ["t.div"]),
    "x / nan stays": (e.Div(X, c(math.nan)), ["t.div"]),
    "n / 4 stays": (e.Div(INTS, i(4)), ["t.div"]),
    "1 / a row, for each row, stays": (e.Div(spread(c(1), 3, 6), e.Exp(ROW)), ["t.broadcast", "t.exp", "t.div"]),
    "2 / x stays": (e.Div(c(2), POSITIVE), ["t.exp", "t.div"]),
    "x / (1 / y)": (e.Div(X, e.Reciprocal(POSITIVE)), ["t.exp", "t.mul"]),
    "(1 / y) * x": (e.Mul(e.Reciprocal(POSITIVE), X), ["t.exp", "t.div"]),
    "1 / rsqrt(x)": (e.Reciprocal(e.Rsqrt(POSITIVE)), ["t.exp", "t.sqrt"]),
    "1 / exp(x) stays": (e.Reciprocal(POSITIVE), ["t.exp", "t.reciprocal"]),
    "sqrt(exp(x)) stays": (e.Sqrt(POSITIVE), ["t.exp", "t.sqrt"]),
    "1 / (2 + exp(-x)) is no sigmoid": (
        e.Reciprocal(e.Add(e.Exp(e.Neg(X)), c(2))),
        ["t.neg", "t.exp", "t.add", "t.reciprocal"],
    ),
    "1 / (1 + exp(x)) is no sigmoid": (
        e.Reciprocal(e.Add(e.Exp(X), c(1))),
        ["t.exp", "t.add", "t.reciprocal"],
    ),
    "1 / (1 + x) is no sigmoid": (e.Reciprocal(e.Add(POSITIVE, c(1))), ["t.exp", "t.add", "t.reciprocal"]),
    "1 / (exp(-x) + 1)": (e.Reciprocal(e.Add(e.Exp(e.Neg(X)), c(1))), ["t.sigmoid"]),
    "a sigmoid of another shape stays": (
        e.Reciprocal(e.Add(spread(c(1), 3, 6), e.Exp(e.Neg(ROW)))),
        ["t.neg", "t.exp", "t.broadcast", "t.add", "t.reciprocal"],
    ),
    "a sigmoid of one row, for each row, stays": (
        e.Reciprocal(e.Add(spread(c(1), 3, 6), e.Exp(e.Neg(s.Slice(MATRIX, 0, 0, 1))))),
        ["t.slice", "t.neg", "t.exp", "t.broadcast", "t.add", "t.reciprocal"],
    ),
    "a softmax": (softmax(e.Sub(CUBE, s.Max(CUBE, (2,)))), ["t.softmax"]),
    "a softmax of another axis": (softmax(e.Sub(CUBE, s.Max(CUBE, (-2,))), -2), ["t.softmax"]),
    "a softmax less the largest of others": (
        softmax(e.Sub(X, s.Max(Y, (2,)))), ["t.max", "t.sub", "t.softmax"],
    ),
    "a softmax less the largest of two axes": (
        softmax(e.Sub(CUBE, s.Max(CUBE, (1, 2))), 1), ["t.max", "t.sub", "t.softmax"],
    ),
    "a softmax less the largest of another axis": (
        softmax(e.Sub(CUBE, s.Max(CUBE, (1,)))), ["t.max", "t.sub", "t.softmax"],
    ),
    "a softmax less the largest of columns": (
        softmax(e.Sub(SQUARE, s.Max(SQUARE, (1,), False)), 1), ["t.max", "t.sub", "t.softmax"],
    ),
    "max(0, x)": (e.Maximum(c(0), X), ["t.relu"]),
    "max(x, 1) stays": (e.Maximum(X, c(1)), ["t.maximum"]),
    "max of a row, for each row, stays": (e.Maximum(ROW, spread(c(0), 3, 6)), ["t.broadcast", "t.maximum"]),
    "where(false)": (e.Where(e.constant(False), X, Y), []),
    "where(not x)": (e.Where(e.Not(FLAG), X, Y), ["t.gt", "t.where"]),
    "where(true, a row, matrix)": (e.Where(e.constant(True), ROW, MATRIX), ["t.broadcast"]),
    "where(x, a row, a row)": (e.Where(e.Greater(MATRIX, c(0)), ROW, ROW), ["t.broadcast"]),
    "sum / n of two axes": (e.Div(s.Sum(CUBE, (0, 2)), c(24)), ["t.mean"]),
    "sum * 1 / n, without keep": (e.Mul(s.Sum(CUBE, (2,), False), c(1 / 6)), ["t.mean"]),
    "sum * n stays": (e.Mul(s.Sum(CUBE, (2,)), c(6)), ["t.sum", "t.mul"]),
    "sum / (1 / n) stays": (e.Div(s.Sum(CUBE, (2,)), c(1 / 6)), ["t.sum", "t.div"]),
    "sum over tokens / 6 stays": (e.Div(s.Sum(X, (1,)), c(6)), ["t.sum", "t.div"]),
    "sum of integers / n stays": (e.Div(s.Sum(x(4, 6, name="m", dtype="i64"), (1,)), i(6)), ["t.sum", "t.div"]),
    "max / n stays": (e.Div(s.Max(CUBE, (2,)), c(6)), ["t.max", "t.div"]),
    "a sum, for each row, stays": (e.Div(s.Sum(ROW, (0,)), spread(c(6), 3, 1)), ["t.sum", "t.broadcast", "t.div"]),
    "axes in order": (s.Max(CUBE, (-1, 0)), ["t.max"]),
    # Sums of integers wrap around as the two did.
    "(n + 100) + 100": (e.Add(e.Add(SMALL, i(100, "i8")), i(100, "i8")), ["t.add"]),
    "(n - 100) - 100": (e.Add(e.Add(SMALL, i(-100, "i8")), i(-100, "i8")), ["t.add"]),
    "(bytes + 200) + 100": (e.Add(e.Add(BYTES, i(200, "u8")), i(100, "u8")), ["t.add"]),
    "the largest twice": (e.Add(e.Add(INTS, i(2**63 - 1)), i(2**63 - 1)), ["t.add"]),
    "the lowest twice": (e.Add(e.Add(INTS, i(-(2**63))), i(-(2**63))), []),
    "the largest twice, unsigned": (
        e.Add(e.Add(LONG, i(2**64 - 1, "u64")), i(2**64 - 1, "u64")), ["t.add"],
    ),
    "(n + k) + 3 stays": (e.Add(e.Add(INTS, e.Abs(INTS)), i(3)), ["t.abs", "t.add", "t.add"]),
    "(n * 3) + 3 stays": (e.Add(e.Mul(INTS, i(3)), i(3)), ["t.mul", "t.add"]),
    "a cast of a count to i8 stays": (e.Cast(s.Iota(5, "i64"), "i8"), ["t.iota", "t.cast"]),
    "a cast of a count to f32 stays": (e.Cast(s.Iota(5, "i64"), "f32"), ["t.iota", "t.cast"]),
    # Moves.
    "a reshape that drops ones stays": (
        e.Add(s.Reshape(x(1, 1, 6, name="r"), (1, 6)), MATRIX),
        ["t.reshape", "t.add"],
    ),
    "a reshape that fills the result stays": (
        e.Add(s.Reshape(MATRIX, (1, 3, 6)), c(1)),
        ["t.reshape", "t.add"],
    ),
    "leading ones go": (e.Add(s.Reshape(ROW, (1, 6)), MATRIX), ["t.add"]),
    "both broadcast: one goes": (e.Add(spread(ROW, 3, 6), spread(e.Exp(ROW), 3, 6)), ["t.exp", "t.broadcast", "t.add"]),
    "a broadcast of a column goes": (e.Mul(spread(x(3, 1, name="column"), 3, 6), MATRIX), ["t.mul"]),
    "a reshape of a sum of other axes stays": (
        s.Reshape(s.Sum(CUBE, (1,), False), (4, 6, 1)),
        ["t.sum", "t.reshape"],
    ),
    "a reshape of a constant": (
        e.Add(MATRIX, s.Reshape(e.constant(np.arange(18.0), "f32"), (3, 6))),
        ["t.add"],
    ),
    "a transpose that goes back and forth": (s.Transpose(s.Transpose(CUBE, (1, 2, 0)), (2, 0, 1)), []),
    "a transpose that goes on": (s.Transpose(s.Transpose(CUBE, (1, 2, 0)), (1, 2, 0)), ["t.transpose"]),
    "a broadcast of a reshape of other axes stays": (
        s.Broadcast(s.Reshape(MATRIX, (3, 1, 6)), (3, 2, 6)),
        ["t.reshape", "t.broadcast"],
    ),
    "a slice that begins later stays": (s.Slice(X, 2, 1, 6), ["t.slice"]),
    "a slice that ends earlier stays": (s.Slice(X, 2, 0, 5), ["t.slice"]),
    "a slice of every second stays": (s.Slice(X, 2, 0, 6, 2), ["t.slice"]),
    "a slice of a slice of another axis stays": (s.Slice(s.Slice(CUBE, 1, 1, 5), 2, 1, 5), ["t.slice", "t.slice"]),
    "a slice of a slice of a matrix": (s.Slice(s.Slice(MATRIX, 1, 1, 5), 1, 1, 3), ["t.slice"]),
    "a slice of a slice of a matrix, of another axis, stays": (
        s.Slice(s.Slice(SQUARE, 1, 1, 6), 0, 1, 3), ["t.slice", "t.slice"],
    ),
    "a slice of a slice, from the end": (s.Slice(s.Slice(CUBE, -1, 2, 6), 2, 1, 4, 2), ["t.slice"]),
    "a slice of a concat of another axis": (
        s.Slice(s.Concat((SQUARE, e.Exp(SQUARE)), 0), 1, 0, 4),
        ["t.exp", "t.concat", "t.slice"],
    ),
    "a strided slice of a piece": (s.Slice(s.Concat((X, Y), 2), 2, 6, 12, 3), ["t.slice"]),
    "a slice of the middle of three": (s.Slice(s.Concat((X, Y, X), -1), 2, 7, 12), ["t.slice"]),
    "a slice of a piece of free size": (
        s.Slice(s.Concat((WIDTH, MATRIX), 1), 1, N + 1, N + 3),
        ["t.slice"],
    ),
    "a slice before a piece that may end sooner stays": (
        s.Slice(s.Concat((WIDTH, MATRIX), 1), 1, 0, 3),
        ["t.concat", "t.slice"],
    ),
    "a slice of a piece after one that may end sooner": (
        s.Slice(s.Concat((WIDTH, x(3, K + 3, name="wider")), 1), 1, N, N + K),
        ["t.slice"],
    ),
    "all pieces of size 0": (
        s.Concat((s.Slice(X, 2, 3, 3), s.Slice(Y, 2, 1, 1)), 2),
        ["t.slice", "t.slice", "t.concat"],
    ),
    "a concat of a concat of another axis stays": (
        s.Concat((s.Concat((SQUARE, e.Exp(SQUARE)), 0), x(12, 2, name="z")), 1),
        ["t.exp", "t.concat", "t.concat"],
    ),
    "three slices in a row": (
        s.Concat((s.Slice(X, 2, 1, 2), s.Slice(X, 2, 2, 4), s.Slice(X, -1, 4, 5)), 2),
        ["t.slice"],
    ),
    "two slices in a row behind another": (
        s.Concat((s.Slice(Y, 2, 0, 1), s.Slice(X, 2, 0, 2), s.Slice(X, 2, 2, 4)), 2),
        ["t.slice", "t.slice", "t.concat"],
    ),
    "slices of two values stay": (
        s.Concat((s.Slice(X, 2, 0, 2), s.Slice(Y, 2, 2, 6)), 2),
        ["t.slice", "t.slice", "t.concat"],
    ),
    "slices of another axis stay": (
        s.Concat((s.Slice(SQUARE, 0, 0, 3), s.Slice(SQUARE, 0, 3, 6)), 1),
        ["t.slice", "t.slice", "t.concat"],
    ),
    "a gather from the end of a free size": (s.Gather(WIDTH, i(-1), 1), ["t.slice", "t.reshape"]),
    "a gather of the first": (s.Gather(MATRIX, i(0), 0), ["t.slice", "t.reshape"]),
    "a gather of one, as a vector": (s.Gather(MATRIX, e.constant([2], "i64"), -1), ["t.slice"]),
    "a gather of one row, no times, stays": (s.Gather(MATRIX, spread(i(1), 0), 0), ["t.broadcast", "t.gather"]),
    "a gather of one row, any number of times, stays": (
        s.Concat((s.Gather(MATRIX, spread(i(1), K), 0), x(K, 6, name="more")), 0),
        ["t.broadcast", "t.gather", "t.concat"],
    ),
    "a gather of a number that is not known stays": (
        s.Gather(MATRIX, below(3, 1), 0),
        ["t.mod", "t.gather"],
    ),
    "a gather in another order stays": (s.Gather(MATRIX, e.constant([2, 1], "i64"), 0), ["t.gather"]),
    "a gather of the first two": (s.Gather(MATRIX, e.constant([0, 1], "i64"), 0), ["t.slice"]),
    "a gather of the middle": (s.Gather(MATRIX, e.constant([2, 3, 4], "i64"), 1), ["t.slice"]),
    "a gather with a gap stays": (s.Gather(MATRIX, e.constant([0, 2], "i64"), 1), ["t.gather"]),
    "a gather of a table of indices stays": (s.Gather(MATRIX, e.constant([[0, 1]], "i64"), 1), ["t.gather"]),
    "a pad at the end stays": (s.Pad(MATRIX, (0, 0), (0, 1)), ["t.pad"]),
    "a pad at the beginning stays": (s.Pad(MATRIX, (1, 0), (0, 0)), ["t.pad"]),
    "a move of a narrowed value stays before it": (
        s.Transpose(e.Cast(MATRIX, "bf16"), (1, 0)),
        ["t.cast", "t.transpose"],
    ),
    "a concat of one widened value stays": (
        s.Concat((e.Cast(HALF, "f32"), X), 1),
        ["t.cast", "t.concat"],
    ),
    "a concat of narrowed values stays": (
        s.Concat((e.Cast(X, "bf16"), e.Cast(Y, "bf16")), 1),
        ["t.cast", "t.cast", "t.concat"],
    ),
    "a layer norm of a transpose": (
        llm.LayerNorm(s.Transpose(CUBE, (1, 0, 2)), None, None, 1e-6),
        ["llm.layer_norm", "t.transpose"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BECOMES)
def test_what_is_left_of_a_value(name: str) -> None:
    value, expected = BECOMES[name]
    after, _ = run_checked(graph_of(value), "canonicalize", tolerance=1e-12)
    assert names(after) == expected


@pytest.mark.parametrize("kind", [s.Slice, s.Concat, s.Gather, s.GatherElements, s.Cumsum, s.Softmax, s.Argmax])
def test_axes_are_counted_from_the_front(kind: type[Op]) -> None:
    makers: dict[type[Op], Value] = {
        s.Slice: s.Slice(CUBE, -3, 1, 3),
        s.Concat: s.Concat((CUBE, CUBE), -2),
        s.Gather: s.Gather(CUBE, below(6, 2, 2), -1),
        s.GatherElements: s.GatherElements(CUBE, below(6, 4, 5, 2), -1),
        s.Cumsum: s.Cumsum(CUBE, -2),
        s.Softmax: s.Softmax(CUBE, -3),
        s.Argmax: s.Argmax(CUBE, -3),
    }
    before = makers[kind]
    after, _ = run_checked(graph_of(before), "canonicalize")
    found = after.output("out0")
    assert type(found) is kind and found.axis == 3 + before.axis  # type: ignore[attr-defined]


def test_a_row_that_may_not_be_there_is_not_cut_out() -> None:
    """Where a size decides whether an index is in range, the gather stays, which says so when it runs."""
    for value in (s.Gather(WIDTH, i(5), 1), s.Gather(WIDTH, e.constant([4, 5], "i64"), 1)):
        after, _ = run_passes(graph_of(value), parse_pipeline("canonicalize"))
        assert names(after) == ["t.gather"]


# What is never below 0, nor -0, whatever the input is, and beside it what may be.
WHOLE = e.Cast(INTS, "f32")
NEVER: dict[str, Value] = {
    "0": c(0), "2": c(2), "|x|": e.Abs(X), "exp": e.Exp(X), "sigmoid": e.Sigmoid(X), "x * x": e.Mul(X, X),
    "a product": e.Mul(e.Abs(X), e.Exp(Y)), "a sum": e.Add(e.Abs(X), c(1)), "a quotient": e.Div(e.Exp(X), c(3)),
    "a maximum": e.Maximum(X, c(1e-6)), "a maximum, the other way": e.Maximum(c(2), X), "x ** 2": e.Pow(X, c(2)),
    "x ** 4": e.Pow(X, c(4)), "exp ** y": e.Pow(e.Exp(X), Y), "|x| ** 3": e.Pow(e.Abs(X), c(3)),
    "a mean": s.Mean(e.Abs(X), (2,)), "a cast": e.Cast(e.Abs(X), "f64"),
    "moved": s.Reshape(s.Broadcast(e.Sqrt(e.Reciprocal(e.Exp(X))), (2, S, 6)), (2, 6 * S)),
}  # fmt: skip
MAY: dict[str, Value] = {
    "-1": c(-1), "-0": c(-0.0), "x": X, "-|x|": e.Neg(e.Abs(X)), "x * y": e.Mul(X, Y), "x * |y|": e.Mul(X, e.Abs(Y)),
    "|y| * x": e.Mul(e.Abs(Y), X), "|x| * -2": e.Mul(e.Abs(X), c(-2)), "x + |y|": e.Add(X, e.Abs(Y)),
    "|x| + y": e.Add(e.Abs(X), Y), "|x| / y": e.Div(e.Abs(X), Y), "x / exp": e.Div(X, e.Exp(Y)),
    "|x| - |y|": e.Sub(e.Abs(X), e.Abs(Y)), "max(x, y)": e.Maximum(X, Y), "max(x, 0)": e.Maximum(X, c(0)),
    "max(x, -1)": e.Maximum(X, c(-1)), "min(x, 1)": e.Minimum(X, c(1)), "x ** 3": e.Pow(X, c(3)),
    "x ** 1": e.Pow(X, c(1)), "x ** -1": e.Pow(X, c(-1)), "a mean": s.Mean(X, (2,)), "a cast": e.Cast(X, "f64"),
    "whole numbers": WHOLE, "a square of whole numbers": e.Cast(e.Mul(INTS, INTS), "f32"),
}  # fmt: skip
SOME = np.array([-math.inf, -3e38, -2.5, -1.0, -1e-45, -0.0, 0.0, 1e-45, 0.75, 1.0, 3e38, math.inf, math.nan])


def any_numbers(value: Value) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """The value for inputs of all kinds, each beside each."""
    graph = graph_of(value)
    first, second = (part.reshape(1, -1, 1).repeat(6, 2) for part in np.meshgrid(SOME, SOME))
    given = {"x": first.astype(np.float32), "y": second.astype(np.float32)}
    given["n"] = np.clip(np.nan_to_num(first), -4e9, 4e9).astype(np.int64)
    with np.errstate(all="ignore"):
        found = evaluate(graph, {part.name: given[part.name] for part in graph.inputs}, {}.__getitem__)
    return np.asarray(found["out0"])


@pytest.mark.parametrize("name", NEVER)
def test_what_is_known_never_to_be_negative_never_is(name: str) -> None:
    assert never_negative(NEVER[name])
    found = any_numbers(NEVER[name])
    assert not np.signbit(found[~np.isnan(found)]).any()


@pytest.mark.parametrize("name", MAY)
def test_what_may_be_negative_is_not_taken_for_what_never_is(name: str) -> None:
    assert not never_negative(MAY[name])
    found = any_numbers(MAY[name])
    if name != "max(x, 0)":  # of -0 and 0 either may be the maximum
        assert np.signbit(found[~np.isnan(found)]).any()
