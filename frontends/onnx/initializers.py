"""Tensors of an ONNX file: checked when the file is decoded, read when their values are used.

Whatever a tensor claims (its dtype, its dims) is compared with the bytes that it has before anything is made of it.
Elements of less than a byte are unpacked to `i8` and `u8`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from llmc.compiler.ir.types import NUMPY_DTYPES, Array
from llmc.errors import FrontendError
from llmc.frontends.lifted import WeightSource
from llmc.frontends.onnx.external_data import ExternalFiles
from llmc.frontends.onnx.forms import DTYPES
from llmc.frontends.onnx.protobuf import Span
from llmc.frontends.weight_sources import RandomWeights

# Elements of less than a byte, the lowest bits first: (bits, signed).
_PACKED: dict[int, tuple[int, bool]] = {
    TensorProto.UINT4: (4, False),
    TensorProto.INT4: (4, True),
    TensorProto.UINT2: (2, False),
    TensorProto.INT2: (2, True),
}
MOST_AXES = 16
_MOST_ELEMENTS = 1 << 40
_EXTERNAL_KEYS = ("location", "offset", "length", "checksum")


def text_of(text: str | bytes) -> str:
    """A text of the file. protobuf gives bytes for one that is not UTF-8, which then raises UnicodeDecodeError."""
    return text.decode() if isinstance(text, bytes) else text


def dtype_name(number: int) -> str:
    """The standard's name of a dtype, for messages."""
    try:
        return str(TensorProto.DataType.Name(number)).lower()
    except ValueError:
        return f"number {number}"


def ir_dtype(number: int, what: str) -> str:
    """The IR dtype that an ONNX dtype has here; FrontendError names `what` otherwise."""
    if number in _PACKED:
        return "i8" if _PACKED[number][1] else "u8"
    name = DTYPES.get(number)
    if name is None:
        raise FrontendError(f"{what} has dtype {dtype_name(number)}, which is not supported")
    return name


@dataclass(frozen=True)
class Stored:
    """A tensor of the file, not yet read. source: its raw bytes' place, or the message that holds them."""

    what: str
    dtype: str
    shape: tuple[int, ...]
    number: int
    source: Span | TensorProto

    def read(self) -> Array:
        """The values: a read-only view of the file where they lie in it as they are."""
        count = math.prod(self.shape)
        if isinstance(self.source, TensorProto) and not self.source.HasField("raw_data"):
            return _typed(self.source, self.number, self.dtype, count, self.what).reshape(self.shape)
        dtype = NUMPY_DTYPES["u8" if self.number in _PACKED or self.dtype == "bool" else self.dtype]
        if isinstance(self.source, Span):
            span = self.source
            units = (span.end - span.begin) // dtype.itemsize
            array: Array = np.frombuffer(span.data, dtype, units, span.begin)
            if span.begin % dtype.itemsize:
                array = array.copy()
        else:
            array = np.frombuffer(self.source.raw_data, dtype)
        if self.number in _PACKED:
            array = unpacked(array, count, *_PACKED[self.number])
        elif self.dtype == "bool":
            array = array != 0
        return array.reshape(self.shape)


