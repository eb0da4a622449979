"""llm-level ops: the parts of a transformer that targets have kernels for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.attention import Attention as Attention
from llmc.compiler.ir.attention import KVAppend as KVAppend
from llmc.compiler.ir.attention import PagedAttention as PagedAttention
from llmc.compiler.ir.attention import attend as attend
from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import (
    Activation,
    Add,
    Cast,
    Cos,
    Mul,
    Rsqrt,
    Sin,
    Sub,
    constant,
)
from llmc.compiler.ir.encoded import Encoded, decoded
from llmc.compiler.ir.op import Lookup, Op, Tokens, Value
from llmc.compiler.ir.shapes import require
from llmc.compiler.ir.structural import (
    Concat,
    Gather,
    Matmul,
    Mean,
    Reshape,
    Slice,
    Transpose,
    split_exact,
)
from llmc.compiler.ir.types import (
    Array,
    Encoding,
    Tensor,
    is_precise,
    numpy_dtype,
    parse_encoding,
    register_encoding,
)

ACTIVATION_ROUNDINGS = ("f32", "bf16", "int8")


@dataclass(frozen=True)
class RoundedActivations(Encoding):
    """int8 with one f32 scale and one i32 sum a row and group of `group` features; the values stay logical f32."""

    group: int

    @property
    def name(self) -> str:
        return f"a8g{self.group}"


@register_encoding
def _rounded_activations(name: str) -> Encoding | None:
    return RoundedActivations(int(name[3:])) if name.startswith("a8g") and name[3:].isdigit() else None


class Embed(Op, name="llm.embed"):
    """Rows of a table [vocabulary, features] by token id, as `dtype_name`."""

    tokens = Tokens.MOVES

    table: Value
    ids: Value
    dtype_name: str = "f32"

    def infer(self) -> Tensor:
        require(self.table.rank == 2, "the table must be a matrix")
        require(self.ids.dtype in ("i32", "i64"), f"ids must be i32 or i64, not {self.ids.dtype}")
        return Tensor((*self.ids.shape, self.table.shape[1]), self.dtype_name)

    def lookups(self) -> tuple[Lookup, ...]:
        return (Lookup("ids", self.table),)

    def evaluate(self, table: Array | Encoded, ids: Array) -> Array:
        return decoded(table)[ids].astype(numpy_dtype(self.dtype_name))

    def decompose(self) -> Value:
        table: Value = self.table if self.table.tensor.encoding is None else Dequantize(self.table)
        rows = Gather(table, self.ids, 0)
        return rows if rows.dtype == self.dtype_name else Cast(rows, self.dtype_name)


class Quantize(Op, name="llm.quantize"):
    """A weight rounded to an encoding; evaluated when compiling. `search`: look for scales that minimise the error."""

    tokens = Tokens.WEIGHTS

    w: Value
    encoding: str
    search: bool = True

    def infer(self) -> Tensor:
        require(self.w.tensor.encoding is None, "the weight is already encoded")
        return Tensor(self.w.shape, self.w.dtype, parse_encoding(self.encoding))

    def evaluate(self, w: Array) -> Encoded:
        from llmc.compiler.encodings import encode

        encoding = self.tensor.encoding
        assert encoding is not None
        return encode(encoding, w, search=self.search)


class Dequantize(Op, name="llm.dequantize"):
    """The logical values of an encoded weight."""

    tokens = Tokens.WEIGHTS

    w: Value

    def infer(self) -> Tensor:
        require(self.w.tensor.encoding is not None, "the weight is not encoded")
        return Tensor(self.w.shape, self.w.dtype)

    def evaluate(self, w: Encoded) -> Array:
        return w.decode().astype(numpy_dtype(self.dtype))


def round_activations(x: Array, rounding: str, group: int) -> Array:
    """Activations [..., K] as a kernel sees them: bf16, or int8 with one f32 scale, max|x| / 127, a row and group."""
    if rounding == "bf16":
        return x.astype(numpy_dtype("bf16")).astype(x.dtype)  # as a pair of casts does
    if rounding != "int8":
        return x
    size = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % group)])
    groups = padded.reshape(-1, group)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / 127
    if not is_precise():
        scale = scale.astype(np.float32)
    q = np.round(groups / np.where(scale == 0, 1, scale))
    return np.asarray((q * scale).reshape(padded.shape)[..., :size], x.dtype)


class QuantizeActivations(Op, name="llm.quantize_activations"):
    """x rounded to int8, one f32 scale max|x| / 127 a row and group: what an integer matmul multiplies."""

    tokens = Tokens.ROWS

    x: Value
    group: int

    def infer(self) -> Tensor:
        require(self.x.tensor.encoding is None, "the activations are already encoded")
        require(self.group > 0, "needs a positive group")
        return Tensor(self.x.shape, self.x.dtype, parse_encoding(f"a8g{self.group}"))

    def evaluate(self, x: Array) -> Array:
        return round_activations(x, "int8", self.group)


def _group_of(weight: Value) -> int:
    encoding = weight.tensor.encoding
    return int(getattr(encoding, "group", 0)) or 64


class Linear(Op, name="llm.linear"):
    """activation(x @ w.T + bias) + residual; w is [outputs, inputs], accumulated in f32.

    `rounding` says what the activations are rounded to in front of the product (see `round_activations`).
    """

    tokens = Tokens.ROWS
    vectors = ("bias",)

    x: Value
    w: Value
    bias: Value | None = None
    residual: Value | None = None
    activation: str = ""
    rounding: str = "f32"

    def infer(self) -> Tensor:
        require(self.w.rank == 2, "the weight must be a matrix")
        require(self.x.shape[-1] == self.w.shape[1], f"{self.x.shape[-1]} features meet {self.w.shape[1]} inputs")
        require(self.rounding in ACTIVATION_ROUNDINGS, f"unknown rounding {self.rounding!r}")
        shape = (*self.x.shape[:-1], self.w.shape[0])
        if self.bias is not None:
            require(self.bias.shape == (self.w.shape[0],), f"bias of {self.bias.shape}, outputs {self.w.shape[0]}")
        if self.residual is not None:
            require(self.residual.shape == shape, f"residual of {self.residual.shape}, result {shape}")
        return Tensor(shape, self.x.dtype)

    def evaluate(self, x: Array, w: Array | Encoded, bias: Array | None, residual: Array | None) -> Array:
        wide = numpy_dtype("f32")
        rounded = round_activations(x, self.rounding, _group_of(self.w)).astype(wide)
        y = rounded @ decoded(w).astype(wide).T
        if bias is not None:
            y = y + bias.astype(wide)
        if self.activation:
            from llmc.compiler.ir.elementwise import ACTIVATIONS

            y = ACTIVATIONS[self.activation](y)
        if residual is not None:
            y = y + residual.astype(wide)
        return np.asarray(y, x.dtype)

    def decompose(self) -> Value | None:
        if self.rounding != "f32":
            return None
        weight: Value = self.w if self.w.tensor.encoding is None else Dequantize(self.w)
        if weight.dtype != self.x.dtype:
            weight = Cast(weight, self.x.dtype)
        y: Value = Matmul(self.x, Transpose(weight, (1, 0)))
        if self.bias is not None:
            y = Add(y, self.bias if self.bias.dtype == y.dtype else Cast(self.bias, y.dtype))
        if self.activation:
            y = Activation(y, self.activation)
        return y if self.residual is None else Add(y, self.residual)


class GatedLinear(Op, name="llm.gated_linear"):
    """activation(x @ gate.T + b0) * (x @ up.T + b1), where w = [gate; up] is [2 * outputs, inputs] (Shazeer 2020)."""

    tokens = Tokens.ROWS
    vectors = ("bias",)

    x: Value
    w: Value
    bias: Value | None = None
    activation: str = "silu"
    rounding: str = "f32"

    def infer(self) -> Tensor:
        require(self.w.rank == 2, "the weight must be a matrix")
        require(self.x.shape[-1] == self.w.shape[1], f"{self.x.shape[-1]} features meet {self.w.shape[1]} inputs")
        return Tensor((*self.x.shape[:-1], split_exact(self.w.shape[0], 2)), self.x.dtype)

    def evaluate(self, x: Array, w: Array | Encoded, bias: Array | None) -> Array:
        from llmc.compiler.ir.elementwise import ACTIVATIONS

        wide = numpy_dtype("f32")
        y = round_activations(x, self.rounding, _group_of(self.w)).astype(wide) @ decoded(w).astype(wide).T
        if bias is not None:
            y = y + bias.astype(wide)
        gate, up = np.split(y, 2, axis=-1)
        return np.asarray(ACTIVATIONS[self.activation](gate) * up, x.dtype)

    def decompose(self) -> Value:
        y = Linear(self.x, self.w, self.bias, None, "", self.rounding)
        last, half = y.rank - 1, self.shape[-1]
        gate = Slice(y, last, 0, half)
        up = Slice(y, last, half, half * 2)
        return Mul(Activation(gate, self.activation), up)


class RMSNorm(Op, name="llm.rms_norm"):
    """x / sqrt(mean(x^2, -1) + eps) * (w + offset), accumulated in f32 (Zhang and Sennrich 2019)."""

    tokens = Tokens.ROWS
    vectors = ("w",)

    x: Value
    w: Value | None
    eps: float
    offset: float = 0.0

    def infer(self) -> Tensor:
        require(self.x.shape[-1] != 0, "rows without elements have no mean")
        if self.w is not None:
            require(self.w.shape == self.x.shape[-1:], f"weight of {self.w.shape} for rows of {self.x.shape[-1]}")
        return Tensor(self.x.shape, self.x.dtype)

    def evaluate(self, x: Array, w: Array | None) -> Array:
        wide = x.astype(numpy_dtype("f32"))
        y = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return np.asarray(y if w is None else y * (w.astype(wide.dtype) + self.offset), x.dtype)

    def decompose(self) -> Value:
        x = self.x if self.x.dtype == "f32" else Cast(self.x, "f32")
        mean = Mean(Mul(x, x), (x.rank - 1,))
        y: Value = Mul(x, Rsqrt(Add(mean, constant(self.eps, "f32"))))
        if self.w is not None:
            w: Value = self.w if self.w.dtype == "f32" else Cast(self.w, "f32")
            y = Mul(y, Add(w, constant(self.offset, "f32")) if self.offset else w)
        return y if self.dtype == "f32" else Cast(y, self.dtype)


class LayerNorm(Op, name="llm.layer_norm"):
    """(x - mean) / sqrt(variance + eps) * w + b over the last axis, in f32 (Ba et al. 2016)."""

    tokens = Tokens.ROWS
    vectors = ("w", "b")

    x: Value
    w: Value | None
    b: Value | None
    eps: float

    def infer(self) -> Tensor:
        require(self.x.shape[-1] != 0, "rows without elements have no mean")
        for value in (self.w, self.b):
            if value is not None:
                require(value.shape == self.x.shape[-1:], f"{value.shape} for rows of {self.x.shape[-1]}")
        return Tensor(self.x.shape, self.x.dtype)

    def evaluate(self, x: Array, w: Array | None, b: Array | None) -> Array:
        wide = x.astype(numpy_dtype("f32"))
        centred = wide - wide.mean(axis=-1, keepdims=True)
        y = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        y = y if w is None else y * w.astype(wide.dtype)
        return np.asarray(y if b is None else y + b.astype(wide.dtype), x.dtype)

    def decompose(self) -> Value:
        x = self.x if self.x.dtype == "f32" else Cast(self.x, "f32")
        axes = (x.rank - 1,)
        centred = Sub(x, Mean(x, axes))
        variance = Mean(Mul(centred, centred), axes)
        y: Value = Mul(centred, Rsqrt(Add(variance, constant(self.eps, "f32"))))
        if self.w is not None:
            y = Mul(y, self.w if self.w.dtype == "f32" else Cast(self.w, "f32"))
        if self.b is not None:
            y = Add(y, self.b if self.b.dtype == "f32" else Cast(self.b, "f32"))
        return y if self.dtype == "f32" else Cast(y, self.dtype)


class RopeAngles(Op, name="llm.rope_angles"):
    """[T, 2, pairs]: scale * cos and scale * sin of position * frequency, for positions [T] and frequencies [pairs]."""

    tokens = Tokens.FIRST
    vectors = ("frequencies",)

    positions: Value
    frequencies: Value
    scale: float = 1.0

    def infer(self) -> Tensor:
        require(self.positions.rank == 1 and self.frequencies.rank == 1, "needs positions [T] and frequencies [pairs]")
        return Tensor((self.positions.shape[0], 2, self.frequencies.shape[0]), "f32")

    def evaluate(self, positions: Array, frequencies: Array) -> Array:
        wide = numpy_dtype("f32")
        angles = positions.astype(wide)[:, None] * frequencies.astype(wide)[None, :]
        return np.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1) * wide.type(self.scale))

    def decompose(self) -> Value:
        tokens, pairs = self.positions.shape[0], self.frequencies.shape[0]
        positions = Reshape(Cast(self.positions, "f32"), (tokens, 1))
        frequencies = self.frequencies if self.frequencies.dtype == "f32" else Cast(self.frequencies, "f32")
        angles = Mul(positions, frequencies)
        both = Concat(tuple(Reshape(x, (tokens, 1, pairs)) for x in (Cos(angles), Sin(angles))), 1)
        return Mul(both, constant(self.scale, "f32")) if self.scale != 1 else both


class Rope(Op, name="llm.rope"):
    """Rotary position embedding of x [T, heads, dim] (Su et al. 2021) by angles [T, 2, pairs].

    The first 2 * pairs channels turn, the rest pass. Channel i pairs with i + pairs (half), or 2i with 2i + 1
    (interleaved): a' = a cos - b sin, b' = b cos + a sin.
    """

    tokens = Tokens.FIRST

    x: Value
    angles: Value
    interleaved: bool = False

    def infer(self) -> Tensor:
        require(self.x.rank == 3, f"needs x [T, heads, dim], not rank {self.x.rank}")
        require(self.angles.rank == 3 and self.angles.shape[1] == 2, "needs angles [T, 2, pairs]")
        require(self.x.shape[0] == self.angles.shape[0], "x and angles have different token counts")
        pairs, dim = self.angles.shape[2], self.x.shape[2]
        require(isinstance(pairs, int) and isinstance(dim, int) and 2 * pairs <= dim, "more angles than channels")
        return Tensor(self.x.shape, self.x.dtype)

    def evaluate(self, x: Array, angles: Array) -> Array:
        pairs = angles.shape[2]
        cos, sin = angles[:, None, 0], angles[:, None, 1]
        turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            result = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
        else:
            a, b = turned[..., :pairs], turned[..., pairs:]
            result = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return np.concatenate([result, rest], axis=-1).astype(x.dtype)

    def decompose(self) -> Value:
        tokens, heads, dim = self.x.shape
        pairs = static(self.angles.shape[2])
        cos: Value = Slice(self.angles, 1, 0, 1)  # [T, 1, pairs]: broadcast over heads
        sin: Value = Slice(self.angles, 1, 1, 2)
        if cos.dtype != self.x.dtype:
            cos, sin = Cast(cos, self.x.dtype), Cast(sin, self.x.dtype)
        turned = Slice(self.x, 2, 0, 2 * pairs)
        a: Value
        b: Value
        parts: tuple[Value, ...]
        if self.interleaved:
            split = Reshape(turned, (tokens, heads, pairs, 2))
            a, b = (Reshape(Slice(split, 3, i, i + 1), (tokens, heads, pairs)) for i in (0, 1))
        else:
            a, b = Slice(turned, 2, 0, pairs), Slice(turned, 2, pairs, 2 * pairs)
        first, second = Sub(Mul(a, cos), Mul(b, sin)), Add(Mul(b, cos), Mul(a, sin))
        if self.interleaved:
            columns = tuple(Reshape(x, (tokens, heads, pairs, 1)) for x in (first, second))
            parts = (Reshape(Concat(columns, 3), (tokens, heads, 2 * pairs)),)
        else:
            parts = (first, second)
        if dim != 2 * pairs:
            parts = (*parts, Slice(self.x, 2, 2 * pairs, dim))
        return Concat(parts, 2)


def static(dim: int | Dim) -> int:
    """A size that must be known when compiling."""
    require(isinstance(dim, int), f"size {dim} must be known when compiling")
    assert isinstance(dim, int)
    return dim
