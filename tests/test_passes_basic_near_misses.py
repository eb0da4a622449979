"""Norms, linears and activations: values that fail one condition of a recogniser, and what becomes of them."""

from __future__ import annotations

import math

import pytest
from pass_harness import S, c, graph_of, names, param, run_checked, x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import llm
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Value
from llmc.compiler.passes.manager import Report

X, Y = x(), x(name="y")
W = param("w", 6, dtype="f32")
SQUARE = x(6, 6, name="square")
ROWS = x(4, 6, name="rows")


def check(value: Value, pipeline: str, expected: list[str], tolerance: float = 1e-6) -> Report:
    """Runs the passes; what is left must be these ops. The last pass's report."""
    after, reports = run_checked(graph_of(value), pipeline, tolerance=tolerance)
    assert names(after) == expected
    return reports[-1]


# Norms


def root(spread: Value, epsilon: float = 1e-5) -> Value:
    return e.Rsqrt(e.Add(spread, c(epsilon)))


def squares(v: Value, *axes: int, keep: bool = True) -> Value:
    return s.Mean(e.Mul(v, v), axes or (v.rank - 1,), keep)


def rms(v: Value) -> Value:
    return e.Mul(v, root(squares(v)))


def centred(v: Value, *axes: int) -> Value:
    return e.Sub(v, s.Mean(v, axes or (v.rank - 1,)))


def layer(v: Value, *axes: int) -> Value:
    return e.Mul(centred(v, *axes), root(squares(centred(v, *axes), *axes)))


def expanded(v: Value, other: Value, first: tuple[int, ...], second: tuple[int, ...]) -> Value:
    mean = s.Mean(other, second)
    return e.Sub(squares(v, *first), e.Mul(mean, mean))


