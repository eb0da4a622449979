"""Tensor functions that write ONNX nodes, in one of several spellings of the same."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_TYPES = {"f32": TensorProto.FLOAT, "i64": TensorProto.INT64, "i32": TensorProto.INT32, "bool": TensorProto.BOOL}
_NUMPY = {"f32": np.float32, "i64": np.int64, "i32": np.int32, "bool": np.bool_}
_NAMES = {np.dtype(dtype): name for name, dtype in _NUMPY.items()}
Operand = "Value | float | int | np.ndarray"


def weight(seed: int, name: str, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
    """The weight of a name: normal, of spread `scale`. The same in every version of a model."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return (rng.standard_normal(tuple(shape)) * scale).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Value:
    """The result of a node, with Python's operators."""

    m: OnnxOps
    name: str
    dtype: str

    def __add__(self, other: object) -> Value:
        return self.m.binary("Add", self, other)

    def __radd__(self, other: object) -> Value:
        return self.m.binary("Add", other, self)

    def __sub__(self, other: object) -> Value:
        if self.m.other_way(0.1):
            return self.m.binary("Add", self, self.m.node("Neg", self.m.as_value(other, self.dtype)))
        return self.m.binary("Sub", self, other)

    def __rsub__(self, other: object) -> Value:
        return self.m.binary("Sub", other, self)

    def __mul__(self, other: object) -> Value:
        return self.m.binary("Mul", self, other)

    def __rmul__(self, other: object) -> Value:
        return self.m.binary("Mul", other, self)

    def __truediv__(self, other: object) -> Value:
        if self.dtype == "f32" and self.m.other_way(0.1):
            return self.m.binary("Mul", self, self.m.node("Reciprocal", self.m.as_value(other, "f32")))
        return self.m.binary("Div", self, other)

    def __rtruediv__(self, other: object) -> Value:
        return self.m.binary("Div", other, self)

    def __floordiv__(self, other: object) -> Value:
        found = self.m.binary("Div", self, other)
        return self.m.node("Floor", found) if self.dtype == "f32" else found

    def __mod__(self, other: object) -> Value:
        return self.m.node("Mod", self, self.m.as_value(other, self.dtype), fmod=int(self.dtype == "f32"))

    def __neg__(self) -> Value:
        return self.m.node("Neg", self)

    def __and__(self, other: object) -> Value:
        if self.m.other_way(0.1):  # De Morgan
            return ~(~self | ~self.m.as_value(other, "bool"))
        return self.m.binary("And", self, other)

    def __or__(self, other: object) -> Value:
        return self.m.binary("Or", self, other)

    def __xor__(self, other: object) -> Value:
        return self.m.binary("Xor", self, other)

    def __invert__(self) -> Value:
        return self.m.node("Not", self)

    def __lt__(self, other: object) -> Value:
        return self.m.compare("Less", self, other)

    def __le__(self, other: object) -> Value:
        return self.m.compare("LessOrEqual", self, other)

    def __gt__(self, other: object) -> Value:
        return self.m.compare("Greater", self, other)

    def __ge__(self, other: object) -> Value:
        return self.m.compare("GreaterOrEqual", self, other)


_SWAPPED = {"Less": "Greater", "LessOrEqual": "GreaterOrEqual", "Equal": "Equal"}
_SWAPPED |= {b: a for a, b in _SWAPPED.items()}
_OPPOSITE = {"Less": "GreaterOrEqual", "LessOrEqual": "Greater"}
_OPPOSITE |= {b: a for a, b in _OPPOSITE.items()}


