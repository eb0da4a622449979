"""exp, tanh, erf and the activations built on them, as vector expressions accurate to f32.

Inputs and results are f32 vector expressions over any `VectorIsa`; absolute errors are below 1e-6 (exp: relative,
about 1.5 units in the last place). Polynomials were fitted at Chebyshev nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.targets.cpu.vector_isa import VectorIsa, bind
from llmc.targets.cpu.vectors import splat

if TYPE_CHECKING:
    from tvm.tirx import Expr

ACTIVATIONS = ("none", "relu", "relu2", "gelu", "gelu_tanh", "silu", "quick_gelu", "sigmoid", "tanh")

# (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2
_EXP = (0.5, 0.1666666716337204, 0.04166646674275398, 0.0083332983776927, 0.0013933652080595493, 0.000198992871446535)
# erfc(x) * exp(x^2) / t with t = 1 / (1 + 0.4 x), for x in [0, 4.2]
_ERFC = (
    0.224659726023674,
    0.23970533907413483,
    0.1243261992931366,
    0.44790327548980713,
    -0.4327142834663391,
    0.7364450693130493,
    -0.4197891354560852,
    0.07946383208036423,
)


def polynomial(isa: VectorIsa, coefficients: Sequence[float], x: Expr) -> Expr:
    """sum c_i x^i by Horner's rule. `x` must be a variable: it is repeated."""
    result = splat(coefficients[-1], isa.lanes)
    for c in coefficients[-2::-1]:
        result = isa.fma(result, x, splat(c, isa.lanes))
    return result


def exp(isa: VectorIsa, x: Expr) -> Expr:
    """e^x. Below -87.33 (where the result would be denormal) it is 0, -inf included; above 88.37 it stays e^88.37."""
    from tvm import tirx

    def reduced(clamped: Expr) -> Expr:
        turns = tirx.nearbyint(clamped * 1.4426950408889634)
        return bind(turns, lambda n: scaled(clamped, n))

    def scaled(clamped: Expr, n: Expr) -> Expr:
        # ln 2 in two parts, the first with few enough bits that n times it is exact.
        rest = isa.fma(n, splat(2.12194440e-4, isa.lanes), isa.fma(n, splat(-0.693359375, isa.lanes), clamped))
        power = tirx.reinterpret(isa.f32, (n.astype(isa.i32) + 127) << 23)

        def value(r: Expr) -> Expr:
            tail = isa.fma(polynomial(isa, _EXP, r), r * r, r)
            return (tail + 1.0) * power

        return bind(rest, value)

    def guarded(v: Expr) -> Expr:
        clamped = tirx.Min(tirx.Max(v, splat(-87.33, isa.lanes)), splat(88.37, isa.lanes))
        return tirx.Select(v < -87.33, splat(0.0, isa.lanes), bind(clamped, reduced))

    return bind(x, guarded)


def sigmoid(isa: VectorIsa, x: Expr) -> Expr:
    """1 / (1 + e^-x), and 0 where `exp` ends: what x is multiplied with then vanishes, however large x is."""
    from tvm import tirx

    def value(v: Expr) -> Expr:
        found = 1.0 / (1.0 + exp(isa, 0.0 - v))
        return tirx.Select(v < -88.37, splat(0.0, isa.lanes), found)

    return bind(x, value)


def _with_sign(isa: VectorIsa, magnitude: Expr, x: Expr) -> Expr:
    from tvm import tirx

    sign = tirx.reinterpret(isa.i32, x) & -0x80000000
    return tirx.reinterpret(isa.f32, tirx.reinterpret(isa.i32, magnitude) | sign)


def tanh(isa: VectorIsa, x: Expr) -> Expr:
    """tanh x = sign(x) * (1 - 2 / (e^(2|x|) + 1))."""

    def signed(v: Expr) -> Expr:
        power = exp(isa, isa.magnitude(v) * 2.0)
        return _with_sign(isa, 1.0 - 2.0 / (power + 1.0), v)

    return bind(x, signed)


def erf(isa: VectorIsa, x: Expr) -> Expr:
    """erf x = sign(x) * (1 - t p(t) e^(-x^2)), t = 1 / (1 + 0.4 |x|); p is fitted (form: A&S 7.1.26)."""

    def signed(v: Expr) -> Expr:
        def value(t: Expr) -> Expr:
            tail = polynomial(isa, _ERFC, t) * t * exp(isa, 0.0 - v * v)
            return _with_sign(isa, 1.0 - tail, v)

        return bind(1.0 / isa.fma(isa.magnitude(v), splat(0.4, isa.lanes), splat(1.0, isa.lanes)), value)

    return bind(x, signed)


def activation(isa: VectorIsa, name: str, x: Expr) -> Expr:
    """One of ACTIVATIONS: gelu is the exact one (erf), gelu_tanh its tanh form, quick_gelu x * sigmoid(1.702 x)."""
    from tvm import tirx

    if name == "none":
        return x
    if name == "relu":
        return tirx.Max(x, splat(0.0, isa.lanes))
    if name == "relu2":
        return bind(tirx.Max(x, splat(0.0, isa.lanes)), lambda v: v * v)
    if name == "sigmoid":
        return bind(x, lambda v: sigmoid(isa, v))
    if name == "tanh":
        return bind(x, lambda v: tanh(isa, v))
    if name == "silu":
        return bind(x, lambda v: v * sigmoid(isa, v))
    if name == "quick_gelu":
        return bind(x, lambda v: v * sigmoid(isa, v * 1.702))
    if name == "gelu":
        return bind(x, lambda v: 0.5 * v * (1.0 + erf(isa, v * 0.7071067811865476)))
    if name == "gelu_tanh":
        # 0.5 x (1 + tanh(y)) is x * sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3).
        def value(v: Expr) -> Expr:
            twice = v * isa.fma(
                v * v, splat(2 * 0.7978845608028654 * 0.044715, isa.lanes), splat(2 * 0.7978845608028654, isa.lanes)
            )
            return v * sigmoid(isa, twice)

        return bind(x, value)
    raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
