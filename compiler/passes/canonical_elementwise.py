"""Canonical forms of elementwise ops and reductions: the rules of `canonicalize` that do not move elements."""

from __future__ import annotations

import math
from collections.abc import Callable

from llmc.compiler.ir.dims import product
from llmc.compiler.ir.elementwise import (
    Abs,
    Add,
    And,
    Binary,
    Cast,
    Compare,
    Constant,
    Div,
    Exp,
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
    Maximum,
    Minimum,
    Mul,
    Neg,
    Not,
    Or,
    Pow,
    Reciprocal,
    Relu,
    Rsqrt,
    Sigmoid,
    Sqrt,
    Sub,
    Where,
    constant,
)
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Iota, Max, Mean, Reduce, Reshape, Softmax, Sum
from llmc.compiler.ir.types import FLOATS, INTEGERS, UNSIGNED, numpy_dtype
from llmc.compiler.passes.rewriting import holds, is_number, number, number_of, shaped

Rule = Callable[[Op], Value | None]


def _is_float(value: Value) -> bool:
    return value.dtype in FLOATS


def cast_to_same(op: Op) -> Value | None:
    """cast(x) to x's own dtype -> x"""
    assert isinstance(op, Cast)
    return op.x if op.x.dtype == op.to else None


def cast_of_cast(op: Op) -> Value | None:
    """cast(cast(x)) -> cast(x) where the inner cast loses nothing."""
    assert isinstance(op, Cast)
    if isinstance(op.x, Cast) and holds(op.x.to, op.x.x.dtype):
        return Cast(op.x.x, op.to)
    return None


def cast_of_iota(op: Op) -> Value | None:
    """cast(iota) -> an iota of that dtype, where it can count so far."""
    assert isinstance(op, Cast)
    if isinstance(op.x, Iota) and op.to in ("i64", "i32", "f64"):
        return Iota(op.x.size, op.to)
    return None


def strip_broadcast(op: Op) -> Value | None:
    """An operand's broadcast, or its reshape to more leading ones, goes where the op broadcasts anyway."""
    shape = op.shape

    def bare(value: Value) -> Value:
        # An operand that fills the result is left alone: without its leading ones it would be another value.
        while isinstance(value, Broadcast) or (
            isinstance(value, Reshape) and _adds_leading_ones(value) and value.shape != shape
        ):
            value = value.x
        return value

    if not any(isinstance(operand, (Broadcast, Reshape)) for operand in op.operands):
        return None
    stripped = op.map_operands(bare)
    if stripped is not op and stripped.type == op.type:
        return stripped
    # All at once loses the shape: try one after another.
    for target in op.operands:
        one = op.map_operands(lambda value, target=target: bare(value) if value is target else value)  # type: ignore[misc]
        if one is not op and one.type == op.type:
            return one
    return None


def _adds_leading_ones(value: Reshape) -> bool:
    return value.to == (1,) * (value.rank - value.x.rank) + value.x.shape


def constant_to_the_right(op: Op) -> Value | None:
    """c + x -> x + c; c < x -> x > c"""
    assert isinstance(op, (Binary, Compare))
    if number_of(op.a) is None and not isinstance(op.a, Constant):
        return None
    if number_of(op.b) is not None or isinstance(op.b, Constant):
        return None
    if op.commutative:
        return op.replace(a=op.b, b=op.a)
    mirrored: dict[type[Op], type[Compare]] = {
        Less: Greater,
        LessEqual: GreaterEqual,
        Greater: Less,
        GreaterEqual: LessEqual,
    }
    return mirrored[type(op)](op.b, op.a) if type(op) in mirrored else None


def drop_neutral(op: Op) -> Value | None:
    """x + 0, x * 1, x / 1, x ** 1, x and true, x or false, max(x, -inf), ... -> x"""
    assert isinstance(op, (Binary, Compare))
    neutrals: dict[type[Op], float] = {
        Add: 0,
        Sub: 0,
        Mul: 1,
        Div: 1,
        Pow: 1,
        And: True,
        Or: False,
        Maximum: -math.inf,
        Minimum: math.inf,
    }
    if type(op) not in neutrals or number_of(op.b) != neutrals[type(op)]:
        return None
    return shaped(op.a, op.shape)


