"""Recognise activations by their formulas: t.activation from products of sigmoid, tanh and erf.

Models write one function in many orders (0.5 * x * (1 + tanh(c * (x + a * x^3))), x * 0.5 * (1 + tanh(b * x * (1 +
a * x * x))), ...). So a product is compared as a set of factors and a coefficient, and the argument of sigmoid, tanh
or erf as a polynomial in x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from llmc.compiler.ir.elementwise import Activation, Add, Div, Erf, Mul, Neg, Pow, Relu, Sigmoid, Sub, Tanh
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.types import NUMPY_DTYPES
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.rewriting import Uses, number, number_of, rewrite_counting

Polynomial = dict[int, float]

_ROOT = math.sqrt(2 / math.pi)
# Each gate: kind, the op inside, what that op's argument is as a polynomial in x. gelu is x * (1 + erf(x / sqrt 2)) / 2
# and its tanh form x * (1 + tanh(u)) / 2 = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
_GATES: tuple[tuple[str, type[Op], Polynomial], ...] = (
    ("silu", Sigmoid, {1: 1.0}),
    ("quick_gelu", Sigmoid, {1: 1.702}),
    ("gelu_tanh", Sigmoid, {1: 2 * _ROOT, 3: 2 * _ROOT * 0.044715}),
    ("gelu", Erf, {1: math.sqrt(0.5)}),
    ("gelu_tanh", Tanh, {1: _ROOT, 3: _ROOT * 0.044715}),
)
_TOLERANCE = 5e-7  # a few constants, each rounded to f32
_PRINTED = 1.5e-5  # some sources print sqrt(2) and sqrt(2 / pi) with as few as five digits: 1.4142, 0.79788
_DEPTH = 8  # formulas are no deeper than this; anything deeper is another one


def polynomial(value: Value, x: Value, depth: int = _DEPTH) -> Polynomial | None:
    """`value` as a polynomial in `x`: coefficients by power. None when it is none of a small degree."""
    if value is x:
        return {1: 1.0}
    constant = number_of(value)
    if constant is not None:
        return {0: float(constant)}
    if depth == 0:
        return None
    if isinstance(value, Neg):
        inner = polynomial(value.x, x, depth - 1)
        return None if inner is None else {power: -c for power, c in inner.items()}
    if isinstance(value, Pow):
        return _power(polynomial(value.a, x, depth - 1), number_of(value.b))
    if not isinstance(value, (Add, Sub, Mul, Div)):
        return None
    a, b = polynomial(value.a, x, depth - 1), polynomial(value.b, x, depth - 1)
    if a is None or b is None:
        return None
    if isinstance(value, Mul):
        return _multiply(a, b)
    if isinstance(value, Div):
        return {power: c / b[0] for power, c in a.items()} if set(b) == {0} and b[0] else None
    sign = -1 if isinstance(value, Sub) else 1
    return {power: a.get(power, 0.0) + sign * b.get(power, 0.0) for power in {*a, *b}}


def _multiply(a: Polynomial, b: Polynomial) -> Polynomial | None:
    result: Polynomial = {}
    for p, c in a.items():
        for q, d in b.items():
            result[p + q] = result.get(p + q, 0.0) + c * d
    return result if max(result) <= 6 else None


def _power(base: Polynomial | None, exponent: float | None) -> Polynomial | None:
    if base is None or exponent is None or exponent not in (1, 2, 3):
        return None
    result: Polynomial | None = base
    for _ in range(int(exponent) - 1):
        result = None if result is None else _multiply(result, base)
    return result


def _alike(a: Polynomial, b: Polynomial, tolerance: float = _TOLERANCE) -> bool:
    """Equal to a relative tolerance; coefficients that cancelled do not count."""
    return all(abs(a.get(p, 0.0) - b.get(p, 0.0)) <= tolerance * max(abs(b.get(p, 0.0)), 1e-4) for p in {*a, *b})


def _rounding(value: Value, x: Value) -> float:
    """How far coefficients may be off because every constant of a formula was rounded to f16, or to bf16."""
    constants: list[float] = []
    seen: set[Value] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if item is x or item in seen:
            continue
        seen.add(item)
        number_here = number_of(item)
        if number_here is not None:
            constants.append(float(number_here))
        elif isinstance(item, Op):
            stack.extend(item.operands)
    for dtype, tolerance in (("bf16", 2**-7), ("f16", 2**-10)):
        if all(float(NUMPY_DTYPES[dtype].type(c)) == c for c in constants):
            return tolerance
    return 0.0


def factors(value: Value, whole: Value | None = None, depth: int = 4) -> tuple[float, list[Value]]:
    """A product as a coefficient and the values that are multiplied, `whole` not taken apart."""
    if value is whole:
        return 1.0, [value]
    constant = number_of(value)
    if constant is not None:
        return float(constant), []
    if depth and isinstance(value, Neg):
        coefficient, leaves = factors(value.x, whole, depth - 1)
        return -coefficient, leaves
    if depth and isinstance(value, Div):
        divisor = number_of(value.b)
        if divisor:
            coefficient, leaves = factors(value.a, whole, depth - 1)
            return coefficient / float(divisor), leaves
    if depth and isinstance(value, Mul):
        (c, a), (d, b) = factors(value.a, whole, depth - 1), factors(value.b, whole, depth - 1)
        return c * d, a + b
    return 1.0, [value]


def _partial_products(value: Value, depth: int = 4) -> Iterator[Value]:
    """The values that a product is built from, whole parts before their own factors."""
    if depth and isinstance(value, (Mul, Div, Neg)):
        for operand in value.operands:
            yield operand
            yield from _partial_products(operand, depth - 1)


def _gate(value: Value) -> tuple[Op, float] | None:
    """(inner op, c) when `value` is c * sigmoid(..), or c * (1 + tanh(..)) or c * (1 + erf(..))."""
    if isinstance(value, Sigmoid):
        return value, 1.0
    if not isinstance(value, Add):
        return None
    for term in (value.a, value.b):
        _, leaves = factors(term)
        if len(leaves) != 1 or not isinstance(leaves[0], (Tanh, Erf)):
            continue
        inner = leaves[0]
        line = polynomial(value, inner)
        if line is not None and line[1] and _alike(line, {0: line[1], 1: line[1]}):
            return inner, line[1]
    return None


@dataclass(frozen=True)
class FuseActivation(Pass, name="fuse-activation"):
    """silu, gelu (erf and tanh), quick_gelu, relu and relu squared -> t.activation."""

    def _tolerance(self, argument: Value, x: Value) -> float:
        """How far the coefficients of a gate's argument may be from the formula's."""
        return _TOLERANCE

    def run(self, graph: Graph, report: Report) -> Graph:
        def rule(op: Op, uses: Uses) -> Value | None:
            if isinstance(op, Relu) and op.dtype.startswith(("f", "bf")):
                report.hit("relu")
                return Activation(op.x, "relu")
            if not isinstance(op, Mul):
                return None
            if op.a is op.b:
                return self._squared(op.a, report)
            return self._gated(op, report)

        return rewrite_counting(graph, rule)

    def _squared(self, value: Value, report: Report) -> Value | None:
        if isinstance(value, Activation) and value.kind == "relu":
            report.hit("relu2")
            return Activation(value.x, "relu2")
        return None

    def _gated(self, op: Mul, report: Report) -> Value | None:
        coefficient, leaves = factors(op)
        if len(leaves) == 1 and isinstance(leaves[0], Activation) and not isinstance(op.a, Activation):
            # c * (d * activation(x)), of which one factor was the activation's own; c may be a number for each of many.
            return _scaled(leaves[0], coefficient) if leaves[0].shape == op.shape else None
        if not any(_gate(leaf) for leaf in leaves):
            return None
        near_miss = ""
        # x may be a product itself, such as a scaled one: it is tried whole before its factors are.
        for x in dict.fromkeys(_partial_products(op)):
            if x.shape != op.shape or number_of(x) is not None:
                continue
            coefficient, leaves = factors(op, x)
            rest = [leaf for leaf in leaves if leaf is not x]
            found = _gate(rest[0]) if len(leaves) == 2 and len(rest) == 1 else None
            if found is None:
                continue
            inner, scale = found
            argument = polynomial(inner.operands[0], x)
            if argument is None:
                continue
            for kind, gate, expected in _GATES:
                if isinstance(inner, gate) and _alike(argument, expected, self._tolerance(inner.operands[0], x)):
                    report.hit(kind)
                    return _scaled(Activation(x, kind), coefficient * scale * (1 if gate is Sigmoid else 2))
            near_miss = f"x * {inner.name}(p(x)) with p(x) = {_text(argument)}, which is no known activation"
        if near_miss:
            report.refuse(op, near_miss)
        return None


@dataclass(frozen=True)
class FuseHalfActivation(FuseActivation, name="fuse-half-activation"):
    """fuse-activation for formulas whose constants were rounded to f16 or bf16, as models in those dtypes have them,
    or printed with few digits.

    What they mean is the formula with its own constants, so that this changes results a little.
    """

    exact: ClassVar[bool] = False
    moves: ClassVar[float] = 2.0**-6  # a few constants, each rounded to bf16 at worst: 2^-8

    def _tolerance(self, argument: Value, x: Value) -> float:
        return max(_PRINTED, _rounding(argument, x))


def _scaled(value: Value, coefficient: float) -> Value:
    if abs(coefficient - 1) <= 1e-6:
        return value
    return Mul(value, number(coefficient, value))


def _text(terms: Polynomial) -> str:
    return " + ".join(f"{c:.6g} x^{power}" for power, c in sorted(terms.items()))
