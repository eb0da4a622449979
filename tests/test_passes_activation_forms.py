"""How fuse-activation reads a formula: as a polynomial and as factors, how deep, and how close its numbers must be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from pass_harness import c, graph_of, names, run_checked, x

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Value
from llmc.compiler.passes import fuse_activation
from llmc.compiler.passes.fuse_activation import Polynomial, _partial_products, factors, polynomial
from llmc.errors import CompileError

X, Y = x(), x(name="y")
ROW = x(6, name="row")
ROOT = math.sqrt(2 / math.pi)
Step = Callable[[Value], Value]

POLYNOMIALS: dict[str, tuple[Value, Polynomial | None]] = {
    "x": (X, {1: 1}),
    "a number": (c(3), {0: 3}),
    "-x": (e.Neg(X), {1: -1}),
    "x ** 1": (e.Pow(X, c(1)), {1: 1}),
    "x ** 2": (e.Pow(X, c(2)), {2: 1}),
    "(x + 2) ** 3": (e.Pow(e.Add(X, c(2)), c(3)), {0: 8, 1: 12, 2: 6, 3: 1}),
    "x ** 4": (e.Pow(X, c(4)), None),
    "a root": (e.Pow(X, c(0.5)), None),
    "x ** x": (e.Pow(X, X), None),
    "y ** 2": (e.Pow(Y, c(2)), None),
    "y ** 1": (e.Pow(Y, c(1)), None),
    "a quotient": (e.Div(e.Sub(X, c(2)), c(4)), {0: -0.5, 1: 0.25}),
    "a quotient by 0": (e.Div(X, c(0)), None),
    "a quotient by x": (e.Div(c(1), X), None),
    "a quotient by a sum": (e.Div(X, e.Add(X, c(1))), None),
    "a sum": (e.Add(e.Mul(X, X), e.Mul(c(3), X)), {1: 3, 2: 1}),
    "a difference": (e.Sub(e.Mul(X, c(3)), e.Mul(X, X)), {1: 3, 2: -1}),
    "a sixth power": (e.Mul(e.Pow(X, c(3)), e.Pow(X, c(3))), {6: 1}),
    "a seventh power": (e.Mul(e.Mul(e.Pow(X, c(3)), e.Pow(X, c(3))), X), None),
    "another value": (e.Add(X, Y), None),
    "another op": (e.Exp(X), None),
}


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_a_value_is_read_as_a_polynomial(name: str) -> None:
    value, expected = POLYNOMIALS[name]
    assert polynomial(value, X) == expected


def nested(step: Step, times: int) -> Value:
    value: Value = X
    for _ in range(times):
        value = step(value)
    return value


DEEPER: dict[str, Step] = {
    "neg": e.Neg,
    "pow": lambda v: e.Pow(v, c(1)),
    "left": lambda v: e.Mul(v, c(1)),
    "right": lambda v: e.Mul(c(1), v),
    "divided": lambda v: e.Div(v, c(1)),
}


@pytest.mark.parametrize("name", DEEPER)
def test_a_polynomial_is_read_eight_ops_deep(name: str) -> None:
    """So that a long chain of ops which use their operand twice is not followed for ever."""
    assert set(polynomial(nested(DEEPER[name], 8), X) or {}) == {1}
    assert polynomial(nested(DEEPER[name], 9), X) is None


@pytest.mark.parametrize("name", [name for name in DEEPER if name != "pow"])
def test_a_product_is_taken_apart_four_ops_deep(name: str) -> None:
    deep = nested(DEEPER[name], 4)
    assert abs(factors(deep)[0]) == 1 and factors(deep)[1] == [X]
    (leaf,) = factors(DEEPER[name](deep))[1]
    assert leaf is not X
    assert X in _partial_products(deep) and X not in _partial_products(DEEPER[name](deep))


def test_a_product_is_a_number_and_what_is_multiplied() -> None:
    gate = e.Tanh(X)
    product = e.Neg(e.Mul(e.Div(e.Mul(c(3), gate), c(4)), e.Mul(Y, c(2))))
    assert factors(product) == (-1.5, [gate, Y])
    whole = e.Mul(c(3), gate)
    assert factors(e.Div(whole, c(4)), whole) == (0.25, [whole])
    for kept in (e.Div(X, Y), e.Div(X, c(0)), e.Add(X, Y)):
        assert factors(kept) == (1.0, [kept])
    assert list(_partial_products(e.Mul(whole, Y))) == [whole, whole.a, gate, Y]


def left(value: Value, pipeline: str) -> list[str]:
    """The ops that are left of a value; what it computes is compared."""
    after, _ = run_checked(graph_of(value), pipeline, tolerance=1e-2)
    return names(after)


def gelu(v: Value, root: float = math.sqrt(0.5)) -> Value:
    return e.Mul(e.Mul(v, e.Add(e.Erf(e.Mul(v, c(root))), c(1))), c(0.5))


def gelu_tanh(v: Value, cube: float = 0.044715) -> Value:
    inner = e.Mul(c(ROOT), e.Add(v, e.Mul(c(cube), e.Pow(v, c(3)))))
    return e.Mul(c(0.5), e.Mul(v, e.Add(c(1), e.Tanh(inner))))


def silu(v: Value) -> Value:
    return e.Mul(v, e.Sigmoid(v))


SIGMOID = e.Sigmoid(Y)
EXACT: dict[str, tuple[Value, list[str]]] = {
    "gelu": (gelu(X), ["t.activation"]),
    "a number first": (gelu_tanh(X), ["t.activation"]),
    "silu of a sigmoid": (silu(SIGMOID), ["t.sigmoid", "t.activation"]),
    "silu of what is spread": (
        e.Mul(e.Mul(ROW, s.Broadcast(c(2), (3, 6))), e.Sigmoid(ROW)),
        ["t.broadcast", "t.mul", "t.sigmoid", "t.mul"],
    ),
    "a sigmoid twice": (e.Mul(e.Sigmoid(X), e.Mul(e.Sigmoid(X), c(2))), ["t.sigmoid", "t.mul", "t.mul"]),
    "two sigmoids": (e.Mul(e.Sigmoid(X), e.Sigmoid(Y)), ["t.sigmoid", "t.sigmoid", "t.mul"]),
    "an activation and another factor": (
        e.Mul(e.Mul(e.Activation(X, "silu"), c(2)), Y), ["t.activation", "t.mul", "t.mul"],
    ),
    "an activation, twice and halved": (
        e.Mul(e.Mul(e.Activation(X, "silu"), c(2)), c(0.5)), ["t.activation"],
    ),
    "an activation, twice and halved for each row": (
        e.Mul(e.Mul(e.Activation(ROW, "silu"), c(2)), s.Broadcast(c(0.5), (3, 6))),
        ["t.activation", "t.mul", "t.broadcast", "t.mul"],
    ),
    "an activation, moved a little": (
        e.Mul(X, e.Sigmoid(e.Add(X, c(3e-7)))), ["t.add", "t.sigmoid", "t.mul"],
    ),
    "another cube by a little": (
        gelu_tanh(X, 0.0447152), ["t.pow", "t.mul", "t.add", "t.mul", "t.tanh", "t.add", "t.mul", "t.mul"],
    ),
    "a gate times 0": (
        e.Mul(X, e.Add(e.Mul(e.Tanh(X), c(0)), c(0))), ["t.tanh", "t.mul", "t.add", "t.mul"],
    ),
    "a gate with a square": (
        e.Mul(X, e.Add(e.Tanh(X), e.Add(e.Mul(e.Tanh(X), e.Tanh(X)), c(1)))),
        ["t.tanh", "t.mul", "t.add", "t.add", "t.mul"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_product_is_an_activation_or_left_as_it_is(name: str) -> None:
    value, expected = EXACT[name]
    assert left(value, "cse,fuse-activation") == expected


@pytest.mark.parametrize("name", ["nothing", "too little", "another power"])
def test_a_gate_adds_as_much_as_it_scales(name: str) -> None:
    """c * (1 + tanh(u)), for any c; not a sum of tanh(u) alone, nor one with another number or a square."""
    tanh = e.Tanh(e.Mul(c(ROOT), e.Add(X, e.Mul(c(0.044715), e.Pow(X, c(3))))))
    right = e.Add(e.Mul(tanh, c(-1)), c(-1))
    assert "t.activation" in left(e.Mul(X, right), "fuse-activation")
    wrong = {
        "nothing": e.Add(e.Mul(tanh, c(-2)), tanh),
        "too little": e.Add(e.Mul(tanh, c(-1)), c(-0.5)),
        "another power": e.Add(right, e.Mul(tanh, tanh)),
    }
    assert "t.activation" not in left(e.Mul(X, wrong[name]), "fuse-activation")


@pytest.mark.parametrize(
    ("root", "known"),
    [
        (182 / 256, True), (183 / 256, False),  # as bf16 has it: 0.5% off, and 1.1%
        (1449 / 2048, True), (1450 / 2048, False),  # as f16 has it: 0.06% off, and 0.13%
        (0.70711, True), (0.7072, False),  # printed with five digits, and with four
    ],
)  # fmt: skip
def test_how_far_a_rounded_constant_may_be_off(root: float, known: bool) -> None:
    assert (left(gelu(X, root), "fuse-half-activation") == ["t.activation"]) == known


def test_a_formula_that_moves_more_than_rounded_constants_do_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^-6 of the largest result is allowed: six times what bf16 takes at worst of one constant."""
    run_checked(graph_of(gelu(X, 182 / 256)), "fuse-half-activation", tolerance=0)
    monkeypatch.setattr(fuse_activation, "_rounding", lambda value, x: 0.2)
    with pytest.raises(CompileError, match=r"fuse-half-activation changed .*; allowed is 0\.015625\."):
        run_checked(graph_of(gelu(X, 0.6)), "fuse-half-activation", tolerance=0)


def test_every_constant_of_a_formula_must_be_rounded() -> None:
    """Those that only make x are none of the formula."""
    scaled = e.Mul(X, c(0.1234567))
    assert left(e.Mul(scaled, e.Sigmoid(e.Mul(scaled, c(1.703125)))), "fuse-half-activation") == [
        "t.mul",
        "t.activation",
    ]
    for argument in (e.Mul(c(1.7), X), e.Mul(X, c(1.7)), e.Mul(e.Mul(c(1.7), X), c(1))):
        assert "t.activation" not in left(e.Mul(X, e.Sigmoid(argument)), "fuse-half-activation")