def absorb(op: Op) -> Value | None:
    """x and false -> false; x or true -> true; integer x * 0 -> 0"""
    assert isinstance(op, (Binary, Compare))
    found = number_of(op.b)
    if found is None:
        return None
    if isinstance(op, And) and not found:
        return shaped(constant(False), op.shape)
    if isinstance(op, Or) and found:
        return shaped(constant(True), op.shape)
    if isinstance(op, Mul) and not _is_float(op) and found == 0:
        return shaped(number(0, op), op.shape)
    return None


def subtract_constant(op: Op) -> Value | None:
    """x - c -> x + (-c)"""
    assert isinstance(op, Sub)
    found = number_of(op.b)
    if found is None or isinstance(found, bool) or op.dtype in (*UNSIGNED, "bool"):
        return None
    if not _is_float(op) and found == _lowest(op.dtype):
        return None
    return Add(op.a, shaped(number(-found, op), op.b.shape))


def _lowest(dtype: str) -> int:
    return -(1 << (8 * numpy_dtype(dtype).itemsize - 1))


def add_constants(op: Op) -> Value | None:
    """(x + c) + d -> x + (c + d) for integers, where the order cannot be seen."""
    assert isinstance(op, Add)
    if _is_float(op) or not isinstance(op.a, Add):
        return None
    first, second = number_of(op.a.b), number_of(op.b)
    if first is None or second is None:
        return None
    if op.dtype not in INTEGERS:
        return None
    # As large numbers wrap around, so does their sum.
    total = (int(first) + int(second)) % (1 << (8 * numpy_dtype(op.dtype).itemsize))
    return shaped(Add(op.a.a, number(total, op)), op.shape)


def add_or_subtract_negated(op: Op) -> Value | None:
    """x + (-y) -> x - y; (-y) + x -> x - y; x - (-y) -> x + y"""
    assert isinstance(op, (Add, Sub))
    if isinstance(op, Sub):
        return Add(op.a, op.b.x) if isinstance(op.b, Neg) else None
    if isinstance(op.b, Neg):
        return Sub(op.a, op.b.x)
    # A constant on the right must stay an addend, so that it stays on the right.
    if isinstance(op.a, Neg) and number_of(op.b) is None:
        return Sub(op.b, op.a.x)
    return None


def multiply_by_minus_one(op: Op) -> Value | None:
    """x * -1 -> -x; x / -1 -> -x"""
    assert isinstance(op, (Mul, Div))
    if number_of(op.b) == -1 and op.dtype not in UNSIGNED and op.a.shape == op.shape:
        return Neg(op.a)
    return None


def subtract_from_zero(op: Op) -> Value | None:
    """0 - x -> -x"""
    assert isinstance(op, Sub)
    if number_of(op.a) == 0 and op.b.shape == op.shape and op.dtype not in (*UNSIGNED, "bool"):
        return Neg(op.b)
    return None


def undo_twice(op: Op) -> Value | None:
    """-(-x), not(not x), 1/(1/x) -> x; | |x| | and relu(relu(x)) -> once"""
    assert isinstance(op, (Neg, Not, Reciprocal, Abs, Relu))
    if type(op.x) is not type(op):
        return None
    inner = op.x
    assert isinstance(inner, (Neg, Not, Reciprocal, Abs, Relu))
    return inner if isinstance(inner, (Abs, Relu)) else inner.x


def never_negative(value: Value) -> bool:
    """Whether a float is 0 (not -0), positive or not a number, whatever the inputs are: shown by what it is made of."""
    known = number_of(value)
    if known is not None:
        return not math.copysign(1.0, float(known)) < 0
    if isinstance(value, (Abs, Exp, Sigmoid)):
        return True
    if isinstance(value, Mul):
        return value.a is value.b or (never_negative(value.a) and never_negative(value.b))
    if isinstance(value, (Add, Div)):
        return never_negative(value.a) and never_negative(value.b)
    if isinstance(value, Maximum):  # of -0 and 0 either may be the result: one has to be positive
        return any((number_of(part) or 0) > 0 for part in (value.a, value.b))
    if isinstance(value, Pow):
        return number_of(value.b) in (2, 4) or never_negative(value.a)
    if isinstance(value, (Mean, Sum, Max, Reshape, Broadcast, Sqrt, Reciprocal, Rsqrt)):
        return never_negative(value.x)
    if isinstance(value, Cast):
        return value.x.dtype in FLOATS and never_negative(value.x)
    return False


