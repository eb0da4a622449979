"""Blocks of a GGUF tensor to the numbers that they stand for, bit for bit as ggml's reference (`dequantize_row_*`).

Every type has one function, from blocks u8 [n, bytes of a block] to f32 [n, weights of a block]; products are in the
reference's order, as f32 rounds after each. What a block is made of is said beside its function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.types import NUMPY_DTYPES, Array
from llmc.frontends.gguf.tensor_types import TensorType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Dequantizer = Callable[[Bytes], Floats]

_DEQUANTIZERS: dict[str, Dequantizer] = {}
_AT_ONCE = 1 << 20  # weights: temporaries take several times their room


def dequantizes(name: str) -> Callable[[Dequantizer], Dequantizer]:
    """Registers the function of a tensor type."""

    def register(function: Dequantizer) -> Dequantizer:
        _DEQUANTIZERS[name] = function
        return function

    return register


def dequantize(kind: TensorType, rows: Bytes) -> Array:
    """The values of rows u8 [n, bytes of a row]: [n, weights of a row], f32, or as they are stored."""
    if kind.dtype is not None:
        dtype = NUMPY_DTYPES[kind.dtype]
        if rows.ctypes.data % dtype.itemsize:  # a file may have its data at any byte
            rows = rows.copy()
        return rows.view(dtype)
    inputs = rows.shape[1] // kind.size * kind.block
    out = np.empty((len(rows), inputs), np.float32)
    step = max(1, _AT_ONCE // inputs)
    function = _DEQUANTIZERS[kind.name]
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged file's scales; weights are checked to be finite
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            out[start : start + step] = function(part.reshape(-1, kind.size)).reshape(len(part), inputs)
    return out


def half(blocks: Bytes, at: int) -> Floats:
    """The f16 at a byte of each block, as f32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def words(blocks: Bytes, begin: int, end: int, dtype: str) -> Array:
    """Bytes of each block as little endian integers [n, count]."""
    return np.ascontiguousarray(blocks[:, begin:end]).view(dtype)


def fields(data: Array, shifts: tuple[int, ...], width: int, run: int) -> Array:
    """Bit fields of `width` bits: of each run of integers, all of the first shift, then all of the next [n, -1]."""
    runs = data.reshape(len(data), -1, 1, run)
    by = np.asarray(shifts, data.dtype).reshape(1, 1, -1, 1)
    found: Array = ((runs >> by) & data.dtype.type((1 << width) - 1)).reshape(len(data), -1)
    return found


for _part in ("dequantize_grids", "dequantize_simple", "dequantize_super"):
    importlib.import_module(f"llmc.frontends.gguf.{_part}")  # registers its types
