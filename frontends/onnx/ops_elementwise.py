"""Arithmetic, comparisons, logic and casts, element by element."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import FLOATS, INTEGERS
from llmc.frontends.onnx.forms import HALVES, broadcast, broadcast_of, cast, dtype_named, highest, like, lowest
from llmc.frontends.onnx.translation import Handler, Item, Node, Translation, Unsupported, handles, objects


@handles("Constant")
def _constant(t: Translation, node: Node) -> Item:
    for name, value in node.attributes.items():
        if len(node.attributes) > 1:
            break
        if isinstance(value, Item):
            return value
        if name in ("value_int", "value_ints"):
            return Item(known=objects(value, np.shape(value)), dtype="i64")
        if name in ("value_float", "value_floats"):
            return Item(known=objects(np.asarray(value, np.float32).tolist(), np.shape(value)), dtype="f32")
    raise Unsupported(f"a constant given by {', '.join(node.attributes) or 'nothing'} is not supported")


@handles("Identity")
def _identity(t: Translation, node: Node, x: Item) -> Item:
    return x


def _unary(make: Callable[[Value], Value]) -> Handler:
    return lambda t, node, x: make(x.value)


def _binary(make: Callable[[Value, Value], Value]) -> Handler:
    def handler(t: Translation, node: Node, a: Item, b: Item) -> Value:
        if node.get("axis") is not None:
            raise Unsupported("broadcasting from an axis on, as before opset 7, is not supported")
        return make(a.value, b.value)

    return handler


for _name, _one in (
    ("Exp", e.Exp), ("Log", e.Log), ("Sqrt", e.Sqrt), ("Reciprocal", e.Reciprocal), ("Tanh", e.Tanh),
    ("Sigmoid", e.Sigmoid), ("Erf", e.Erf), ("Sin", e.Sin), ("Cos", e.Cos), ("Neg", e.Neg), ("Abs", e.Abs),
    ("Not", e.Not), ("Relu", e.Relu),
):  # fmt: skip
    handles(_name)(_unary(_one))

for _name, _two in (
    ("Add", e.Add), ("Sub", e.Sub), ("Mul", e.Mul), ("Div", e.Div), ("Equal", e.Equal), ("Less", e.Less),
    ("LessOrEqual", e.LessEqual), ("Greater", e.Greater), ("GreaterOrEqual", e.GreaterEqual), ("And", e.And),
    ("Or", e.Or), ("Xor", e.NotEqual),
):  # fmt: skip
    handles(_name)(_binary(_two))


def _integral(make: Callable[[Value], Value]) -> Handler:
    """Rounding, which leaves integers as they are."""
    return lambda t, node, x: make(x.value) if x.dtype in FLOATS else x


handles("Floor")(_integral(e.Floor))
handles("Round")(_integral(e.Round))
handles("Ceil")(_integral(lambda x: e.Neg(e.Floor(e.Neg(x)))))


@handles("Sign")
def _sign(t: Translation, node: Node, x: Item) -> Value:
    value, zero, one = x.value, like(0, x.value), like(1, x.value)
    # What is neither above nor below zero is zero, or no number. Unsigned integers have no -1, but none is below zero.
    return e.Where(e.Greater(value, zero), one, e.Where(e.Less(value, zero), e.Sub(zero, one), value))


@handles("IsNaN")
def _is_nan(t: Translation, node: Node, x: Item) -> Value:
    return e.NotEqual(x.value, x.value)


@handles("IsInf")
def _is_inf(t: Translation, node: Node, x: Item) -> Value:
    negative, positive = node.get("detect_negative", 1), node.get("detect_positive", 1)
    if negative and positive:
        return e.Equal(e.Abs(x.value), like(math.inf, x.value))
    if not negative and not positive:
        return broadcast(e.constant(False), x.shape)
    return e.Equal(x.value, like(math.inf if positive else -math.inf, x.value))


@handles("Mod")
def _mod(t: Translation, node: Node, a: Item, b: Item) -> Value:
    if not node.get("fmod", 0):
        return e.Mod(a.value, b.value)
    if a.dtype in FLOATS:
        return e.Fmod(a.value, b.value)
    return e.Sub(a.value, e.Mul(b.value, e.Div(a.value, b.value)))


@handles("Pow")
def _pow(t: Translation, node: Node, a: Item, b: Item) -> Value:
    """The result has the base's dtype. An integer base is raised in f64 where the exponent is no integer."""
    if a.dtype in FLOATS or b.dtype not in FLOATS:
        return e.Pow(a.value, cast(b.value, a.dtype))
    return cast(e.Pow(cast(a.value, "f64"), cast(b.value, "f64")), a.dtype)


def _folded(make: Callable[[Value, Value], Value]) -> Handler:
    """An op of any number of operands, two at a time."""

    def handler(t: Translation, node: Node, *items: Item) -> Value:
        return functools.reduce(make, (item.value for item in items))

    return handler


handles("Min")(_folded(e.Minimum))
handles("Max")(_folded(e.Maximum))
handles("Sum")(_folded(e.Add))


@handles("Mean")
def _mean(t: Translation, node: Node, *items: Item) -> Value:
    total = functools.reduce(e.Add, (item.value for item in items))
    return e.Div(total, like(len(items), total))


@handles("Clip")
def _clip(t: Translation, node: Node, x: Item, low: Item | None = None, high: Item | None = None) -> Value | Item:
    result = x.value
    least = low.value if low is not None else like(node.get("min"), result) if "min" in node.attributes else None
    most = high.value if high is not None else like(node.get("max"), result) if "max" in node.attributes else None
    if least is not None and not _is(least, lowest(x.dtype)):
        result = e.Maximum(result, least)
    if most is not None and not _is(most, highest(x.dtype)):
        result = e.Minimum(result, most)
    return result


def _is(value: Value, number: float) -> bool:
    return isinstance(value, e.Constant) and value.value.array.size == 1 and value.value.array.item() == number


@handles("Where")
def _where(t: Translation, node: Node, condition: Item, a: Item, b: Item) -> Value:
    return e.Where(condition.value, a.value, b.value)


@handles("Cast")
def _cast(t: Translation, node: Node, x: Item) -> Value | Item:
    named = dtype_named(node.attributes["to"])
    dtype = t.dtype(named)
    if dtype != named and named in HALVES and (x.dtype in INTEGERS or _is_positional(x.value)):
        return e.Cast(e.Cast(x.value, named), dtype)
    return x if dtype == x.dtype else e.Cast(x.value, dtype)


def _is_positional(value: Value) -> bool:
    """Whether places and sizes alone decide a value. Half floats count to 2,048 only: how these round is not noise."""
    seen, stack = {value}, [value]
    while stack:
        top = stack.pop()
        if isinstance(top, Param) or (isinstance(top, Input) and top.name != "positions"):
            return False
        new = [x for x in (top.operands if isinstance(top, Op) else ()) if x not in seen]
        seen.update(new)
        stack += new
    return True


@handles("CastLike")
def _cast_like(t: Translation, node: Node, x: Item, other: Item) -> Value | Item:
    return x if other.dtype == x.dtype else e.Cast(x.value, other.dtype)


@handles("PRelu")
def _prelu(t: Translation, node: Node, x: Item, slope: Item) -> Value:
    value = x.value
    return broadcast(e.Where(e.Less(value, like(0, value)), e.Mul(slope.value, value), value), broadcast_of(x, slope))
