"""exp, tanh, erf and the activations built on them, as vector expressions accurate to f32.

Inputs and results are f32 vector expressions over any `VectorIsa`; absolute errors are below 1e-6 (exp: relative,
about 1.5 units in the last place). Polynomials were fitted at Chebyshev nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmc.targets.cpu.vector_isa import VectorIsa, bind

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
    result = isa.splat(coefficients[-1])
    for c in coefficients[-2::-1]:
        result = isa.fma(result, x, isa.splat(c))
    return result


def exp(isa: VectorIsa, x: Expr) -> Expr:
    """e^x. Below -87.33 (where the result would be denormal) it is 0, -inf included; above 88.37 it stays e^88.37."""
    from tvm import tirx

    def reduced(clamped: Expr) -> Expr:
        turns = tirx.nearbyint(clamped * isa.splat(1.4426950408889634))
        return bind(turns, lambda n: scaled(clamped, n))

    def scaled(clamped: Expr, n: Expr) -> Expr:
        # ln 2 in two parts, the first with few enough bits that n times it is exact.
        rest = isa.fma(n, isa.splat(2.12194440e-4), isa.fma(n, isa.splat(-0.693359375), clamped))
        power = tirx.reinterpret(isa.f32, (n.astype(isa.i32) + isa.splat(127, "int32")) << isa.splat(23, "int32"))

        def value(r: Expr) -> Expr:
            tail = isa.fma(polynomial(isa, _EXP, r), r * r, r)
            return (tail + isa.splat(1.0)) * power

        return bind(rest, value)

    def guarded(v: Expr) -> Expr:
        clamped = tirx.Min(tirx.Max(v, isa.splat(-87.33)), isa.splat(88.37))
        return tirx.Select(v < isa.splat(-87.33), isa.splat(0.0), bind(clamped, reduced))

    return bind(x, guarded)


def sigmoid(isa: VectorIsa, x: Expr) -> Expr:
    """1 / (1 + e^-x), and 0 where `exp` ends: what x is multiplied with then vanishes, however large x is."""
    from tvm import tirx

    def value(v: Expr) -> Expr:
        found = isa.splat(1.0) / (isa.splat(1.0) + exp(isa, isa.splat(0.0) - v))
        return tirx.Select(v < isa.splat(-88.37), isa.splat(0.0), found)

    return bind(x, value)


def _with_sign(isa: VectorIsa, magnitude: Expr, x: Expr) -> Expr:
    from tvm import tirx

    sign = tirx.reinterpret(isa.i32, x) & isa.splat(-0x80000000, "int32")
    return tirx.reinterpret(isa.f32, tirx.reinterpret(isa.i32, magnitude) | sign)


def tanh(isa: VectorIsa, x: Expr) -> Expr:
    """tanh x = sign(x) * (1 - 2 / (e^(2|x|) + 1))."""

    def signed(v: Expr) -> Expr:
        power = exp(isa, isa.magnitude(v) * isa.splat(2.0))
        return _with_sign(isa, isa.splat(1.0) - isa.splat(2.0) / (power + isa.splat(1.0)), v)

    return bind(x, signed)


def erf(isa: VectorIsa, x: Expr) -> Expr:
    """erf x = sign(x) * (1 - t p(t) e^(-x^2)), t = 1 / (1 + 0.4 |x|); p is fitted (form: A&S 7.1.26)."""

    def signed(v: Expr) -> Expr:
        def value(t: Expr) -> Expr:
            tail = polynomial(isa, _ERFC, t) * t * exp(isa, isa.splat(0.0) - v * v)
            return _with_sign(isa, isa.splat(1.0) - tail, v)

        return bind(isa.splat(1.0) / isa.fma(isa.magnitude(v), isa.splat(0.4), isa.splat(1.0)), value)

    return bind(x, signed)


def activation(isa: VectorIsa, name: str, x: Expr) -> Expr:
    """One of ACTIVATIONS: gelu is the exact one (erf), gelu_tanh its tanh form, quick_gelu x * sigmoid(1.702 x)."""
    from tvm import tirx

    if name == "none":
        return x
    if name == "relu":
        return tirx.Max(x, isa.splat(0.0))
    if name == "relu2":
        return bind(tirx.Max(x, isa.splat(0.0)), lambda v: v * v)
    if name == "sigmoid":
        return bind(x, lambda v: sigmoid(isa, v))
    if name == "tanh":
        return bind(x, lambda v: tanh(isa, v))
    if name == "silu":
        return bind(x, lambda v: v * sigmoid(isa, v))
    if name == "quick_gelu":
        return bind(x, lambda v: v * sigmoid(isa, v * isa.splat(1.702)))
    if name == "gelu":
        half = isa.splat(0.5)
        return bind(x, lambda v: half * v * (isa.splat(1.0) + erf(isa, v * isa.splat(0.7071067811865476))))
    if name == "gelu_tanh":
        # 0.5 x (1 + tanh(y)) is x * sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3).
        def value(v: Expr) -> Expr:
            twice = v * isa.fma(v * v, isa.splat(2 * 0.7978845608028654 * 0.044715), isa.splat(2 * 0.7978845608028654))
            return v * sigmoid(isa, twice)

        return bind(x, value)
    raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
