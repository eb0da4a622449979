"""Types of values: tensors with a logical shape, a dtype and an encoding, and the KV cache."""

from __future__ import annotations

import contextlib
import contextvars
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.dims import Dim
from llmc.errors import IRError

Shape = tuple[int | Dim, ...]
Array = NDArray[Any]  # any dtype: operators are undefined on mypy's `np.generic`

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "u64": np.dtype(np.uint64),
    "u32": np.dtype(np.uint32),
    "u16": np.dtype(np.uint16),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
FLOATS = ("f64", "f32", "f16", "bf16")
SIGNED = ("i64", "i32", "i16", "i8")
UNSIGNED = ("u64", "u32", "u16", "u8")
INTEGERS = SIGNED + UNSIGNED

_precise: contextvars.ContextVar[bool] = contextvars.ContextVar("precise", default=False)


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """Inside this block every float dtype evaluates in f64, so that two graphs can be compared without rounding."""
    token = _precise.set(True)
    try:
        yield
    finally:
        _precise.reset(token)


def is_precise() -> bool:
    """Whether evaluation runs in f64 at present."""
    return _precise.get()


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that a value of IR dtype `dtype` has while evaluating."""
    if dtype in FLOATS and _precise.get():
        return NUMPY_DTYPES["f64"]
    return NUMPY_DTYPES[dtype]


def dtype_of(dtype: np.dtype[Any]) -> str:
    """The IR name of a numpy dtype."""
    for name, candidate in NUMPY_DTYPES.items():
        if candidate == dtype:
            return name
    raise IRError(f"numpy dtype {dtype} has no counterpart in the IR")


def itemsize(dtype: str) -> int:
    """Bytes per element."""
    return NUMPY_DTYPES[dtype].itemsize


class Encoding(ABC):
    """How a tensor's logical values lie in bytes. Immutable, compared by value, with a canonical name."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The text in a type, such as `q4g64`."""

    def __str__(self) -> str:
        return self.name


_parsers: list[Callable[[str], Encoding | None]] = []


def register_encoding(parser: Callable[[str], Encoding | None]) -> Callable[[str], Encoding | None]:
    """Make a family of encodings readable by `parse_encoding`: the parser returns None for a name not its own."""
    _parsers.append(parser)
    return parser


def parse_encoding(name: str) -> Encoding:
    """The encoding with this name."""
    import llmc.compiler.encodings  # noqa: F401  (registers the families)

    for parser in _parsers:
        encoding = parser(name)
        if encoding is not None:
            return encoding
    raise IRError(f"unknown encoding {name!r}")


@dataclass(frozen=True)
class Tensor:
    """`tensor<[shape], dtype, encoding>`; without an encoding the values lie row-major as plain `dtype`."""

    shape: Shape
    dtype: str
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        if self.dtype not in NUMPY_DTYPES:
            raise IRError(f"unknown dtype {self.dtype!r}; known: {', '.join(NUMPY_DTYPES)}")
        if any(isinstance(dim, int) and dim < 0 for dim in self.shape):
            raise IRError(f"negative size in shape {self.shape}")

    def __str__(self) -> str:
        shape = ", ".join(str(dim) for dim in self.shape)
        encoding = f", {self.encoding}" if self.encoding is not None else ""
        return f"tensor<[{shape}], {self.dtype}{encoding}>"

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class KV:
    """`kv<heads, key_dim, value_dim, dtype>`: the cache of one layer, used linearly (each append gives the next)."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: str

    def __str__(self) -> str:
        return f"kv<{self.heads}, {self.key_dim}, {self.value_dim}, {self.dtype}>"


Type = Tensor | KV
