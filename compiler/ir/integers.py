"""llm-level ops of weights that a source has rounded to integers, and of the products that it computes with them.

All but `llm.round_to_integers` are evaluated when compiling: their operands come of params.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.elementwise import Add, Cast, Div, Maximum, Minimum, Mul, Round, Sub, constant
from llmc.compiler.ir.encoded import Encoded
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.op import Op, Param, Tokens, Value
from llmc.compiler.ir.shapes import broadcast_shapes, require
from llmc.compiler.ir.structural import Broadcast, Concat, Reshape, Slice
from llmc.compiler.ir.types import FLOATS, INTEGERS, NUMPY_DTYPES, Array, Shape, Tensor, numpy_dtype, parse_encoding


class UnpackNibbles(Op, name="llm.unpack_nibbles"):
    """u8 [..., n] -> u8 [..., 2 n]: the low, then the high four bits of each byte."""

    tokens = Tokens.WEIGHTS

    x: Value

    def infer(self) -> Tensor:
        require(self.x.dtype == "u8" and self.x.rank > 0, f"needs bytes, not {self.x.type}")
        return Tensor((*self.x.shape[:-1], 2 * self.x.shape[-1]), "u8")

    def evaluate(self, x: Array) -> Array:
        return np.stack([x & 15, x >> 4], axis=-1).reshape(*x.shape[:-1], 2 * x.shape[-1])


class ScaleIntegers(Op, name="llm.scale_integers"):
    """(q - zeros) * scales: what integers stand for, in the dtype of the scales.

    block 0: scales and zeros broadcast to q. Else they have q's shape but for `axis`, where each one is for `block`
    elements and the last one for what is left.
    """

    tokens = Tokens.WEIGHTS

    q: Value
    scales: Value
    zeros: Value | None = None
    axis: int = 0
    block: int = 0

    def infer(self) -> Tensor:
        require(self.q.dtype in INTEGERS, f"needs integers, not {self.q.dtype}")
        require(self.scales.dtype in FLOATS, f"scales are {self.scales.dtype}, not floats")
        expected = list(self.q.shape)
        if self.block:
            require(self.block > 0 and 0 <= self.axis < self.q.rank, "needs a positive block and an axis")
            expected[self.axis] = (expected[self.axis] + (self.block - 1)) // self.block
        for what, value in (("scales", self.scales), ("zeros", self.zeros)):
            if value is not None:
                fits = broadcast_shapes(value.shape, tuple(expected)) == tuple(expected)
                require(fits, f"{what} of {list(value.shape)} for integers of {list(self.q.shape)}")
        return Tensor(self.q.shape, self.scales.dtype)

    def evaluate(self, q: Array, scales: Array, zeros: Array | None) -> Array:
        wide = np.result_type(scales.dtype, np.float32)
        y = q.astype(wide)
        if zeros is not None:
            y -= self._whole(zeros.astype(wide), q)
        return np.asarray(y * self._whole(scales.astype(wide), q), scales.dtype)

    def _whole(self, values: Array, q: Array) -> Array:
        axis = self._blocked(values.shape)
        if axis is None:
            return values
        return np.repeat(values, self.block, axis).take(np.arange(q.shape[self.axis]), axis)

    def _blocked(self, shape: Shape) -> int | None:
        """Which axis of scales or zeros has one element a block; None where one is for all. Shapes align at the end."""
        axis = self.axis - self.q.rank + len(shape)
        return axis if self.block and axis >= 0 and shape[axis] != 1 else None

    def decompose(self) -> Value:
        q: Value = Cast(self.q, self.dtype)
        if self.zeros is not None:
            q = Sub(q, self.broadcast(Cast(self.zeros, self.dtype)))
        return Mul(q, self.broadcast(self.scales))

    def broadcast(self, values: Value) -> Value:
        """Scales or zeros as they meet the integers."""
        axis = self._blocked(values.shape)
        return values if axis is None else repeat_blocks(values, axis, self.block, self.q.shape[self.axis])


def repeat_blocks(values: Value, axis: int, block: int, size: int | Dim) -> Value:
    """Each element of an axis `block` times, `size` in all."""
    if block == 1:
        return values
    shape = values.shape
    apart = Reshape(values, (*shape[: axis + 1], 1, *shape[axis + 1 :]))
    repeated = Broadcast(apart, (*shape[: axis + 1], block, *shape[axis + 1 :]))
    whole: Value = Reshape(repeated, (*shape[:axis], shape[axis] * block, *shape[axis + 1 :]))
    return whole if whole.shape[axis] == size else Slice(whole, axis, 0, size)


class PackGroups(Op, name="llm.pack_groups"):
    """An encoded weight of given integers: q [..., K], scales and minimums [..., ceil(K / group)], rounded to f16;
    of an encoding with one scale a row [..., 1].

    `encoding` is one of groups of integers: q in its range (u8 where it has minimums, else i8; 8-bit integers may be
    -128). The logical dtype is f32.
    """

    tokens = Tokens.WEIGHTS

    q: Value
    scales: Value
    minimums: Value | None
    encoding: str

    def infer(self) -> Tensor:
        from llmc.compiler.encodings.grouped import grouped

        kind = grouped(parse_encoding(self.encoding))
        require((self.minimums is None) == kind.symmetric, "minimums go with asymmetric encodings, and only with them")
        expected = "i8" if kind.symmetric else "u8"
        require(self.q.dtype == expected, f"integers are {self.q.dtype}, {kind} has {expected}")
        size = self.q.shape[-1]
        shape = (*self.q.shape[:-1], 1 if kind.per_row else (size + (kind.group - 1)) // kind.group)
        for value in (self.scales, self.minimums):
            if value is not None:
                require(value.shape == shape, f"a scale or minimum of {list(value.shape)}, groups are {list(shape)}")
                require(value.dtype in FLOATS, f"scales are {value.dtype}, not floats")
        return Tensor(self.q.shape, "f32", kind)

    @staticmethod
    def of_rows(weight: Value, function: Callable[[Value], Value]) -> Value:
        """A function that takes rows of [outputs, ...] to rows, of an encoded weight's parts, or of a plain weight."""
        if not isinstance(weight, PackGroups):
            return function(weight)
        minimums = None if weight.minimums is None else function(weight.minimums)
        return PackGroups(function(weight.q), function(weight.scales), minimums, weight.encoding)

    @staticmethod
    def stacked(weights: Sequence[PackGroups]) -> PackGroups:
        """Rows of weights of one encoding, one below the other."""
        minimums = tuple(weight.minimums for weight in weights if weight.minimums is not None)
        scales = tuple(weight.scales for weight in weights)
        q = Concat(tuple(weight.q for weight in weights), 0)
        return PackGroups(q, Concat(scales, 0), Concat(minimums, 0) if minimums else None, weights[0].encoding)

    def evaluate(self, q: Array, scales: Array, minimums: Array | None) -> Encoded:
        encoding = self.tensor.encoding
        assert encoding is not None
        parts = {"q": q, "scales": scales.astype(np.float16)}
        if minimums is not None:
            parts["minimums"] = minimums.astype(np.float16)
        return Encoded(encoding, q.shape, parts)