class OnnxOps:
    """Writes nodes. seed: of the weights. spelling: chooses among ways to write the same; None: always the first."""

    style = "onnx"

    def __init__(self, seed: int, spelling: random.Random | None) -> None:
        self.seed = seed
        self.spelling = spelling
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, np.ndarray] = {}

    def other_way(self, chance: float = 0.3) -> bool:
        """Whether to write something in its other way."""
        return self.spelling is not None and self.spelling.random() < chance

    # Values

    def node(self, op: str, *operands: object, dtype: str | None = None, **attributes: object) -> Value:
        """One node of one result; its dtype is that of the first operand unless said."""
        return self.several(op, *operands, count=1, dtype=dtype, **attributes)[0]

    def several(
        self, op: str, *operands: object, count: int, dtype: str | None = None, **attributes: object
    ) -> list[Value]:
        """One node of several results."""
        names = [value.name if isinstance(value, Value) else self._store(value) for value in operands]
        results = [f"{op.lower()}_{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(op, names, results, **attributes))
        first = next((value.dtype for value in operands if isinstance(value, Value)), "f32")
        return [Value(self, name, dtype or first) for name in results]

    def _store(self, value: object) -> str:
        if value is None:
            return ""
        array = np.asarray(value)
        name = f"constant_{len(self.stored)}"
        self.stored[name] = array
        return name

    def as_value(self, value: object, dtype: str) -> Value:
        """A number or array as a constant of a dtype."""
        if isinstance(value, Value):
            return value
        return Value(self, self._store(np.asarray(value, _NUMPY[dtype])), dtype)

    def binary(self, op: str, a: object, b: object) -> Value:
        """A node of two operands, of which one may be a number."""
        dtype = a.dtype if isinstance(a, Value) else b.dtype  # type: ignore[attr-defined]
        a, b = self.as_value(a, dtype), self.as_value(b, dtype)
        assert a.dtype == b.dtype, (op, a.dtype, b.dtype)
        return self.node(op, a, b)

    def compare(self, op: str, a: Value, b: object) -> Value:
        """A comparison, or its mirror image, or the opposite of its opposite."""
        other = self.as_value(b, a.dtype)
        if self.other_way(0.2):
            return self.node(_SWAPPED[op], other, a, dtype="bool")
        if op in _OPPOSITE and self.other_way(0.2):
            return self.node("Not", self.node(_OPPOSITE[op], a, other, dtype="bool"))
        return self.node(op, a, other, dtype="bool")

    def eq(self, a: Value, b: object) -> Value:
        """Whether both are the same."""
        return self.compare("Equal", a, b)

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> Value:
        """A random weight."""
        self.stored[name] = weight(self.seed, name, shape, scale)
        return Value(self, name, "f32")

    def table(self, name: str, array: np.ndarray) -> Value:
        """A stored array."""
        self.stored[name] = array
        return Value(self, name, _NAMES[array.dtype])

    # Functions

    def cast(self, x: Value, dtype: str) -> Value:
        """In another dtype."""
        return x if x.dtype == dtype else self.node("Cast", x, to=_TYPES[dtype], dtype=dtype)

    def f(self, x: Value) -> Value:
        """As f32."""
        return self.cast(x, "f32")

    def where(self, condition: Value, a: object, b: object) -> Value:
        """a where the condition holds, b elsewhere."""
        dtype = next((v.dtype for v in (a, b) if isinstance(v, Value)), "f32")
        a, b = self.as_value(a, dtype), self.as_value(b, dtype)
        if self.other_way(0.15):
            return self.node("Where", ~condition, b, a, dtype=dtype)
        return self.node("Where", condition, a, b, dtype=dtype)

    def exp(self, x: Value) -> Value:
        return self.node("Exp", x)

    def log(self, x: Value) -> Value:
        return self.node("Log", x)

    def sqrt(self, x: Value) -> Value:
        return self.node("Pow", x, np.float32(0.5)) if self.other_way(0.15) else self.node("Sqrt", x)

    def square(self, x: Value) -> Value:
        return self.node("Pow", x, np.float32(2.0)) if self.other_way() else x * x

    def power(self, x: object, y: object) -> Value:
        return self.binary("Pow", x, y)

    def abs(self, x: Value) -> Value:
        return self.node("Abs", x)

    def tanh(self, x: Value) -> Value:
        return self.node("Tanh", x)

    def sigmoid(self, x: Value) -> Value:
        if self.other_way(0.2):
            return 1.0 / (self.exp(-x) + 1.0)
        return self.node("Sigmoid", x)

    def erf(self, x: Value) -> Value:
        return self.node("Erf", x)

    def relu(self, x: Value) -> Value:
        return self.node("Max", x, np.float32(0)) if self.other_way() else self.node("Relu", x)

    def softplus(self, x: Value) -> Value:
        return self.node("Softplus", x)

    def sin(self, x: Value) -> Value:
        return self.node("Sin", x)

    def cos(self, x: Value) -> Value:
        return self.node("Cos", x)

    def floor(self, x: Value) -> Value:
        return self.node("Floor", x)

    def maximum(self, x: Value, y: object) -> Value:
        if self.other_way(0.15):
            other = self.as_value(y, x.dtype)
            return self.where(x > other, x, other)
        return self.binary("Max", x, y)

    def minimum(self, x: Value, y: object) -> Value:
        return self.binary("Min", x, y)

    def clip(self, x: Value, low: float, high: float) -> Value:
        if self.other_way():
            return self.minimum(self.maximum(x, low), high)
        return self.node("Clip", x, self.as_value(low, x.dtype), self.as_value(high, x.dtype))

    def softmax(self, x: Value, axis: int = -1) -> Value:
        return self.node("Softmax", x, axis=axis)

    def log_softmax(self, x: Value) -> Value:
        return self.node("LogSoftmax", x, axis=-1)

    def matmul(self, x: Value, y: Value) -> Value:
        return self.node("MatMul", x, y)

    def transpose(self, x: Value, *permutation: int) -> Value:
        return self.node("Transpose", x, perm=list(permutation))

    def reshape(self, x: Value, *sizes: int) -> Value:
        """A size of 0 is the same as before."""
        return self.node("Reshape", x, np.array(sizes, np.int64))

    def unsqueeze(self, x: Value, axis: int) -> Value:
        return self.node("Unsqueeze", x, np.array([axis], np.int64))

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        return self.node("Concat", *values, axis=axis)

    def split(self, x: Value, sizes: Sequence[int], axis: int = -1) -> list[Value]:
        """Pieces of these sizes."""
        if self.other_way():
            ends = np.cumsum(sizes)
            return [self.slice(x, int(end) - size, int(end), axis) for end, size in zip(ends, sizes, strict=True)]
        return self.several("Split", x, np.array(sizes, np.int64), count=len(sizes), axis=axis)

    def slice(self, x: Value, start: int, stop: int | None, axis: int, step: int = 1) -> Value:
        """Part of an axis. stop None: to the end."""
        end = stop if stop is not None else np.iinfo(np.int64).max
        one = [np.array([n], np.int64) for n in (start, end, axis, step)]
        return self.node("Slice", x, *one)

    def top(self, x: Value, length: Value, axis: int) -> Value:
        """The first `length` (a scalar) of an axis."""
        ends = self.node("Reshape", length, np.array([1], np.int64))
        return self.node("Slice", x, np.array([0], np.int64), ends, np.array([axis], np.int64))

    def rows(self, table: Value, index: Value) -> Value:
        """Rows of a table."""
        return self.node("Gather", table, index, axis=0)

    def take(self, x: Value, indices: Sequence[int], axis: int) -> Value:
        """Chosen entries of an axis."""
        return self.node("Gather", x, np.array(indices, np.int64), axis=axis)

    def reduce(self, op: str, x: Value, axis: int, keep: bool = True) -> Value:
        """op: Sum, Mean or Max."""
        return self.node(f"Reduce{op}", x, np.array([axis], np.int64), keepdims=int(keep))

    def cumsum(self, x: Value, axis: int) -> Value:
        return self.node("CumSum", x, np.int64(axis))

    def triangle(self, length: Value, upper: bool = False, diagonal: int = 0) -> Value:
        """Booleans [S, S]: true at and below the diagonal; upper: at and above it."""
        one = self.node("Reshape", length, np.array([1], np.int64))
        shape = self.node("Concat", one, one, axis=0)
        ones = self.node("ConstantOfShape", shape, dtype="f32", value=numpy_helper.from_array(np.ones(1, np.float32)))
        return self.cast(self.node("Trilu", ones, np.int64(diagonal), upper=int(upper)), "bool")

    def is_nan(self, x: Value) -> Value:
        return self.node("IsNaN", x, dtype="bool")

    def expand_like(self, x: Value, like: Value) -> Value:
        """Broadcast to the shape of another."""
        return self.node("Expand", x, self.node("Shape", like, dtype="i64"))

    def bitand(self, x: Value, y: object) -> Value:
        return self.binary("BitwiseAnd", x, y)

    def const(self, array: np.ndarray) -> Value:
        """A small array as it stands."""
        return Value(self, self._store(array), _NAMES[array.dtype])

    def shifted(self, x: Value, by: int) -> Value:
        """x [B, S, N] some tokens later, with zeros in front."""
        padded = self.node("Pad", x, np.array([0, by, 0, 0, 0, 0], np.int64))
        return self.top(padded, self.length_of(x, 1), 1)

    def flipped(self, x: Value, axis: int) -> Value:
        """An axis backwards."""
        one = [np.array([n], np.int64) for n in (-1, np.iinfo(np.int64).min + 1, axis, -1)]
        return self.node("Slice", x, *one)

    # The model's own inputs

    def length_of(self, x: Value, axis: int) -> Value:
        """The size of an axis: i64 scalar."""
        shape = self.node("Shape", x, dtype="i64")
        return self.node("Gather", shape, np.int64(axis), axis=0)

    def arange(self, length: Value) -> Value:
        """0, 1, ... i64[length]."""
        if self.other_way(0.2):
            one = self.node("Reshape", length, np.array([1], np.int64))
            ones = self.node("ConstantOfShape", one, dtype="i64", value=numpy_helper.from_array(np.ones(1, np.int64)))
            return self.cumsum(ones, 0) - 1
        return self.node("Range", np.int64(0), length, np.int64(1), dtype="i64")

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: dict[str, tuple[Value, Sequence[int | str]]]
    ) -> onnx.ModelProto:
        """The file. outputs: value and shape by name."""
        infos = []
        for name, (value, shape) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value.name], [name]))
            infos.append(helper.make_tensor_value_info(name, _TYPES[value.dtype], list(shape)))
        stored = [numpy_helper.from_array(array, name) for name, array in self.stored.items()]
        graph = helper.make_graph(self.nodes, "hard", list(inputs), infos, stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def model_input(name: str, dtype: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """An input of a model."""
    return helper.make_tensor_value_info(name, _TYPES[dtype], list(shape))
