"""t-level ops that work element by element, with numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from llmc.compiler.ir.op import Dense, Op, Tokens, Value
from llmc.compiler.ir.shapes import broadcast_shapes, require, require_same_dtype
from llmc.compiler.ir.types import (
    FLOATS,
    INTEGERS,
    NUMPY_DTYPES,
    Array,
    Tensor,
    dtype_of,
    itemsize,
    numpy_dtype,
)


class Constant(Op, name="t.constant"):
    """A small array known when compiling (large ones are params)."""

    tokens = Tokens.WEIGHTS

    value: Dense
    dtype_name: str

    def infer(self) -> Tensor:
        return Tensor(self.value.array.shape, self.dtype_name)

    def evaluate(self) -> Array:
        return self.value.array.astype(numpy_dtype(self.dtype))


def constant(value: object, dtype: str | None = None) -> Constant:
    """A `Constant` from anything numpy takes; Python floats become f32, ints i64 unless `dtype` says otherwise."""
    array = np.asarray(value)
    if dtype is None:
        dtype = {"float64": "f32", "int64": "i64"}.get(str(array.dtype)) or dtype_of(array.dtype)
    # f64 holds every float dtype exactly, so that printing needs one form.
    return Constant(Dense(array.astype(np.float64 if dtype in FLOATS else numpy_dtype(dtype))), dtype)


class Unary(Op):
    """Base: `function` element by element, same type as the operand."""

    tokens = Tokens.ELEMENTS

    x: Value
    function: ClassVar[Callable[..., Any]]
    floats_only: ClassVar[bool] = True

    def infer(self) -> Tensor:
        require(not self.floats_only or self.x.dtype in FLOATS, f"needs floats, not {self.x.dtype}")
        return Tensor(self.x.shape, self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        return np.asarray(type(self).function(x), x.dtype)


def _erf(x: Array) -> Array:
    """The error function. W. J. Cody, Rational Chebyshev approximation for the error function (1969), via math.erf."""
    import math

    return np.vectorize(math.erf, otypes=[np.float64])(x.astype(np.float64)) if x.size else x


def _sigmoid(x: Array) -> Array:
    # exp of a non-positive number never overflows.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


class Neg(Unary, name="t.neg"):
    """-x"""

    function = staticmethod(np.negative)
    floats_only = False


class Abs(Unary, name="t.abs"):
    """|x|"""

    function = staticmethod(np.abs)
    floats_only = False


class Exp(Unary, name="t.exp"):
    """e**x"""

    function = staticmethod(np.exp)


class Log(Unary, name="t.log"):
    """Natural logarithm."""

    function = staticmethod(np.log)


class Sqrt(Unary, name="t.sqrt"):
    """Square root."""

    function = staticmethod(np.sqrt)


class Rsqrt(Unary, name="t.rsqrt"):
    """1 / sqrt(x)"""

    function = staticmethod(lambda x: 1 / np.sqrt(x))


class Reciprocal(Unary, name="t.reciprocal"):
    """1 / x"""

    function = staticmethod(lambda x: 1 / x)


class Tanh(Unary, name="t.tanh"):
    """Hyperbolic tangent."""

    function = staticmethod(np.tanh)


class Sigmoid(Unary, name="t.sigmoid"):
    """1 / (1 + exp(-x))"""

    function = staticmethod(_sigmoid)


class Erf(Unary, name="t.erf"):
    """The error function."""

    function = staticmethod(_erf)


class Sin(Unary, name="t.sin"):
    """Sine."""

    function = staticmethod(np.sin)


class Cos(Unary, name="t.cos"):
    """Cosine."""

    function = staticmethod(np.cos)


class Atan(Unary, name="t.atan"):
    """Inverse tangent, in radians."""

    function = staticmethod(np.arctan)


class Floor(Unary, name="t.floor"):
    """The largest integer not above x."""

    function = staticmethod(np.floor)


class Round(Unary, name="t.round"):
    """The nearest integer, halves to even."""

    function = staticmethod(np.round)


class Relu(Unary, name="t.relu"):
    """max(x, 0)"""

    function = staticmethod(lambda x: np.maximum(x, 0))
    floats_only = False


class Not(Unary, name="t.not"):
    """Logical negation of a bool tensor."""

    function = staticmethod(np.logical_not)

    def infer(self) -> Tensor:
        require(self.x.dtype == "bool", f"needs bool, not {self.x.dtype}")
        return Tensor(self.x.shape, "bool")


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}


class Activation(Op, name="t.activation"):
    """A named nonlinearity; `ACTIVATIONS` has the formulas (gelu: Hendrycks and Gimpel 2016; silu: Elfwing 2018)."""

    tokens = Tokens.ELEMENTS

    x: Value
    kind: str

    def infer(self) -> Tensor:
        require(self.kind in ACTIVATIONS, f"unknown activation {self.kind!r}; known: {', '.join(ACTIVATIONS)}")
        require(self.x.dtype in FLOATS, f"needs floats, not {self.x.dtype}")
        return Tensor(self.x.shape, self.x.dtype)

    def evaluate(self, x: Array) -> Array:
        wide = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
        return np.asarray(ACTIVATIONS[self.kind](wide), x.dtype)


class Cast(Op, name="t.cast"):
    """The same values in another dtype (floats to integers truncate)."""

    tokens = Tokens.ELEMENTS

    x: Value
    to: str

    def infer(self) -> Tensor:
        return Tensor(self.x.shape, self.to)

    def evaluate(self, x: Array) -> Array:
        return x.astype(numpy_dtype(self.to))


class Binary(Op):
    """Base: `function` of two broadcast operands of one dtype."""

    tokens = Tokens.ELEMENTS

    a: Value
    b: Value
    function: ClassVar[Callable[..., Any]]
    commutative: ClassVar[bool] = False

    def infer(self) -> Tensor:
        dtype = require_same_dtype(self.a, self.b)
        return Tensor(broadcast_shapes(self.a.shape, self.b.shape), dtype)

    def evaluate(self, a: Array, b: Array) -> Array:
        return np.asarray(type(self).function(a, b), a.dtype)


class Add(Binary, name="t.add"):
    """a + b"""

    function = staticmethod(np.add)
    commutative = True


class Sub(Binary, name="t.sub"):
    """a - b"""

    function = staticmethod(np.subtract)


class Mul(Binary, name="t.mul"):
    """a * b"""

    function = staticmethod(np.multiply)
    commutative = True


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return np.asarray(a / b)
    floor = np.floor_divide(a, b)
    # Rounded down is one too low where there is a rest and the signs differ.
    return np.asarray(floor + ((floor * b != a) & (b != 0) & ((a < 0) != (b < 0))))


class Div(Binary, name="t.div"):
    """a / b for floats; truncated towards zero for integers (by zero: any number)."""

    function = staticmethod(_divide)


class FloorDivide(Binary, name="t.floor_div"):
    """floor(a / b)"""

    function = staticmethod(np.floor_divide)


class Mod(Binary, name="t.mod"):
    """a - b * floor(a / b)"""

    function = staticmethod(np.mod)


class Fmod(Binary, name="t.fmod"):
    """The rest of a / b truncated towards zero, exactly; it has the sign of a."""

    function = staticmethod(np.fmod)


def _power(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return np.asarray(np.power(a, b))
    # An integer to a negative power is a fraction, truncated: only 1 and -1 leave anything.
    fraction = np.where(np.abs(a) == 1, np.where(b % 2 == 0, np.ones_like(a), a), np.zeros_like(a))
    return np.where(b < 0, fraction, np.power(a, np.maximum(b, 0)))


class Pow(Binary, name="t.pow"):
    """a ** b; of integers, truncated towards zero."""

    function = staticmethod(_power)


class Maximum(Binary, name="t.maximum"):
    """The larger of a and b."""

    function = staticmethod(np.maximum)
    commutative = True


class Minimum(Binary, name="t.minimum"):
    """The smaller of a and b."""

    function = staticmethod(np.minimum)
    commutative = True


class Compare(Binary):
    """Base of comparisons: the result is bool."""

    def infer(self) -> Tensor:
        require_same_dtype(self.a, self.b)
        return Tensor(broadcast_shapes(self.a.shape, self.b.shape), "bool")

    def evaluate(self, a: Array, b: Array) -> Array:
        return np.asarray(type(self).function(a, b), np.bool_)


class Equal(Compare, name="t.eq"):
    """a == b"""

    function = staticmethod(np.equal)
    commutative = True


class NotEqual(Compare, name="t.ne"):
    """a != b"""

    function = staticmethod(np.not_equal)
    commutative = True


class Less(Compare, name="t.lt"):
    """a < b"""

    function = staticmethod(np.less)


class LessEqual(Compare, name="t.le"):
    """a <= b"""

    function = staticmethod(np.less_equal)


class Greater(Compare, name="t.gt"):
    """a > b"""

    function = staticmethod(np.greater)


class GreaterEqual(Compare, name="t.ge"):
    """a >= b"""

    function = staticmethod(np.greater_equal)


class And(Compare, name="t.and"):
    """Logical and of bools."""

    function = staticmethod(np.logical_and)
    commutative = True


class Or(Compare, name="t.or"):
    """Logical or of bools."""

    function = staticmethod(np.logical_or)
    commutative = True


class Bitwise(Binary):
    """Base of operations on the bits of integers."""

    def infer(self) -> Tensor:
        require(self.a.dtype in INTEGERS, f"needs integers, not {self.a.dtype}")
        return super().infer()


class BitAnd(Bitwise, name="t.bit_and"):
    """Bits that are set in both."""

    function = staticmethod(np.bitwise_and)
    commutative = True


class BitOr(Bitwise, name="t.bit_or"):
    """Bits that are set in either."""

    function = staticmethod(np.bitwise_or)
    commutative = True


class BitXor(Bitwise, name="t.bit_xor"):
    """Bits that are set in one only."""

    function = staticmethod(np.bitwise_xor)
    commutative = True


class ShiftLeft(Bitwise, name="t.shift_left"):
    """a with its bits moved up by b; 0 where b is negative, or a's number of bits or more."""

    function = staticmethod(np.left_shift)