def unpacked(packed: Array, count: int, bits: int, signed: bool) -> Array:
    """The elements of bytes that hold several each, the lowest bits first: u8, or i8 where signed."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    elements = (packed.reshape(-1, 1) >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)[:count]
    if not signed:
        return elements
    sign = np.int8(1 << (bits - 1))
    return (elements.view(np.int8) ^ sign) - sign


class TensorReader:
    """How tensors of one model become `Stored`."""

    def __init__(self, model: Path) -> None:
        self.files = ExternalFiles(model)

    def stored(self, tensor: TensorProto, what: str, raw: Span | None = None) -> Stored:
        """A checked tensor. raw: where its raw bytes lie, if not in the message."""
        dims = tuple(tensor.dims)
        count = element_count(dims, what)
        dtype = ir_dtype(tensor.data_type, what)
        stored = Stored(what, dtype, dims, tensor.data_type, tensor)
        bits = _PACKED[tensor.data_type][0] if tensor.data_type in _PACKED else 8 * NUMPY_DTYPES[dtype].itemsize
        needed = -(-count * bits // 8)
        if tensor.HasField("segment"):
            raise FrontendError(f"{what} is stored in segments, which is not supported")
        if tensor.data_location == TensorProto.EXTERNAL:
            if raw is not None or tensor.HasField("raw_data"):
                raise FrontendError(f"{what} has its data in the model's file and outside it")
            location, offset, length = _external(tensor, what)
            span = self.files.span(location, offset, length, needed, what)
            return Stored(what, dtype, dims, tensor.data_type, span)
        if raw is not None:
            _require_bytes(raw.end - raw.begin, needed, dtype, dims, what)
            return Stored(what, dtype, dims, tensor.data_type, raw)
        if tensor.HasField("raw_data"):
            _require_bytes(len(tensor.raw_data), needed, dtype, dims, what)
        elif (found := _typed_units(tensor)) != (units := needed if tensor.data_type in _PACKED else count):
            raise FrontendError(f"{what} of {list(dims)} needs {units} numbers, but has {found}: the file is damaged")
        return stored


def element_count(dims: Iterable[int], what: str) -> int:
    """The number of elements of dims that make sense."""
    dims = tuple(dims)
    if len(dims) > MOST_AXES or any(dim < 0 for dim in dims) or math.prod(filter(None, dims)) > _MOST_ELEMENTS:
        raise FrontendError(f"{what} has dims {list(dims)!s:.100}, which no tensor has")
    return math.prod(dims)


def _require_bytes(found: int, needed: int, dtype: str, dims: tuple[int, ...], what: str) -> None:
    if found != needed:
        raise FrontendError(f"{what} has {found} bytes, but {dtype} {list(dims)} needs {needed}: the file is damaged")


def _external(tensor: TensorProto, what: str) -> tuple[str, int, int | None]:
    """Location, offset and length of a tensor's external data."""
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if text_of(entry.key) in entries:
            raise FrontendError(f"{what} says twice what its external {entry.key!r:.40} is")
        entries[entry.key] = text_of(entry.value)
    if "location" not in entries:
        raise FrontendError(f"{what} has external data without a location")
    numbers = {}
    for key in ("offset", "length"):
        text = entries.get(key, "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 19):
            raise FrontendError(f"{what} has external data with {key} {text!r:.40}")
        numbers[key] = int(text) if text else None
    return entries["location"], numbers["offset"] or 0, numbers["length"]


def _field(tensor: TensorProto) -> str:
    """The typed field that holds a dtype's elements."""
    number = tensor.data_type
    if number == TensorProto.FLOAT:
        return "float_data"
    if number == TensorProto.DOUBLE:
        return "double_data"
    if number == TensorProto.INT64:
        return "int64_data"
    return "uint64_data" if number in (TensorProto.UINT32, TensorProto.UINT64) else "int32_data"


def _typed_units(tensor: TensorProto) -> int:
    return len(getattr(tensor, _field(tensor)))


def _typed(tensor: TensorProto, number: int, dtype: str, count: int, what: str) -> Array:
    """The elements in a typed field: halves and packed elements as the bits of integers."""
    field = _field(tensor)
    values = getattr(tensor, field)
    if field != "int32_data":
        wide = np.array(values, {"float_data": np.float32, "double_data": np.float64, "int64_data": np.int64}.get(
            field, np.uint64))  # fmt: skip
        return wide.astype(NUMPY_DTYPES[dtype])
    wide = np.array(values, np.int32)
    if dtype == "bool":
        return wide.astype(np.bool_)
    if number in _PACKED:
        return unpacked(wide.astype(np.uint8), count, *_PACKED[number])
    if dtype in ("f16", "bf16"):
        return wide.astype(np.uint16).view(NUMPY_DTYPES[dtype])
    return wide.astype(NUMPY_DTYPES[dtype])


class OnnxWeights:
    """The large initializers of a model as a source: those that became params."""

    def __init__(self) -> None:
        self._stored: dict[str, Stored] = {}
        self._last: Span | None = None

    def add(self, name: str, stored: Stored) -> str:
        """Take in a tensor; returns the name that it has here, which is its own where that is free."""
        unique, number = name, 2
        while unique in self._stored:
            unique, number = f"{name}#{number}", number + 1
        self._stored[unique] = stored
        return unique

    @property
    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def dtype(self, name: str) -> str:
        return self._stored[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def load(self, name: str) -> Array:
        if self._last is not None:
            self._last.release()
        stored = self._stored[name]
        self._last = stored.source if isinstance(stored.source, Span) else None
        return stored.read()


class NoiseWeights:
    """Random numbers in the shapes of some weights; the others as the model's file has them."""

    def __init__(self, weights: WeightSource, random: Mapping[str, str], seed: int) -> None:
        """random: the dtype of each weight that is replaced."""
        self._weights = weights
        self._sources = {
            dtype: RandomWeights({n: weights.shape(n) for n, d in random.items() if d == dtype}, dtype, seed)
            for dtype in sorted(set(random.values()))
        }
        self._random = dict(random)

    @property
    def names(self) -> Iterable[str]:
        return self._weights.names

    def dtype(self, name: str) -> str:
        return self._weights.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def load(self, name: str) -> Array:
        source = self._sources[self._random[name]] if name in self._random else self._weights
        return source.load(name)