def power_by_constant(op: Op) -> Value | None:
    """x ** 2 -> x * x; x ** 3; x ** 0.5 -> sqrt; x ** -0.5 -> rsqrt; x ** -1 -> reciprocal; x ** 0 -> 1

    Roots where x is never negative: the root of minus infinity is not a number, its power 0.5 is infinite.
    """
    assert isinstance(op, Pow)
    exponent = number_of(op.b)
    if exponent is None or op.shape != op.a.shape:
        return None
    x = op.a
    if exponent == 2:
        return Mul(x, x)
    if exponent == 3:
        return Mul(Mul(x, x), x)
    if exponent == 0:
        return shaped(number(1, op), op.shape)
    if not _is_float(op):
        return None
    if exponent in (0.5, -0.5):
        return (Sqrt(x) if exponent > 0 else Rsqrt(x)) if never_negative(x) else None
    if exponent == -1:
        return Reciprocal(x)
    return Reciprocal(Mul(x, x)) if exponent == -2 else None


def divide_by_power_of_two(op: Op) -> Value | None:
    """x / c -> x * (1 / c) for floats where 1 / c is exact."""
    assert isinstance(op, Div)
    divisor = number_of(op.b)
    if divisor is None or not _is_float(op):
        return None
    # The factor, 2^-13 .. 2^15, is normal in every float dtype. 0, inf and nan have another mantissa.
    mantissa, exponent = math.frexp(divisor)
    if abs(mantissa) != 0.5 or abs(exponent) > 14:
        return None
    return Mul(op.a, shaped(number(1 / divisor, op), op.b.shape))


def divide_by_root_or_reciprocal(op: Op) -> Value | None:
    """x / sqrt(y) -> x * rsqrt(y); x / rsqrt(y) -> x * sqrt(y); x / (1/y) -> x * y; 1 / x -> reciprocal(x)"""
    assert isinstance(op, Div)
    if not _is_float(op):
        return None
    if number_of(op.a) == 1 and op.b.shape == op.shape:
        return Reciprocal(op.b)
    if isinstance(op.b, Sqrt):
        return Mul(op.a, Rsqrt(op.b.x))
    if isinstance(op.b, Rsqrt):
        return Mul(op.a, Sqrt(op.b.x))
    if isinstance(op.b, Reciprocal):
        return Mul(op.a, op.b.x)
    return None


def multiply_by_reciprocal(op: Op) -> Value | None:
    """x * (1/y) -> x / y, either way round"""
    assert isinstance(op, Mul)
    if isinstance(op.b, Reciprocal):
        return Div(op.a, op.b.x)
    return Div(op.b, op.a.x) if isinstance(op.a, Reciprocal) else None


def root_of_reciprocal(op: Op) -> Value | None:
    """1/sqrt(x), sqrt(1/x) -> rsqrt(x); 1/rsqrt(x) -> sqrt(x)"""
    assert isinstance(op, (Reciprocal, Sqrt))
    if isinstance(op, Sqrt):
        return Rsqrt(op.x.x) if isinstance(op.x, Reciprocal) else None
    if isinstance(op.x, Sqrt):
        return Rsqrt(op.x.x)
    return Sqrt(op.x.x) if isinstance(op.x, Rsqrt) else None


def _logistic_argument(value: Value) -> Value | None:
    """z of 1 + exp(-z)."""
    if not isinstance(value, Add):
        return None
    for one, grown in ((value.a, value.b), (value.b, value.a)):
        if number_of(one) == 1 and isinstance(grown, Exp) and isinstance(grown.x, Neg) and grown.shape == value.shape:
            return grown.x.x
    return None


def logistic(op: Op) -> Value | None:
    """1 / (1 + exp(-x)) -> sigmoid(x); y / (1 + exp(-x)) -> y * sigmoid(x)"""
    assert isinstance(op, (Reciprocal, Div))
    argument = _logistic_argument(op.x if isinstance(op, Reciprocal) else op.b)
    if argument is None:
        return None
    return Sigmoid(argument) if isinstance(op, Reciprocal) else Mul(op.a, Sigmoid(argument))