CUBE = x(3, 4, 6, name="cube")
CORE = ["t.mul", "t.mean", "t.add", "t.rsqrt", "t.mul"]
NORMS: dict[str, tuple[Value, list[str]]] = {
    # A mean that drops its axis meets the rows by accident in a square.
    "a mean of the rows for the columns": (e.Mul(SQUARE, root(squares(SQUARE, 1, keep=False))), CORE),
    "the first axis": (e.Mul(ROWS, root(squares(ROWS, 0))), CORE),
    "axes that are not next to each other": (e.Mul(CUBE, root(squares(CUBE, 0, 2))), CORE),
    "all axes": (e.Mul(ROWS, root(squares(ROWS, 0, 1))), ["t.reshape", "llm.rms_norm", "t.reshape"]),
    "axes in another order": (e.Mul(CUBE, root(squares(CUBE, 2, 1))), ["t.reshape", "llm.rms_norm", "t.reshape"]),
    "a row beside others": (
        e.Mul(x(1, 6, name="one"), s.Broadcast(root(squares(x(1, 6, name="one"))), (3, 6))),
        ["t.mul", "t.mean", "t.add", "t.rsqrt", "t.broadcast", "t.mul"],
    ),
    "centred over another axis": (
        e.Mul(centred(CUBE, 1), root(squares(centred(CUBE, 1), 2))),
        ["t.mean", "t.sub", "llm.rms_norm"],
    ),
    "centred over more axes": (
        e.Mul(centred(CUBE, 1, 2), root(squares(centred(CUBE, 1, 2), 2))),
        ["t.mean", "t.sub", "llm.rms_norm"],
    ),
    "the mean of another value": (
        e.Mul(e.Sub(X, s.Mean(Y, (2,))), root(squares(e.Sub(X, s.Mean(Y, (2,))), 2))),
        ["t.mean", "t.sub", "llm.rms_norm"],
    ),
    "an expanded variance over two axes": (
        e.Mul(centred(CUBE, 1, 2), root(expanded(CUBE, CUBE, (1, 2), (1, 2)))),
        ["t.reshape", "llm.layer_norm", "t.reshape"],
    ),
    "an expanded variance, not centred": (
        e.Mul(ROWS, root(expanded(ROWS, ROWS, (1,), (1,)))),
        ["t.mul", "t.mean", "t.mean", "t.mul", "t.sub", "t.add", "t.rsqrt", "t.mul"],
    ),
    "an expanded variance of other axes": (
        e.Mul(centred(CUBE), root(expanded(CUBE, CUBE, (1, 2), (2,)))),
        ["t.mean", "t.sub", "t.mul", "t.mean", "t.mul", "t.sub", "t.add", "t.rsqrt", "t.mul"],
    ),
    "an expanded variance of another mean": (
        e.Mul(centred(X), root(expanded(X, Y, (2,), (2,)), 1e3)),
        ["t.mean", "t.sub", "t.mul", "t.mean", "t.mean", "t.mul", "t.sub", "t.add", "t.rsqrt", "t.mul"],
    ),
    "an expanded variance of the columns": (
        e.Mul(centred(ROWS, 0), root(expanded(ROWS, ROWS, (0,), (0,)))),
        ["t.mean", "t.sub", "t.mul", "t.mean", "t.mul", "t.sub", "t.add", "t.rsqrt", "t.mul"],
    ),
    "a product in place of the squares": (
        e.Mul(centred(X), root(e.Sub(s.Mean(e.Mul(X, Y), (2,)), e.Mul(s.Mean(X, (2,)), s.Mean(X, (2,)))), 1e3)),
        ["t.mean", "t.sub", "t.mul", "t.mean", "t.mul", "t.sub", "t.add", "t.rsqrt", "t.mul"],
    ),
    "a double in place of the square": (
        e.Mul(centred(X), root(e.Sub(squares(X), e.Add(s.Mean(X, (2,)), s.Mean(X, (2,)))), 1e3)),
        ["t.mean", "t.sub", "t.mul", "t.mean", "t.add", "t.sub", "t.add", "t.rsqrt", "t.mul"],
    ),
    "a sum in place of the mean of squares": (
        e.Mul(centred(X), root(e.Sub(s.Sum(e.Mul(X, X), (2,)), e.Mul(s.Mean(X, (2,)), s.Mean(X, (2,)))), 1e3)),
        ["t.mean", "t.sub", "t.mul", "t.sum", "t.mul", "t.sub", "t.add", "t.rsqrt", "t.mul"],
    ),
    "over a last axis of free size": (
        rms(x(3, S, name="free")), ["t.mul", "t.mean", "t.add", "t.rsqrt", "t.mul"],
    ),
    "an axis of one that is dropped": (
        e.Mul(s.Reshape(rms(x(5, 1, name="ones")), (5,)), param("w", 5, dtype="f32")),
        ["llm.rms_norm", "t.reshape", "t.mul"],
    ),
    "channels of a cube as two axes": (
        e.Mul(s.Reshape(rms(CUBE), (3, 4, 2, 3)), param("w", 2, 3, dtype="f32")),
        ["t.reshape", "llm.rms_norm", "t.reshape"],
    ),
    "two weights": (e.Mul(e.Mul(rms(X), W), param("v", 6, dtype="f32")), ["llm.rms_norm", "t.mul"]),
    "a weight behind a bias": (
        e.Mul(e.Add(layer(X), param("b", 6, dtype="f32")), W),
        ["llm.layer_norm", "t.mul"],
    ),
    "a bias behind an rms norm": (e.Add(rms(X), W), ["llm.rms_norm", "t.add"]),
    "a matrix as bias": (e.Add(layer(ROWS), param("b", 4, 6, dtype="f32")), ["llm.layer_norm", "t.add"]),
    "a weight of more rows": (e.Mul(rms(ROWS), s.Reshape(W, (1, 1, 6))), ["llm.rms_norm", "t.reshape", "t.mul"]),
    "a bias of more rows": (e.Add(layer(ROWS), s.Reshape(W, (1, 1, 6))), ["llm.layer_norm", "t.reshape", "t.add"]),
    "a layer norm's weight plus one": (e.Mul(layer(X), e.Add(W, c(1))), ["t.add", "llm.layer_norm"]),
    "a weight plus a vector": (e.Mul(rms(X), e.Add(W, param("v", 6, dtype="f32"))), ["t.add", "llm.rms_norm"]),
    "a number plus one as weight": (
        e.Mul(rms(X), e.Add(s.Broadcast(param("u", 1, dtype="f32"), (6,)), c(1))),
        ["t.broadcast", "llm.rms_norm"],
    ),
    # A reshape between a norm and its weight.
    "rows dealt out": (
        e.Mul(s.Reshape(rms(ROWS), (2, 2, 6)), param("w", 2, 6, dtype="f32")),
        ["llm.rms_norm", "t.reshape", "t.mul"],
    ),
    "rows cut anew": (
        e.Mul(s.Reshape(rms(ROWS), (6, 4)), param("w", 4, dtype="f32")),
        ["llm.rms_norm", "t.reshape", "t.mul"],
    ),
    "channels as two axes": (
        e.Mul(s.Reshape(rms(ROWS), (4, 2, 3)), param("w", 2, 3, dtype="f32")),
        ["t.reshape", "llm.rms_norm", "t.reshape"],
    ),
    "a weight for the last of two axes": (
        e.Mul(s.Reshape(rms(ROWS), (4, 2, 3)), param("w", 3, dtype="f32")),
        ["llm.rms_norm", "t.reshape", "t.mul"],
    ),
    "a weight for every row and two axes": (
        e.Mul(s.Reshape(rms(ROWS), (4, 2, 3)), param("w", 4, 2, 3, dtype="f32")),
        ["llm.rms_norm", "t.reshape", "t.mul"],
    ),
    "a weight with a one in front of two axes": (
        e.Mul(s.Reshape(rms(ROWS), (4, 2, 3)), param("w", 1, 2, 3, dtype="f32")),
        ["t.reshape", "llm.rms_norm", "t.reshape"],
    ),
    # Casts.
    "cast to another dtype": (
        e.Cast(llm.RMSNorm(e.Cast(x(1, S, 6, name="h", dtype="bf16"), "f32"), None, 1e-5), "f16"),
        ["t.cast", "llm.rms_norm", "t.cast"],
    ),
    "nothing was widened": (e.Cast(llm.RMSNorm(X, None, 1e-5), "bf16"), ["llm.rms_norm", "t.cast"]),
    "a cast that rounds in front": (
        e.Cast(llm.RMSNorm(e.Cast(X, "bf16"), None, 1e-5), "f32"),
        ["t.cast", "llm.rms_norm", "t.cast"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_what_becomes_of_a_value_like_a_norm(name: str) -> None:
    value, expected = NORMS[name]
    check(value, "cse,fuse-norm", expected)


def test_a_weight_that_does_not_fit_is_named_once() -> None:
    report = check(e.Mul(rms(ROWS), s.Reshape(W, (1, 1, 6))), "cse,fuse-norm", ["llm.rms_norm", "t.reshape", "t.mul"])
    assert [why for _, why in report.refusals] == ["the weight of [1, 1, 6] is no vector of 6"]


# Linears

MATRIX = param("m", 6, 7, dtype="f32")
LINEAR: dict[str, tuple[Value, list[str], str]] = {
    "a matrix under leading ones": (
        s.Matmul(x(2, 3, 4, 6, name="q"), s.Reshape(MATRIX, (1, 1, 6, 7))),
        ["t.transpose", "llm.linear"],
        "",
    ),
    "a matrix spread over a batch": (
        s.Matmul(x(3, 4, 6, name="q"), s.Broadcast(MATRIX, (3, 6, 7))),
        ["t.transpose", "llm.linear"],
        "",
    ),
    "a weight of rank 3 with a one": (
        s.Matmul(x(2, 4, 6, name="q"), param("w", 1, 6, 7, dtype="f32")),
        ["t.reshape", "t.transpose", "llm.linear"],
        "",
    ),
    "a reshape that cuts the weight": (
        s.Matmul(x(2, 4, 6, name="q"), s.Reshape(param("w", 12, 7, dtype="f32"), (2, 6, 7))),
        ["t.reshape", "t.matmul"],
        "the weight has rank 3: one matrix a batch element",
    ),
    "a broadcast of several matrices": (
        s.Matmul(x(2, 3, 4, 6, name="q"), s.Broadcast(param("w", 3, 6, 7, dtype="f32"), (2, 3, 6, 7))),
        ["t.broadcast", "t.matmul"],
        "the weight has rank 4: one matrix a batch element",
    ),
    "a row spread to a matrix": (
        s.Matmul(x(2, 4, 6, name="q"), s.Broadcast(param("w", 1, 7, dtype="f32"), (1, 6, 7))),
        ["t.broadcast", "t.reshape", "t.transpose", "llm.linear"],
        "",
    ),
    "a vector spread to a matrix": (
        s.Matmul(x(2, 4, 6, name="q"), s.Broadcast(param("w", 7, dtype="f32"), (1, 6, 7))),
        ["t.broadcast", "t.reshape", "t.transpose", "llm.linear"],
        "",
    ),
    "flattened rows": (
        s.Matmul(s.Reshape(CUBE, (12, 6)), MATRIX),
        ["t.transpose", "llm.linear", "t.reshape"],
        "",
    ),
    "rows cut anew": (
        s.Matmul(s.Reshape(x(4, 3, name="q"), (2, 6)), MATRIX),
        ["t.reshape", "t.transpose", "llm.linear"],
        "",
    ),
    "a vector as a row": (
        s.Matmul(s.Reshape(x(6, name="v"), (1, 6)), MATRIX),
        ["t.reshape", "t.transpose", "llm.linear"],
        "",
    ),
    "a weight on the left of a batch": (
        s.Matmul(param("w", 5, 4, dtype="f32"), CUBE),
        ["t.matmul"],
        "",
    ),
    "a batch of weights on the left": (
        s.Matmul(param("w", 3, 5, 4, dtype="f32"), ROWS),
        ["t.matmul"],
        "",
    ),
    "a weight on the left of rows": (
        s.Matmul(param("w", 5, 4, dtype="f32"), ROWS),
        ["t.transpose", "llm.linear", "t.transpose"],
        "",
    ),
    "a weight on the left of columns": (
        s.Matmul(param("w", 5, 6, dtype="f32"), s.Transpose(ROWS, (1, 0))),
        ["llm.linear", "t.transpose"],
        "",
    ),
    "whole numbers on the left": (
        s.Matmul(e.constant([[1, 2]], "i64"), x(2, 6, name="n", dtype="i64")),
        ["t.matmul"],
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_what_becomes_of_a_product(name: str) -> None:
    value, expected, reason = LINEAR[name]
    report = check(value, "fuse-linear", expected, tolerance=1e-12)
    assert [why for _, why in report.refusals] == ([reason] if reason else [])


def linear(bias: Value | None = None, activation: str = "", residual: Value | None = None) -> llm.Linear:
    return llm.Linear(ROWS, param("w", 6, 6, dtype="f32"), bias, residual, activation)


B = param("b", 6, dtype="f32")
BIASES: dict[str, tuple[Value, list[str], str]] = {
    "behind a reshape": (e.Add(s.Reshape(linear(), (2, 2, 6)), B), ["llm.linear", "t.reshape"], ""),
    "behind a reshape of the outputs": (
        e.Add(s.Reshape(linear(), (4, 2, 3)), param("c", 3, dtype="f32")),
        ["llm.linear", "t.reshape", "t.add"],
        "",
    ),
    "of a reshape that is used again": (
        e.Mul(e.Add(s.Reshape(linear(), (2, 2, 6)), B), s.Reshape(linear(), (2, 2, 6))),
        ["llm.linear", "t.reshape", "t.add", "t.mul"],
        "the product is also used without its bias",
    ),
    "that gives more rows": (
        e.Add(linear(), s.Reshape(B, (1, 1, 6))),
        ["llm.linear", "t.reshape", "t.add"],
        "",
    ),
    "behind an activation": (e.Add(linear(activation="silu"), B), ["llm.linear", "t.add"], ""),
    "behind a residual": (e.Add(linear(residual=x(4, 6, name="r")), B), ["llm.linear", "t.add"], ""),
    "behind another": (e.Add(linear(param("a", 6, dtype="f32")), B), ["llm.linear", "t.add"], ""),
    "of one row a token": (
        e.Add(linear(), param("c", 4, 1, dtype="f32")),
        ["llm.linear", "t.add"],
        "the addend of [4, 1] is no vector of 6 outputs",
    ),
    "that is one number": (e.Add(linear(), param("c", 1, 1, dtype="f32")), ["llm.linear", "t.add"], ""),
    "on the left": (e.Add(B, linear()), ["llm.linear"], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_what_becomes_of_a_bias(name: str) -> None:
    value, expected, reason = BIASES[name]
    report = check(value, "cse,fuse-linear", expected, tolerance=1e-12)
    assert [why for _, why in report.refusals] == ([reason] if reason else [])


# Activations

ROOT = math.sqrt(2 / math.pi)


def gate(argument: Value) -> Value:
    return e.Mul(X, e.Sigmoid(argument))


def halved(inner: Value) -> Value:
    return e.Mul(e.Mul(c(0.5), X), e.Add(c(1), inner))


CUBIC = e.Add(e.Mul(X, c(ROOT)), e.Mul(e.Pow(X, c(3)), c(ROOT * 0.044715)))
HALF_ERF = e.Erf(e.Mul(X, c(math.sqrt(0.5))))
ACTIVE = ["t.activation"]
ACTIVATIONS: dict[str, tuple[Value, list[str] | None]] = {  # None: no activation
    "minus an argument that is negated": (e.Mul(X, e.Sigmoid(e.Neg(e.Neg(X)))), ACTIVE),
    "a difference": (gate(e.Sub(e.Mul(X, c(3)), e.Mul(X, c(2)))), ACTIVE),
    "a quotient": (gate(e.Div(e.Mul(X, c(3)), c(3))), ACTIVE),
    "a power of one": (gate(e.Pow(X, c(1))), ACTIVE),
    "constants that cancel": (gate(e.Sub(e.Add(X, c(2)), c(2))), ACTIVE),
    "minus x": (gate(e.Neg(X)), None),
    "a square": (gate(e.Pow(X, c(2))), None),
    "one more": (gate(e.Add(X, c(1))), None),
    "a quotient by x": (gate(e.Div(c(1), X)), None),
    "a quotient by 0": (gate(e.Div(X, c(0))), None),
    "a power of four": (gate(e.Pow(X, c(4))), None),
    "a power of a half": (gate(e.Pow(e.Abs(X), c(0.5))), None),
    "a power that is no number": (gate(e.Pow(X, Y)), None),
    "a degree above six": (gate(e.Mul(e.Pow(X, c(3)), e.Mul(e.Pow(X, c(3)), X))), None),
    "a sixth power that cancels": (
        gate(e.Add(X, e.Sub(e.Mul(e.Pow(X, c(3)), e.Pow(X, c(3))), e.Mul(e.Pow(X, c(3)), e.Pow(X, c(3)))))),
        ACTIVE,
    ),
    "another value inside": (gate(e.Add(X, Y)), None),
    "an exponential inside": (gate(e.Exp(X)), None),
    "erf and tanh mixed up": (halved(e.Erf(CUBIC)), None),
    "tanh and erf mixed up": (halved(e.Tanh(e.Mul(X, c(math.sqrt(0.5))))), None),
    "silu by tanh": (halved(e.Tanh(e.Mul(X, c(1)))), None),
    "gelu by sigmoid": (gate(e.Mul(X, c(math.sqrt(0.5)))), None),
    "a constant of eight digits": (gate(e.Mul(X, c(1.7020002))), ACTIVE),
    "a constant of five digits": (gate(e.Mul(X, c(1.70202))), None),
    "one minus": (e.Mul(e.Mul(c(0.5), X), e.Sub(c(1), HALF_ERF)), None),
    "twice the error function": (e.Mul(e.Mul(c(0.5), X), e.Add(c(1), e.Mul(c(2), HALF_ERF))), None),
    "no one at all": (e.Mul(e.Mul(c(0.5), X), HALF_ERF), None),
    "two error functions": (e.Mul(e.Mul(c(0.5), X), e.Add(HALF_ERF, HALF_ERF)), None),
    "of a row, for each row": (e.Mul(x(6, name="v"), e.Sigmoid(s.Broadcast(x(6, name="v"), (3, 6)))), None),
    "a number times its own gate": (e.Mul(e.Mul(c(2), X), e.Sigmoid(Y)), None),
    "an activation squared": (e.Mul(e.Activation(X, "silu"), e.Activation(X, "silu")), None),
    "x squared times its gate": (e.Mul(e.Mul(X, X), e.Sigmoid(X)), None),
    "two gates": (e.Mul(gate(X), e.Sigmoid(Y)), ["t.activation", "t.sigmoid", "t.mul"]),
    "minus": (e.Mul(e.Neg(X), e.Sigmoid(X)), ["t.activation", "t.mul"]),
    "a quotient by two": (e.Div(gate(X), c(2)), ["t.activation", "t.div"]),
    "a scaled half": (e.Mul(c(4), e.Mul(c(0.25), gate(X))), ["t.activation"]),
    "scaled by less than a rounding": (e.Mul(c(1 + 2**-22), gate(X)), ACTIVE),
    "scaled by a little": (e.Mul(c(1.001), gate(X)), ["t.activation", "t.mul"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_becomes_of_a_value_like_an_activation(name: str) -> None:
    value, expected = ACTIVATIONS[name]
    after, _ = run_checked(graph_of(value), "cse,fuse-activation", tolerance=2e-5)
    assert (
        names(after) == expected
        if expected
        else not any(isinstance(op, e.Activation) and op not in graph_of(value).ops for op in after.ops)
    )
