"""What elementwise ops compute, as TIR expressions over scalars; transcendental functions are libm's.

Operands are variables, so that they may be repeated. Integers wrap around: arithmetic is unsigned, where TVM does not
tell LLVM that nothing overflows. TVM folds `x == x` to true: NaN is found by its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir.op import Op
from llmc.targets.cpu.vectors import store

if TYPE_CHECKING:
    from tvm.tirx import Expr


def dtype_of(x: Expr) -> str:
    """The TIR dtype of an expression."""
    return str(x.ty.dtype)


def number(value: float, like: Expr) -> Expr:
    """A constant of the same dtype as an expression."""
    from tvm import tirx

    return tirx.const(value, dtype_of(like))


def libm(name: str) -> Callable[..., Expr]:
    """A function of the C library, for f32 or f64."""

    def call(*x: Expr) -> Expr:
        from tvm import tirx

        dtype = dtype_of(x[0])
        return tirx.call_pure_extern(dtype, name if dtype == "float64" else name + "f", *x)

    return call


def intrinsic(name: str) -> Callable[..., Expr]:
    """An LLVM intrinsic on floats, which vectorises."""

    def call(*x: Expr) -> Expr:
        from tvm.script import tirx as T

        return T.call_llvm_pure_intrin(dtype_of(x[0]), f"llvm.{name}", *x)

    return call


def tir(name: str) -> Callable[..., Expr]:
    """A function of TIR by name."""

    def call(*x: Expr) -> Expr:
        from tvm import tirx

        return getattr(tirx, name)(*x)

    return call


def let(x: Expr) -> Expr:
    """A variable with this value."""
    from llmc.targets.cpu.builder import let as bound

    return bound(x)


def is_float(x: Expr) -> bool:
    """Whether an expression is a float."""
    return dtype_of(x).startswith("float")


def is_unsigned(x: Expr) -> bool:
    """Whether an expression is an unsigned integer."""
    return dtype_of(x).startswith("uint")


def is_nan(x: Expr) -> Expr:
    """Whether a float is not a number."""
    from tvm import tirx

    integer, infinity = ("int64", 0x7FF << 52) if dtype_of(x) == "float64" else ("int32", 0xFF << 23)
    bits = tirx.reinterpret(integer, x)
    ordered = bits & tirx.const((1 << (int(integer[3:]) - 1)) - 1, integer)
    return ordered > tirx.const(infinity, integer)


def truth(x: Expr) -> Expr:
    """x as a condition; NaN is true."""
    return x if dtype_of(x) == "bool" else not_equal(x, number(0, x))


def not_equal(x: Expr, y: Expr) -> Expr:
    """x != y; NaN differs from everything, which TVM's NE does not say."""
    from tvm import tirx

    return tirx.Or(tirx.NE(x, y), tirx.Or(is_nan(x), is_nan(y))) if is_float(x) else tirx.NE(x, y)


def wrapping(function: Callable[..., Expr]) -> Callable[..., Expr]:
    """Arithmetic on floats as it is, on integers modulo 2^bits."""

    def call(*x: Expr) -> Expr:
        dtype = dtype_of(x[0])
        if not dtype.startswith("int"):
            return function(*x)
        return function(*(value.astype("u" + dtype) for value in x)).astype(dtype)

    return call


plus = wrapping(lambda x, y: x + y)
minus = wrapping(lambda x, y: x - y)
times = wrapping(lambda x, y: x * y)


def negative(x: Expr) -> Expr:
    """-x; of 0.0 it is -0.0, and integers wrap around."""
    if is_float(x):
        return x * number(-1, x)
    # The bits turned, plus 1: TVM takes an unsigned 0 - x for 0.
    signed = dtype_of(x).removeprefix("u")
    turned = let((x.astype(signed) ^ number(-1, x.astype(signed))).astype(dtype_of(x)))
    return plus(turned, number(1, turned))


def maximum(x: Expr, y: Expr) -> Expr:
    """The larger; NaN where one is."""
    return intrinsic("maximum")(x, y) if is_float(x) else tir("Max")(x, y)


def minimum(x: Expr, y: Expr) -> Expr:
    """The smaller; NaN where one is."""
    return intrinsic("minimum")(x, y) if is_float(x) else tir("Min")(x, y)


def _absolute(x: Expr) -> Expr:
    if is_float(x):
        return intrinsic("fabs")(x)
    return x if is_unsigned(x) else tir("Select")(x < 0, negative(x), x)


def _relu(x: Expr) -> Expr:
    return maximum(x, number(0, x))


def _sigmoid(x: Expr) -> Expr:
    return number(1, x) / (number(1, x) + libm("exp")(negative(x)))


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "relu": _relu,
    "relu2": lambda x: _relu(x) * _relu(x),
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: number(0.5, x) * x * (number(1, x) + libm("erf")(x * number(0.7071067811865476, x))),
    "gelu_tanh": lambda x: (
        number(0.5, x)
        * x
        * (number(1, x) + libm("tanh")(number(0.7978845608028654, x) * (x + number(0.044715, x) * x * x * x)))
    ),
    "quick_gelu": lambda x: x * _sigmoid(number(1.702, x) * x),
    "sigmoid": _sigmoid,
    "tanh": libm("tanh"),
}