def maximum_with_zero(op: Op) -> Value | None:
    """max(x, 0) -> relu(x)"""
    assert isinstance(op, Maximum)
    return Relu(op.a) if number_of(op.b) == 0 and op.a.shape == op.shape else None


def select_known(op: Op) -> Value | None:
    """where(true, a, b) -> a; where(c, a, a) -> a; where(not c, a, b) -> where(c, b, a)"""
    assert isinstance(op, Where)
    known = number_of(op.condition)
    if known is not None:
        return shaped(op.a if known else op.b, op.shape)
    if op.a is op.b:
        return shaped(op.a, op.shape)
    if isinstance(op.condition, Not):
        return Where(op.condition.x, op.b, op.a)
    return None


def mean_from_sum(op: Op) -> Value | None:
    """sum(x) / n, sum(x) * (1/n) -> mean(x), for n the number of summed elements"""
    assert isinstance(op, (Mul, Div))
    if not isinstance(op.a, Sum) or not _is_float(op) or op.a.shape != op.shape:
        return None
    total = op.a
    count = product(tuple(total.x.shape[axis] for axis in total.axes))
    if not isinstance(count, int) or count == 0:
        return None
    if not is_number(op.b, count if isinstance(op, Div) else 1 / count):
        return None
    return Mean(total.x, total.axes, total.keep)


def softmax_from_exponentials(op: Op) -> Value | None:
    """exp(x - max(x)) / sum(exp(x - max(x))) -> softmax(x), along one axis"""
    assert isinstance(op, Div)
    e, total = op.a, op.b
    if not (isinstance(e, Exp) and isinstance(total, Sum) and total.x is e and total.keep and len(total.axes) == 1):
        return None
    axis = total.axes[0] % e.rank
    shifted = e.x
    if isinstance(shifted, Sub) and isinstance(shifted.b, Max) and shifted.b.x is shifted.a:
        top = shifted.b
        if top.keep and len(top.axes) == 1 and top.axes[0] % e.rank == axis:
            return Softmax(shifted.a, axis)
    return Softmax(shifted, axis)


def normalize_reduction(op: Op) -> Value | None:
    """Axes counted from the front, sorted; a reduction over no axis -> its operand"""
    assert isinstance(op, Reduce)
    axes = tuple(sorted({axis % op.x.rank for axis in op.axes})) if op.x.rank else ()
    if not axes:
        return op.x
    return op.replace(axes=axes) if axes != op.axes else None


ELEMENTWISE_RULES: tuple[tuple[type[Op], Rule], ...] = (
    (Cast, cast_to_same),
    (Cast, cast_of_cast),
    (Cast, cast_of_iota),
    (Reduce, normalize_reduction),
    (Binary, constant_to_the_right),
    (Compare, constant_to_the_right),
    (Binary, strip_broadcast),
    (Compare, strip_broadcast),
    (Where, strip_broadcast),
    (Mul, mean_from_sum),
    (Div, mean_from_sum),
    (Binary, drop_neutral),
    (Compare, drop_neutral),
    (Binary, absorb),
    (Compare, absorb),
    (Sub, subtract_from_zero),
    (Sub, subtract_constant),
    (Add, add_constants),
    (Add, add_or_subtract_negated),
    (Sub, add_or_subtract_negated),
    (Mul, multiply_by_minus_one),
    (Div, multiply_by_minus_one),
    (Neg, undo_twice),
    (Not, undo_twice),
    (Reciprocal, undo_twice),
    (Abs, undo_twice),
    (Relu, undo_twice),
    (Pow, power_by_constant),
    (Div, divide_by_power_of_two),
    (Reciprocal, logistic),
    (Div, logistic),
    (Div, divide_by_root_or_reciprocal),
    (Mul, multiply_by_reciprocal),
    (Reciprocal, root_of_reciprocal),
    (Sqrt, root_of_reciprocal),
    (Maximum, maximum_with_zero),
    (Where, select_known),
    (Div, softmax_from_exponentials),
)
