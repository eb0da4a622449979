"""What elementwise ops compute, as TIR expressions over scalars; transcendental functions are libm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.op import Op

if TYPE_CHECKING:
    from tvm.tirx import Expr


def libm(name: str) -> Callable[..., Expr]:
    def call(*x: Expr) -> Expr:
        from tvm import tirx

        dtype = str(x[0].ty.dtype) if hasattr(x[0], "ty") else str(x[0].dtype)
        if dtype == "float64":
            return tirx.call_pure_extern("float64", name, *x)
        wide = [value.astype("float32") for value in x]
        return tirx.call_pure_extern("float32", name + "f", *wide).astype(dtype)

    return call


def _one(x: Expr) -> Expr:
    from tvm import tirx

    return tirx.const(1, str(x.ty.dtype))


def _relu(x: Expr) -> Expr:
    from tvm import tirx

    return tirx.Max(x, tirx.const(0, str(x.ty.dtype)))


def _number(value: float, like: Expr) -> Expr:
    from tvm import tirx

    return tirx.const(value, str(like.ty.dtype))


def _sigmoid(x: Expr) -> Expr:
    return _one(x) / (_one(x) + libm("exp")(-x))


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "relu": _relu,
    "relu2": lambda x: _relu(x) * _relu(x),
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: _number(0.5, x) * x * (_one(x) + libm("erf")(x * _number(0.7071067811865476, x))),
    "gelu_tanh": lambda x: (
        _number(0.5, x)
        * x
        * (_one(x) + libm("tanh")(_number(0.7978845608028654, x) * (x + _number(0.044715, x) * x * x * x)))
    ),
    "quick_gelu": lambda x: x * _sigmoid(_number(1.702, x) * x),
    "sigmoid": _sigmoid,
    "tanh": libm("tanh"),
}


def _truncated_divide(x: Expr, y: Expr) -> Expr:
    from tvm import tirx

    return x / y if str(x.ty.dtype).startswith("float") else tirx.truncdiv(x, y)


def _floor_divide(x: Expr, y: Expr) -> Expr:
    from tvm import tirx

    return libm("floor")(x / y) if str(x.ty.dtype).startswith("float") else tirx.floordiv(x, y)


def _mod(x: Expr, y: Expr) -> Expr:
    from tvm import tirx

    return x - y * libm("floor")(x / y) if str(x.ty.dtype).startswith("float") else tirx.floormod(x, y)


def truth(x: Expr) -> Expr:
    from tvm import tirx

    return tirx.NE(x, tirx.const(0, str(x.ty.dtype)))


def tir(name: str) -> Callable[..., Expr]:
    def call(*x: Expr) -> Expr:
        from tvm import tirx

        return getattr(tirx, name)(*x)

    return call


ELEMENTWISE: dict[type[Op], Callable[..., Expr]] = {
    e.Neg: lambda x: -x,
    e.Abs: lambda x: tir("Max")(x, -x),
    e.Exp: libm("exp"),
    e.Log: libm("log"),
    e.Sqrt: libm("sqrt"),
    e.Rsqrt: lambda x: _one(x) / libm("sqrt")(x),
    e.Reciprocal: lambda x: _one(x) / x,
    e.Tanh: libm("tanh"),
    e.Sigmoid: _sigmoid,
    e.Erf: libm("erf"),
    e.Sin: libm("sin"),
    e.Cos: libm("cos"),
    e.Floor: libm("floor"),
    e.Round: libm("nearbyint"),
    e.Relu: _relu,
    e.Not: lambda x: tir("Not")(truth(x)),
    e.Add: lambda x, y: x + y,
    e.Sub: lambda x, y: x - y,
    e.Mul: lambda x, y: x * y,
    e.Div: _truncated_divide,
    e.FloorDivide: _floor_divide,
    e.Mod: _mod,
    e.Pow: libm("pow"),
    e.Maximum: tir("Max"),
    e.Minimum: tir("Min"),
    e.Equal: tir("EQ"),
    e.NotEqual: tir("NE"),
    e.Less: lambda x, y: x < y,
    e.LessEqual: lambda x, y: x <= y,
    e.Greater: lambda x, y: x > y,
    e.GreaterEqual: lambda x, y: x >= y,
    e.And: lambda x, y: tir("And")(truth(x), truth(y)),
    e.Or: lambda x, y: tir("Or")(truth(x), truth(y)),
    e.Where: lambda c, x, y: tir("Select")(truth(c), x, y),
    e.Cast: lambda x: x,  # the store converts
}