def _dividing(x: Expr, y: Expr, function: Callable[[Expr, Expr], Expr], negated: Callable[[Expr], Expr]) -> Expr:
    """Integer division by anything: the machine's instruction ends the process on x / 0 and on lowest / -1.

    negated(x) is the result for y = -1; for y = 0 it is 0.
    """
    select = tir("Select")
    zero = let(tir("EQ")(y, number(0, y)))
    if is_unsigned(x):
        return select(zero, number(0, x), function(x, _opaque(select(zero, number(1, y), y))))
    minus_one = let(tir("EQ")(y, number(-1, y)))
    divisor = _opaque(select(tir("Or")(zero, minus_one), number(1, y), y))
    return select(minus_one, negated(x), select(zero, number(0, x), function(x, divisor)))


def _opaque(x: Expr) -> Expr:
    """The value by way of memory: TVM takes a division into both sides of a choice of divisors, and does both."""
    from llmc.targets.cpu import builder as b

    slot = b.scratch(1, dtype_of(x))
    store(slot, 0, x)
    return slot[b.index(0)]


def _divide(x: Expr, y: Expr) -> Expr:
    return x / y if is_float(x) else _dividing(x, y, tir("truncdiv"), negative)


def _fmod(x: Expr, y: Expr) -> Expr:
    return libm("fmod")(x, y) if is_float(x) else _dividing(x, y, tir("truncmod"), lambda v: number(0, v))


def _signs_differ(x: Expr, y: Expr) -> Expr:
    return tir("NE")(tir("Select")(x < 0, 1, 0), tir("Select")(y < 0, 1, 0))


def _mod(x: Expr, y: Expr) -> Expr:
    """Python's: the rest has the divisor's sign, a zero too."""
    rest = let(_fmod(x, y))
    if is_unsigned(x):
        return rest
    moved = tir("Select")(_signs_differ(rest, y), plus(rest, y), rest)
    nothing = intrinsic("copysign")(number(0, x), y) if is_float(x) else number(0, x)
    return tir("Select")(tir("EQ")(rest, number(0, x)), nothing, moved)


def _floor_divide(x: Expr, y: Expr) -> Expr:
    """The integer part below x / y, exactly: for floats by way of the exact rest, as Python does."""
    select = tir("Select")
    if not is_float(x):
        quotient = let(_divide(x, y))
        rest = let(minus(x, times(quotient, y)))
        low = tir("And")(tir("NE")(rest, number(0, x)), _signs_differ(rest, y))
        return quotient if is_unsigned(x) else select(low, minus(quotient, number(1, x)), quotient)
    rest = let(libm("fmod")(x, y))
    quotient = (x - rest) / y
    below = tir("And")(truth(rest), _signs_differ(rest, y))
    quotient = let(select(below, quotient - number(1, x), quotient))
    floor = let(intrinsic("floor")(quotient))
    nearest = let(select(quotient - floor > number(0.5, x), floor + number(1, x), floor))
    signed = select(truth(quotient), nearest, intrinsic("copysign")(number(0, x), x / y))
    return select(truth(y), signed, x / y)


def _power(x: Expr, y: Expr) -> Expr:
    """x ** y; integers by squaring, modulo 2^bits, and truncated where y is negative."""
    if is_float(x):
        return libm("pow")(x, y)
    from llmc.targets.cpu import builder as b

    dtype, select, one = dtype_of(x), tir("Select"), number(1, x)
    unsigned = dtype if is_unsigned(x) else "u" + dtype
    result, base, left = (b.scratch(1, unsigned) for _ in range(3))
    store(result, 0, one.astype(unsigned))
    store(base, 0, x.astype(unsigned))
    store(left, 0, y.astype(unsigned))
    at = b.index(0)
    with b.loop(int(unsigned[4:])):
        odd = truth(left[at] & number(1, left[at]))
        store(result, 0, select(odd, result[at] * base[at], result[at]))
        store(base, 0, base[at] * base[at])
        store(left, 0, left[at] >> number(1, left[at]))
    whole = result[at].astype(dtype)
    if is_unsigned(x):
        return whole
    even = tir("EQ")(y & one, number(0, y))
    of_one = select(tir("EQ")(x, one), one, number(0, x))
    fraction = select(tir("EQ")(x, number(-1, x)), select(even, one, number(-1, x)), of_one)
    return select(y < 0, fraction, whole)


def _shift_left(x: Expr, y: Expr) -> Expr:
    """Bits moved up; 0 where y is not one of 0 to bits - 1."""
    bits, unsigned = _bits(x), f"uint{_bits(x)}"
    amount = let(y.astype(unsigned))  # a negative one is too large
    inside = let(amount < number(bits, amount))
    moved = x.astype(unsigned) << tir("Select")(inside, amount, number(0, amount))
    return tir("Select")(inside, moved.astype(dtype_of(x)), number(0, x))