def parameter_count(graph: Graph) -> int:
    """Numbers in the weights that a graph reads: of weights in integers those that they stand for, not their parts."""
    total, parts = 0, set[Value]()
    for op in graph.ops:
        if isinstance(op, (ScaleIntegers, PackGroups)) and op in graph.constants:
            inside = {value for value in topological([op]) if isinstance(value, Param)}
            if not inside or not inside <= parts:
                total += _elements(op)
            parts |= inside
    return total + sum(_elements(param) for param in graph.params if param not in parts)


def _elements(value: Value) -> int:
    count = product(value.shape)
    require(isinstance(count, int), f"a weight has the symbolic size {count}")
    return int(count)  # type: ignore[arg-type]


class RoundToIntegers(Op, name="llm.round_to_integers"):
    """clip(round(x / scale) + zero) as `dtype_name`; halves round to even. scale and zero broadcast to x."""

    tokens = Tokens.ELEMENTS

    x: Value
    scale: Value
    zero: Value | None
    dtype_name: str

    def infer(self) -> Tensor:
        require(self.x.dtype in FLOATS and self.scale.dtype in FLOATS, "needs floats and a float scale")
        require(self.dtype_name in INTEGERS, f"rounds to integers, not {self.dtype_name}")
        for value in (self.scale, self.zero):
            if value is not None:
                require(broadcast_shapes(value.shape, self.x.shape) == self.x.shape, "scale and zero broadcast to x")
        return Tensor(self.x.shape, self.dtype_name)

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and largest integer of the dtype."""
        info = np.iinfo(NUMPY_DTYPES[self.dtype_name])
        return int(info.min), int(info.max)

    def evaluate(self, x: Array, scale: Array, zero: Array | None) -> Array:
        wide = numpy_dtype("f32")
        y = np.round(x.astype(wide) / scale.astype(wide))
        if zero is not None:
            y = y + zero.astype(wide)
        return np.asarray(np.clip(y, *self.limits), NUMPY_DTYPES[self.dtype_name])

    def decompose(self) -> Value:
        x, scale = (v if v.dtype == "f32" else Cast(v, "f32") for v in (self.x, self.scale))
        y: Value = Round(Div(x, scale))
        if self.zero is not None:
            y = Add(y, Cast(self.zero, "f32"))
        lowest, highest = (constant(float(limit), "f32") for limit in self.limits)
        return Cast(Minimum(Maximum(y, lowest), highest), self.dtype_name)