class ShiftRight(Bitwise, name="t.shift_right"):
    """a with its bits moved down by b, its sign kept: as far as they go where b is negative or too large."""

    function = staticmethod(np.right_shift)


class Bitcast(Op, name="t.bitcast"):
    """The same bytes as another dtype of the same width."""

    tokens = Tokens.ELEMENTS

    x: Value
    to: str

    def infer(self) -> Tensor:
        require(itemsize(self.x.dtype) == itemsize(self.to), f"{self.x.dtype} and {self.to} differ in width")
        return Tensor(self.x.shape, self.to)

    def evaluate(self, x: Array) -> Array:
        # Where floats evaluate wider than they are, the bytes are those of the dtype itself.
        own = np.ascontiguousarray(x.astype(NUMPY_DTYPES[self.x.dtype]))
        return own.view(NUMPY_DTYPES[self.to]).reshape(x.shape).astype(numpy_dtype(self.to))


class Where(Op, name="t.where"):
    """a where the condition holds, else b."""

    tokens = Tokens.ELEMENTS

    condition: Value
    a: Value
    b: Value

    def infer(self) -> Tensor:
        require(self.condition.dtype == "bool", "the condition must be bool")
        dtype = require_same_dtype(self.a, self.b)
        return Tensor(broadcast_shapes(self.condition.shape, self.a.shape, self.b.shape), dtype)

    def evaluate(self, condition: Array, a: Array, b: Array) -> Array:
        return np.where(condition, a, b)