def _shift_right(x: Expr, y: Expr) -> Expr:
    """Bits moved down, of signed integers with the sign; 0 or -1 where y is not one of 0 to bits - 1."""
    bits = _bits(x)
    amount = let(y.astype(f"uint{bits}"))
    inside = let(amount < number(bits, amount))
    if is_unsigned(x):
        return tir("Select")(inside, x >> tir("Select")(inside, amount, number(0, amount)), number(0, x))
    return x >> tir("Select")(inside, y, number(bits - 1, y))


def _bits(x: Expr) -> int:
    """The bits of an integer."""
    return int(dtype_of(x).removeprefix("u").removeprefix("int"))


def _logical(function: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    return lambda x, y: function(truth(x), truth(y))


ELEMENTWISE: dict[type[Op], Callable[..., Expr]] = {
    e.Neg: negative,
    e.Abs: _absolute,
    e.Exp: libm("exp"),
    e.Log: libm("log"),
    e.Sqrt: intrinsic("sqrt"),
    e.Rsqrt: lambda x: number(1, x) / intrinsic("sqrt")(x),
    e.Reciprocal: lambda x: number(1, x) / x,
    e.Tanh: libm("tanh"),
    e.Sigmoid: _sigmoid,
    e.Erf: libm("erf"),
    e.Sin: libm("sin"),
    e.Cos: libm("cos"),
    e.Atan: libm("atan"),
    e.Floor: intrinsic("floor"),
    e.Round: intrinsic("roundeven"),
    e.Relu: _relu,
    e.Not: lambda x: tir("Not")(truth(x)),
    e.Add: plus,
    e.Sub: minus,
    e.Mul: times,
    e.Div: _divide,
    e.FloorDivide: _floor_divide,
    e.Mod: _mod,
    e.Fmod: _fmod,
    e.Pow: _power,
    e.Maximum: maximum,
    e.Minimum: minimum,
    e.Equal: tir("EQ"),
    e.NotEqual: not_equal,
    e.Less: lambda x, y: x < y,
    e.LessEqual: lambda x, y: x <= y,
    e.Greater: lambda x, y: x > y,
    e.GreaterEqual: lambda x, y: x >= y,
    e.And: _logical(tir("And")),
    e.Or: _logical(tir("Or")),
    e.BitAnd: lambda x, y: x & y,
    e.BitOr: lambda x, y: x | y,
    e.BitXor: lambda x, y: x ^ y,
    e.ShiftLeft: _shift_left,
    e.ShiftRight: _shift_right,
    e.Where: lambda c, x, y: tir("Select")(truth(c), x, y),
    e.Cast: lambda x: x,  # the store converts
    e.Bitcast: lambda x: x,  # of bytes
}


def widened(value: Expr, dtype: str) -> Expr:
    """An element of IR dtype `dtype` as it lies in memory, in the dtype that it is computed in."""
    from tvm import tirx

    if dtype == "bf16":
        return tirx.reinterpret("float32", value.astype("uint32") << tirx.const(16, "uint32"))
    return value.astype("float32") if dtype == "f16" else value


def convert(value: Expr, dtype: str, memory: str) -> Expr:
    """A computed value as IR dtype `dtype`, which lies in memory as TIR dtype `memory`."""
    found = dtype_of(value)
    if dtype == "bool":
        return truth(value).astype(memory)
    if found == memory and dtype != "bf16":
        return value
    if dtype in ("f16", "bf16"):
        if found == "float64" and dtype == "f16":
            return _rounded_to_odd(let(value)).astype(memory)
        single = let(value.astype("float32"))
        return single.astype(memory) if dtype == "f16" else _bfloat16_bits(single)
    if is_float(value) and not memory.startswith("float") and memory not in ("int64", "uint64"):
        # Through a wider integer: out of range for LLVM is undefined, not the lower bits as here.
        between = "int64" if memory in ("int32", "uint32") else "int32"
        return value.astype(between).astype(memory)
    return value.astype(memory)


def _rounded_to_odd(value: Expr) -> Expr:
    """f64 to f32 so that rounding to f16 afterwards is as good as rounding once.

    An inexact result is truncated and its last bit set (S. Boldo, G. Melquiond: When double rounding is odd, 2005).
    """
    from tvm import tirx

    nearest = let(value.astype("float32"))
    back = let(nearest.astype("float64"))
    bits = let(tirx.reinterpret("int32", nearest))
    one = number(1, bits)
    too_large = intrinsic("fabs")(back) > intrinsic("fabs")(value)
    below = tirx.Select(too_large, bits - one, bits)
    return tirx.reinterpret("float32", tirx.Select(tirx.EQ(back, value), bits, below | one))


def _bfloat16_bits(value: Expr) -> Expr:
    """The upper half of an f32, rounded to nearest, halves to even; NaN stays NaN."""
    from tvm import tirx

    bits = let(tirx.reinterpret("uint32", value))
    sixteen, one = tirx.const(16, "uint32"), tirx.const(1, "uint32")
    even = (bits >> sixteen) & one
    rounded = (bits + (even + tirx.const(0x7FFF, "uint32"))) >> sixteen
    quiet = (bits >> sixteen) | tirx.const(0x40, "uint32")
    return tirx.Select(is_nan(value), quiet, rounded).astype("uint16")
